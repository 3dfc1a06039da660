"""Tiny models with random weights, ours and the book's, and their logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_sft.models.gpt2 import GPTConfig, GPTModel

TINY = GPTConfig(vocab_size=97, context_length=16, emb_dim=32, n_heads=4, n_layers=2)


TIED = dataclasses.replace(TINY, tie_embeddings=True)


INPUT_IDS = torch.arange(32).reshape(2, 16) * 3


def make_model(config: GPTConfig = TINY, seed: int = 0) -> GPTModel:
    """A model whose every parameter is random: zeros and ones would hide a missing bias."""
    model = GPTModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS)


def make_book_model(config: GPTConfig) -> torch.nn.Module:
    ch04 = pytest.importorskip("llms_from_scratch.ch04")
    fields = dataclasses.asdict(config)
    del fields["tie_embeddings"]
    return ch04.GPTModel(fields).eval()
