"""A model as GGUF describes it: facts of its architecture, and tensors under llama.cpp's names.

`models/gguf_file.py` is the way back. Norms, biases and whatever has one dimension stay float32;
how matrices are kept is `export_gguf.py`'s business.

Source: the GGUF format and convert_hf_to_gguf.py, github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from lightning_sft.exporting.export_hf import iterate_hf
from lightning_sft.models.gguf_file import ROPE_FACTORS, pairs_from_halves
from lightning_sft.models.gpt2 import GPTConfig
from lightning_sft.models.llama import rotation_rates
from lightning_sft.models.llama_config import LlamaConfig
from lightning_sft.models.llama_weights import model_type
from lightning_sft.models.registry import family_of


def gguf_architecture(config: GPTConfig | LlamaConfig) -> str:
    """`general.architecture`: gpt2, llama, qwen2 or qwen3."""
    return "gpt2" if isinstance(config, GPTConfig) else model_type(config)


def model_facts(config: GPTConfig | LlamaConfig) -> dict[str, int | float]:
    """What the file says of the architecture, without the architecture's name before each key."""
    facts: dict[str, int | float] = {
        "context_length": config.context_length,
        "embedding_length": config.emb_dim,
        "block_count": config.n_layers,
        "attention.head_count": config.n_heads,
    }
    if isinstance(config, GPTConfig):
        return facts | {
            "feed_forward_length": 4 * config.emb_dim,
            "attention.layer_norm_epsilon": 1e-5,
        }
    return facts | {
        "vocab_size": config.vocab_size,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count_kv": config.n_kv_groups,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_base),
    }


def iterate_gguf(
    state_dict: Mapping[str, torch.Tensor], config: GPTConfig | LlamaConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF's name and layout, (out, in), of every tensor of a model."""
    names = family_of(config).gguf_names(config.n_layers)
    for hf_name, tensor in iterate_hf(state_dict, config):
        yield names[hf_name], _arrange(names[hf_name], tensor, config)
    if isinstance(config, LlamaConfig) and config.rope_freq is not None:
        yield ROPE_FACTORS, _rope_factors(config)


def _arrange(name: str, tensor: torch.Tensor, config: GPTConfig | LlamaConfig) -> torch.Tensor:
    """From Hugging Face's arrangement, which differs for two architectures."""
    if isinstance(config, GPTConfig):
        return tensor.T if name.startswith("blk.") and tensor.ndim == 2 else tensor
    if model_type(config) == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        # llama.cpp rotates neighbours; everyone else a number and the one half a head behind it.
        heads = config.n_heads if name.endswith("attn_q.weight") else config.n_kv_groups
        return pairs_from_halves(tensor, heads)
    return tensor


def _rope_factors(config: LlamaConfig) -> torch.Tensor:
    """(E/2,) by how much Llama 3 slows each rotation down; llama.cpp knows no formula for it."""
    plain = dataclasses.replace(config, rope_freq=None)
    return rotation_rates(plain) / rotation_rates(config)
