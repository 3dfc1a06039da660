"""A model as a Hugging Face folder: what `transformers` (and whatever reads its files) loads.

    python -m lightning_sft export --ckpt_path … --format hf --out exported

Everything is written here, file by file, so that no transformers is needed to export:
`config.json`, `model.safetensors`, the tokenizer's files with a chat template made from the prompt
style, `generation_config.json`. Tensors are written one by one: beside the model there is never
more than one of them in memory.

Source: the safetensors format, github.com/huggingface/safetensors; transformers' configurations.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.common.files import atomic_write, write_json
from lightning_sft.data.chat_template import jinja_template
from lightning_sft.data.encoding import bos_token
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import END_OF_TEXT, Tokenizer, read_merges, read_vocabulary_file
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.models.decoder import Decoder
from lightning_sft.models.registry import family_of

END_TOKEN = "<|endoftext|>"


def write_hf(
    model: Decoder,
    tokenizer: Tokenizer,
    style: PromptStyle,
    generation: GenerationConfig,
    folder: Path,
) -> None:
    """Write config, weights, tokenizer and generation settings into a folder.

    Raises:
        InputError: The model has fewer token ids than the tokenizer.
    """
    check_vocabulary(model.config, tokenizer)
    config = hf_config(model.config) | token_ids(tokenizer)
    write_json(folder / "config.json", config)
    write_safetensors(model, folder / "model.safetensors")
    length = model.config.context_length
    if isinstance(tokenizer, HFTokenizer):
        write_tokenizer(tokenizer, style, folder, length)
    else:
        write_gpt2_tokenizer(style, folder, length)
    write_json(folder / "generation_config.json", generation_config(generation, length, tokenizer))


def hf_config(config: Any) -> dict[str, Any]:
    """`config.json` of a model, as its family's class in transformers wants it."""
    return family_of(config).hf_config(config)


def iterate_hf(
    state_dict: Mapping[str, torch.Tensor], config: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's name and layout of every tensor of a model; a tied head is left out."""
    return family_of(config).to_hf(state_dict)


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids that begin and end a text. GPT-2's one special token does both.

    No id of padding: transformers would take the gradient from its row of the embedding, and the
    token that pads here is the one that ends an answer.
    """
    end = tokenizer.eos_token_id
    return {"bos_token_id": getattr(tokenizer, "bos_token_id", end), "eos_token_id": end}


def check_vocabulary(config: Any, tokenizer: Tokenizer) -> None:
    """Refuse a model whose tokens are not the tokenizer's: outside, text would become other ids.

    Raises:
        InputError: It has fewer token ids than the tokenizer.
    """
    wanted = tokenizer.vocab_size
    if config.vocab_size < wanted:
        whose = "its" if isinstance(tokenizer, HFTokenizer) else "GPT-2's"
        raise InputError(
            f"export: the model's vocab_size {config.vocab_size} is less than the {wanted} of "
            f"{whose} tokenizer; only --format pth can hold it"
        )


def generation_config(
    generation: GenerationConfig, context_length: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """`generation_config.json`; every setting is named, as transformers has defaults of its own.

    Answers end by themselves or where the context does. A `max_new_tokens` here would overrule the
    `max_length` that a caller asks for, as lm-eval does.
    """
    settings: dict[str, Any] = {
        **token_ids(tokenizer),
        "pad_token_id": tokenizer.eos_token_id,
        "max_length": context_length,
        "do_sample": generation.temperature > 0,
    }
    if generation.temperature > 0:
        settings["temperature"] = generation.temperature
        settings["top_k"] = generation.top_k or 0  # 0: no limit
        settings["top_p"] = 1.0 if generation.top_p is None else generation.top_p
    return settings


def write_safetensors(model: Decoder, path: Path) -> None:
    """Write the weights under Hugging Face's names, one tensor at a time.

    The library's own writer wants all of them at once, transposed: gpt2-small then takes 1.26 GB in
    place of 0.90, and a large model twice itself.

    The file: eight bytes with the header's length, the header (JSON: each tensor's type, shape and
    place), then the tensors' bytes end to end.
    """
    state = model.state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in iterate_hf(state, model.config):
        begin, end = end, end + 4 * tensor.numel()
        place = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = place
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with atomic_write(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in iterate_hf(state, model.config):
            file.write(
                tensor.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data
            )


def write_tokenizer(
    tokenizer: HFTokenizer, style: PromptStyle, folder: Path, context_length: int
) -> None:
    """A model's own tokenizer, with the chat template of the style that it was trained in."""
    tokenizer.save(
        folder,
        chat_template=jinja_template(style, bos_token(tokenizer)),
        pad_token=tokenizer.facts["eos_token"],
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def write_gpt2_tokenizer(style: PromptStyle, folder: Path, context_length: int) -> None:
    """GPT-2's tokenizer in the two forms that are read, and the chat template."""
    vocabulary = read_vocabulary_file("encoder.json")
    merges = read_vocabulary_file("vocab.bpe")
    for name, content in (("vocab.json", vocabulary), ("merges.txt", merges)):
        with atomic_write(folder / name, "wb") as file:
            file.write(content)
    special = {"content": END_TOKEN, "single_word": False, "lstrip": False, "rstrip": False}
    special |= {"normalized": False, "special": True}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": context_length,
            "add_prefix_space": False,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": END_TOKEN for role in ("bos", "eos", "pad", "unk")},
            "added_tokens_decoder": {str(END_OF_TEXT): special},
            "chat_template": jinja_template(style),
        },
    )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in read_merges())]
    tokenizer = tokenizers.ByteLevelBPETokenizer(json.loads(vocabulary), pairs)
    tokenizer.add_special_tokens([tokenizers.AddedToken(END_TOKEN, normalized=False)])
    with atomic_write(folder / "tokenizer.json") as text:
        text.write(tokenizer.to_str(pretty=True))
