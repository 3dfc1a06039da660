"""A model as a Hugging Face folder: what `transformers` (and whatever reads its files) loads.

    python -m lightning_sft export --ckpt_path … --format hf --out exported

Everything is written here, file by file, so that no transformers is needed to export:
`config.json`, `model.safetensors`, GPT-2's tokenizer files with a chat template made from the
prompt style, `generation_config.json`. Tensors are written one by one: beside the model there is
never more than one of them in memory.

Source: the safetensors format, github.com/huggingface/safetensors; `GPT2Config` of transformers.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import tokenizers
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.common.files import atomic_write, write_json
from lightning_sft.data.chat_template import jinja_template
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import END_OF_TEXT, gpt2_tokenizer, read_vocabulary_file
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import hf_config, iterate_hf

END_TOKEN = "<|endoftext|>"


def write_hf(
    model: GPTModel, style: PromptStyle, generation: GenerationConfig, folder: Path
) -> None:
    """Write config, weights, tokenizer and generation settings into a folder.

    Raises:
        InputError: The model has fewer token ids than the tokenizer.
    """
    check_vocabulary(model.config)
    write_json(folder / "config.json", hf_config(model.config))
    write_safetensors(model, folder / "model.safetensors")
    write_tokenizer(style, model.config, folder)
    write_json(
        folder / "generation_config.json",
        generation_config(generation, model.config.context_length),
    )


def check_vocabulary(config: GPTConfig) -> None:
    """Refuse a model whose tokens are not GPT-2's: outside, text would become other ids.

    Raises:
        InputError: It has fewer token ids than the tokenizer.
    """
    wanted = gpt2_tokenizer().vocab_size
    if config.vocab_size < wanted:
        raise InputError(
            f"export: the model's vocab_size {config.vocab_size} is less than the {wanted} of "
            "GPT-2's tokenizer; only --format pth can hold it"
        )


def generation_config(generation: GenerationConfig, context_length: int) -> dict[str, Any]:
    """`generation_config.json`; every setting is named, as transformers has defaults of its own.

    Answers end by themselves or where the context does. A `max_new_tokens` here would overrule the
    `max_length` that a caller asks for, as lm-eval does.
    """
    settings: dict[str, Any] = {
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
        "max_length": context_length,
        "do_sample": generation.temperature > 0,
    }
    if generation.temperature > 0:
        settings["temperature"] = generation.temperature
        settings["top_k"] = generation.top_k or 0  # 0: no limit
        settings["top_p"] = 1.0 if generation.top_p is None else generation.top_p
    return settings


def write_safetensors(model: GPTModel, path: Path) -> None:
    """Write the weights under Hugging Face's names, one tensor at a time.

    The library's own writer wants all of them at once, transposed: gpt2-small then takes 1.26 GB in
    place of 0.90, and a large model twice itself.

    The file: eight bytes with the header's length, the header (JSON: each tensor's type, shape and
    place), then the tensors' bytes end to end.
    """
    state = model.state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in iterate_hf(state):
        begin, end = end, end + 4 * tensor.numel()
        place = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = place
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with atomic_write(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in iterate_hf(state):
            file.write(
                tensor.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data
            )


def write_tokenizer(style: PromptStyle, config: GPTConfig, folder: Path) -> None:
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
            "model_max_length": config.context_length,
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


def read_merges() -> list[str]:
    """GPT-2's merges in order, `left right` each; the file's first line is a comment."""
    return read_vocabulary_file("vocab.bpe").decode("utf-8").strip("\n").split("\n")[1:]
