"""Tiny random models of each architecture of the Llama family."""

from __future__ import annotations

import torch

from lightning_sft.models.llama import LlamaModel
from lightning_sft.models.llama_config import LlamaConfig, RopeFrequencies

# With these, of eight rotations one is fast, one in between and six are slow.
SCALING = RopeFrequencies(8.0, 1.0, 4.0, original_context_length=32)
SIZE = {"vocab_size": 61, "context_length": 64, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
SIZE |= {"hidden_dim": 48, "n_kv_groups": 2}
CONFIGS = {
    "llama3.2": LlamaConfig(**SIZE, head_dim=16, rope_base=1e4, rope_freq=SCALING),
    "llama3.2-untied": LlamaConfig(
        **SIZE, head_dim=16, rope_base=1e4, rope_freq=SCALING, tie_embeddings=False
    ),
    "smollm2": LlamaConfig(**SIZE | {"n_heads": 2, "n_kv_groups": 1}),
    "qwen2.5": LlamaConfig(**SIZE, qkv_bias=True, norm_eps=1e-6, rope_base=1e6),
    "qwen3": LlamaConfig(**SIZE, head_dim=12, qk_norm=True, norm_eps=1e-6, rope_base=1e6),
    "qwen3-untied": LlamaConfig(**SIZE, qk_norm=True, norm_eps=1e-6, tie_embeddings=False),
}


def make_llama(
    config: LlamaConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LlamaModel:
    """Every parameter random, gains and biases too, which as ones and zeros would hide mistakes."""
    model = LlamaModel(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()
