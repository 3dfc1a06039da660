"""A tiny model of each architecture of the Llama family, with a tokenizer that merges, on disk.

The vocabulary is the beginning of GPT-2's, cut as the architecture's own is, with its own special
tokens behind it; the embedding has more rows than there are tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.tokenizer import read_merges, read_vocabulary_file
from lightning_sft.models.llama_config import LlamaConfig, RopeFrequencies
from lightning_sft.models.llama_weights import hf_config, to_hf
from support.tiny_run import make_tiny

NUM_MERGES = 400
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>"]
SPECIAL += ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
WORDS = ["<think>", "</think>"]  # added, but no special tokens
NUM_TOKENS = 256 + NUM_MERGES + len(SPECIAL) + len(WORDS)
SIZE = {"vocab_size": NUM_TOKENS + 6, "context_length": 256, "emb_dim": 64, "n_heads": 4}
SIZE |= {"n_layers": 2, "hidden_dim": 96, "n_kv_groups": 2}


@dataclass(frozen=True)
class Kind:
    """What is an architecture's own.

    cut: Its pre-tokenizer, by GGUF's name.
    class_name: transformers' class.
    """

    config: LlamaConfig
    style: str
    cut: str
    class_name: str
    eos: str
    bos: str | None = None


LLAMA3 = LlamaConfig(**SIZE, rope_base=5e5, rope_freq=RopeFrequencies(32.0))
KINDS = {
    "llama3.2": Kind(
        LLAMA3, "llama3", "llama-bpe", "LlamaForCausalLM", "<|eot_id|>", "<|begin_of_text|>"
    ),
    # A base model's text ends with another token than a turn.
    "llama3.2-base": Kind(
        dataclasses.replace(LLAMA3, tie_embeddings=False),
        "llama3",
        "llama-bpe",
        "LlamaForCausalLM",
        "<|end_of_text|>",
        "<|begin_of_text|>",
    ),
    "smollm2": Kind(
        LlamaConfig(**SIZE, rope_base=1e5), "chatml", "smollm", "LlamaForCausalLM", "<|im_end|>"
    ),
    "qwen2.5": Kind(
        LlamaConfig(**SIZE, rope_base=1e6, qkv_bias=True, norm_eps=1e-6),
        "chatml",
        "qwen2",
        "Qwen2ForCausalLM",
        "<|im_end|>",
    ),
    "qwen3": Kind(
        LlamaConfig(
            **SIZE, head_dim=32, rope_base=1e6, qk_norm=True, norm_eps=1e-6, tie_embeddings=False
        ),
        "qwen3",
        "qwen2",
        "Qwen3ForCausalLM",
        "<|im_end|>",
    ),
}


@functools.cache
def make_tokenizer(kind: str) -> HFTokenizer:
    """The tokenizer of a kind."""
    vocabulary = json.loads(read_vocabulary_file("encoder.json"))
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)[: 256 + NUM_MERGES]
    tokens += SPECIAL + WORDS
    types = [1] * (256 + NUM_MERGES) + [3] * len(SPECIAL) + [4] * len(WORDS)
    facts: dict[str, Any] = {
        "model": "gpt2",
        "pre": KINDS[kind].cut,
        "tokens": tokens,
        "token_type": types,
        "merges": read_merges()[:NUM_MERGES],
        "eos_token_id": tokens.index(KINDS[kind].eos),
        "bos_token_id": tokens.index(KINDS[kind].bos or KINDS[kind].eos),
        "add_bos_token": KINDS[kind].bos is not None,
    }
    return HFTokenizer.from_gguf({f"tokenizer.ggml.{key}": v for key, v in facts.items()})


def write_family(folder: Path, kind: str) -> Path:
    """A Hugging Face folder: config.json, model.safetensors and the tokenizer."""
    folder.mkdir(parents=True)
    config = KINDS[kind].config
    make_tokenizer(kind).save(folder)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    save_file(to_hf(make_tiny(config).state_dict()), folder / "model.safetensors")
    return folder
