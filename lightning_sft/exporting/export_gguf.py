"""A model as one GGUF file, which llama.cpp serves, and a Modelfile for Ollama beside it.

    python -m lightning_sft export --ckpt_path … --format gguf --gguf_type q8_0 --out exported

The file holds everything: weights, tokens, merges, chat template, end-of-text. A tied head is left
out (llama.cpp takes the embedding), an untied one is written. Tensors are converted and written
one by one. Needs the package gguf (extra `gguf`).

Source: the GGUF format and the names of its keys, github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.common.files import atomic_write
from lightning_sft.data.chat_template import jinja_template, ollama_template
from lightning_sft.data.encoding import bos_token, special_tokens
from lightning_sft.data.gguf_vocabulary import vocabulary_of
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.exporting.export_hf import check_vocabulary
from lightning_sft.exporting.gguf_model import gguf_architecture, iterate_gguf, model_facts
from lightning_sft.models.decoder import Decoder

if TYPE_CHECKING:
    import gguf

GGUFType = Literal["f32", "f16", "q8_0"]
_GPT2_NOTE = (
    "# What is known of GPT-2 there (ollama issue 1285, closed): in December 2024 a maintainer",
    "# wrote that importing a GGUF should work, in February 2025 a user that it ended in `unknown",
    "# architecture`. If it does here too, llama.cpp's llama-server takes this file.",
)


def write_gguf(
    model: Decoder,
    tokenizer: Tokenizer,
    style: PromptStyle,
    name: str,
    path: Path,
    gguf_type: GGUFType = "f32",
) -> None:
    """Write a model into a GGUF file.

    Args:
        name: What programs show of the model.
        gguf_type: Of the matrices; norms, biases and positions are always f32.

    Raises:
        InputError: No package gguf, fewer token ids than the tokenizer has, or a tokenizer that
            llama.cpp has no name for.
    """
    gguf = load_gguf()
    check_vocabulary(model.config, tokenizer)
    config, state = model.config, model.state_dict()
    with atomic_write(path, "wb") as file:
        writer = gguf.GGUFWriter(file.name, gguf_architecture(config))
        _add_model(writer, gguf, config, name, gguf_type)
        _add_tokenizer(writer, tokenizer, config.vocab_size, style)
        for tensor_name, tensor in iterate_gguf(state, config):
            kind = tensor_type(tensor_name, tuple(tensor.shape), gguf_type)
            stored = _stored_shape(gguf, tensor.shape, kind)
            writer.add_tensor_info(
                tensor_name,
                stored,
                np.dtype({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)),
                int(np.prod(stored)) * {"F32": 4, "F16": 2}.get(kind, 1),
                raw_dtype=gguf.GGMLQuantizationType[kind],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in iterate_gguf(state, config):
            kind = tensor_type(tensor_name, tuple(tensor.shape), gguf_type)
            writer.write_tensor_data(quantize(tensor, kind))
        writer.close()


def load_gguf() -> Any:
    """The package gguf.

    Raises:
        InputError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            f"export: GGUF needs the package gguf: {files.install_command('gguf')}"
        ) from None
    return gguf


def tensor_type(name: str, shape: tuple[int, ...], wanted: GGUFType) -> str:
    """How a tensor is kept: llama.cpp wants vectors and positions in F32; Q8_0 has blocks of 32."""
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    if wanted == "q8_0" and shape[-1] % 32:
        return "F16"
    return wanted.upper()


def quantize(tensor: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    """A tensor's values as GGUF keeps them."""
    gguf = load_gguf()
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


def unquantize(values: np.ndarray[Any, Any], kind: str) -> torch.Tensor:
    """What is left of a tensor that was quantized, as float32."""
    gguf = load_gguf()
    found = gguf.quants.dequantize(values, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(found, dtype=np.float32))


def modelfile(
    style: PromptStyle,
    tokenizer: Tokenizer,
    config: Any,
    generation: GenerationConfig,
    gguf_name: str,
) -> str:
    """Ollama's recipe for the GGUF file beside it."""
    parameters: dict[str, Any] = {
        "temperature": generation.temperature,
        "num_ctx": config.context_length,
        "num_predict": generation.max_new_tokens,
        "repeat_penalty": 1.0,  # anything else would change greedy answers
    }
    if generation.temperature > 0:  # named, as Ollama has limits of its own
        parameters["top_k"] = generation.top_k or 0
        parameters["top_p"] = 1.0 if generation.top_p is None else generation.top_p
    # The style's end may be the end-of-text token itself.
    stops = dict.fromkeys([tokenizer.decode([tokenizer.eos_token_id]), style.end])
    lines = [
        "# ollama create NAME -f Modelfile",
        "#",
        "# Not tried with Ollama by the authors.",
        *(_GPT2_NOTE if gguf_architecture(config) == "gpt2" else ()),
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{ollama_template(style)}"""',
        *(f"PARAMETER {key} {value}" for key, value in parameters.items()),
        *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops if stop.strip()),
    ]
    return "\n".join(lines) + "\n"


def _stored_shape(gguf: Any, shape: torch.Size, kind: str) -> tuple[int, ...]:
    """Of the array that is written: as it is, or in bytes for a quantized type."""
    if kind in ("F32", "F16"):
        return tuple(shape)
    return tuple(gguf.quants.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[kind]))


def _add_model(
    writer: gguf.GGUFWriter, gguf: Any, config: Any, name: str, gguf_type: GGUFType
) -> None:
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[kinds[gguf_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in model_facts(config).items():
        name = f"{gguf_architecture(config)}.{key}"
        if isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int, style: PromptStyle
) -> None:
    vocabulary = vocabulary_of(tokenizer, vocab_size)
    begin, end = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    writer.add_tokenizer_model("gpt2")  # byte-level pairs, whoever's
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    # llama.cpp would take token 11 for one that is not named.
    writer.add_bos_token_id(end if begin is None else begin)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    if (turn_end := special_tokens(tokenizer).get(style.end)) is not None:
        writer.add_eot_token_id(turn_end)
    writer.add_add_bos_token(begin is not None)
    writer.add_chat_template(jinja_template(style, bos_token(tokenizer)))
