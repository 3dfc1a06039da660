"""A tiny model of the Llama family on disk, as transformers and the package gguf write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lightning_sft.data.tokenizer import byte_alphabet
from lightning_sft.models.llama import LlamaModel
from lightning_sft.models.llama_config import LlamaConfig
from lightning_sft.models.llama_weights import hf_config, to_hf
from support.tiny_gguf import write_gguf

# Behind the 256 bytes: 256, 257, 258, …
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<think>", "</think>"]
CONFIG = LlamaConfig(
    vocab_size=266,
    context_length=256,
    emb_dim=32,
    n_heads=4,
    n_layers=2,
    hidden_dim=48,
    n_kv_groups=2,
    rope_base=1e4,
)


def byte_ids(text: str) -> list[int]:
    """What the tiny tokenizer makes of a text without special tokens: its bytes."""
    return list(text.encode())


def write_tokenizer(folder: Path, eos: str = "<|im_end|>", bos: str | None = None) -> None:
    """A byte a token, ids as the bytes, and `SPECIAL` behind them."""
    vocabulary = dict(byte_alphabet())
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    facts: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    if bos is not None:
        from tokenizers import processors

        facts["bos_token"] = bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def make_tiny(config: LlamaConfig = CONFIG, seed: int = 0) -> LlamaModel:
    """Random weights, gains and biases too."""
    model = LlamaModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model.eval()


def write_hf(folder: Path, config: LlamaConfig = CONFIG, **tokenizer: Any) -> Path:
    """A Hugging Face folder: config.json, model.safetensors and the tokenizer."""
    write_tokenizer(folder, **tokenizer)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    save_file(to_hf(make_tiny(config).state_dict()), folder / "model.safetensors")
    return folder


def write_tiny_gguf(path: Path, monkeypatch: Any) -> Path:
    """The same model and tokenizer as one file."""
    characters = {byte: character for character, byte in byte_alphabet().items()}
    # The format wants a merge: one that no text has.
    tokens = [*(characters[byte] for byte in range(256)), *SPECIAL, 2 * characters[0]]
    begin = gguf.GGUFWriter.write_header_to_file

    def add_tokenizer(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 256 + [3] * len(SPECIAL) + [1])
        writer.add_token_merges([f"{characters[0]} {characters[0]}"])
        writer.add_eos_token_id(258)
        begin(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", add_tokenizer)
    write_gguf(make_tiny(), path)
    return path
