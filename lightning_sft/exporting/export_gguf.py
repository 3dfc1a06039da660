"""A model as one GGUF file, which llama.cpp serves, and a Modelfile for Ollama beside it.

    python -m lightning_sft export --ckpt_path … --format gguf --gguf_type q8_0 --out exported

The file holds everything: weights, tokens, merges, chat template, end-of-text. A tied head is left
out (llama.cpp takes the embedding), an untied one is written. Tensors are converted and written
one by one. Needs the package gguf (extra `gguf`).

Source: the GGUF format and the names of its keys, github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.common.files import atomic_write
from lightning_sft.data.chat_template import jinja_template, ollama_template
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import END_OF_TEXT, read_vocabulary_file
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.exporting.export_hf import check_vocabulary, read_merges
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import gguf_names, iterate_hf
from lightning_sft.models.tensor_files import check_digest

if TYPE_CHECKING:
    import gguf

GGUFType = Literal["f32", "f16", "q8_0"]


def write_gguf(
    model: GPTModel, style: PromptStyle, name: str, path: Path, gguf_type: GGUFType = "f32"
) -> None:
    """Write a model into a GGUF file.

    Args:
        name: What programs show of the model.
        gguf_type: Of the matrices; norms, biases and positions are always f32.

    Raises:
        InputError: No package gguf, or fewer token ids than the tokenizer has.
    """
    gguf = load_gguf()
    check_vocabulary(model.config)
    state = model.state_dict()
    with atomic_write(path, "wb") as file:
        writer = gguf.GGUFWriter(file.name, "gpt2")
        _add_model(writer, gguf, model.config, name, gguf_type)
        _add_tokenizer(writer, gguf, model.config, style)
        for tensor_name, tensor in iterate_gguf(state, model.config.n_layers):
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
        for tensor_name, tensor in iterate_gguf(state, model.config.n_layers):
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
            'export: GGUF needs the package gguf: pip install "lightning-sft[gguf]"'
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


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors of a GGUF file, under the names they have there, as float32."""
    gguf = load_gguf()
    check_digest(path)  # the format has no checksum of its own
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: unquantize(t.data, t.tensor_type.name) for t in reader.tensors}
    return fields, tensors


def to_hf_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GGUF's tensors under Hugging Face's names and in its layout (matrices of blocks flipped)."""
    n_layers = 1 + max(
        (int(name.split(".")[1]) for name in tensors if name.startswith("blk.")), default=-1
    )
    names = {gguf: hf for hf, gguf in gguf_names(n_layers).items()}
    return {
        names.get(name, name): tensor.T if name.startswith("blk.") and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def modelfile(
    style: PromptStyle, config: GPTConfig, generation: GenerationConfig, gguf_name: str
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
    stops = ["<|endoftext|>", *([style.end] if style.end.strip() else [])]
    lines = [
        "# ollama create NAME -f Modelfile",
        "#",
        "# Not tried with Ollama by the authors. What is known of GPT-2 there (ollama issue 1285,",
        "# closed): in December 2024 a maintainer wrote that importing a GGUF should work, in",
        "# February 2025 a user that it ended in `unknown architecture`. If it does here too,",
        "# llama.cpp's llama-server takes this file.",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{ollama_template(style)}"""',
        *(f"PARAMETER {key} {value}" for key, value in parameters.items()),
        *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops),
    ]
    return "\n".join(lines) + "\n"


def iterate_gguf(
    state_dict: Mapping[str, torch.Tensor], n_layers: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF's name and layout, (out, in), of every tensor of a `GPTModel`."""
    names = gguf_names(n_layers)
    for hf_name, tensor in iterate_hf(state_dict):
        in_block = ".h." in hf_name and tensor.ndim == 2
        yield names[hf_name], tensor.T if in_block else tensor


def _stored_shape(gguf: Any, shape: torch.Size, kind: str) -> tuple[int, ...]:
    """Of the array that is written: as it is, or in bytes for a quantized type."""
    if kind in ("F32", "F16"):
        return tuple(shape)
    return tuple(gguf.quants.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[kind]))


def _add_model(
    writer: gguf.GGUFWriter, gguf: Any, config: GPTConfig, name: str, gguf_type: GGUFType
) -> None:
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[kinds[gguf_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_feed_forward_length(4 * config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(1e-5)


def _add_tokenizer(
    writer: gguf.GGUFWriter, gguf: Any, config: GPTConfig, style: PromptStyle
) -> None:
    vocabulary = json.loads(read_vocabulary_file("encoder.json"))
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[END_OF_TEXT] = gguf.TokenType.CONTROL
    # An embedding with more rows than there are tokens needs a name for each.
    spare = range(len(tokens), config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[PAD{row}]" for row in spare)])
    writer.add_token_types([*types, *(gguf.TokenType.UNUSED for _ in spare)])
    writer.add_token_merges(read_merges())
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END_OF_TEXT)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)
    writer.add_chat_template(jinja_template(style))
