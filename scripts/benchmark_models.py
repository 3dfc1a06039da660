"""The models that `benchmark.py` compares: one architecture, random weights, an untied head."""

from __future__ import annotations

import dataclasses
import resource
import sys
from argparse import Namespace
from typing import Any


def peak_memory() -> float:
    """Most memory that this process has held, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def get_config(run: Namespace) -> Any:
    from lightning_sft.models import registry

    return registry.get_config(run.architecture)


def make_chapter_model(run: Namespace) -> Any:
    from llms_from_scratch.ch04 import GPTModel

    return GPTModel(dataclasses.asdict(get_config(run)))


def make_transformers_model(run: Namespace) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = get_config(run)
    sizes: dict[str, Any] = {
        "n_embd": ours.emb_dim,
        "n_layer": ours.n_layers,
        "n_head": ours.n_heads,
    }
    sizes |= {"vocab_size": ours.vocab_size, "n_positions": ours.context_length}
    dropout: Any = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, tie_word_embeddings=False))
