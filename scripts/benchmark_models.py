"""The models and the data that `benchmark.py` compares: one architecture, random weights."""

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


def make_data(run: Namespace) -> Any:
    """The data of all peers: rows of ids in the style and of the tokenizer that were asked for."""
    from lightning_sft.data.datamodule import InstructionDataModule
    from lightning_sft.data.find_tokenizer import read_tokenizer

    data = InstructionDataModule(run.data, prompt_style=run.style)
    if run.tokenizer:
        data.tokenizer = read_tokenizer(run.tokenizer)
    return data


def is_gpt2(run: Namespace) -> bool:
    from lightning_sft.models.gpt2 import GPTConfig

    return isinstance(get_config(run), GPTConfig)


def product_shapes(run: Namespace) -> list[tuple[int, int]]:
    """(in, out) of the matrices of all blocks."""
    config = get_config(run)
    width = config.emb_dim
    if is_gpt2(run):
        shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    else:
        heads, groups = config.n_heads * config.head_dim, config.n_kv_groups * config.head_dim
        shapes = [(width, heads), (width, groups), (width, groups), (heads, width)]
        shapes += [(width, config.hidden_dim)] * 2 + [(config.hidden_dim, width)]
    return shapes * config.n_layers


def make_our_model(run: Namespace) -> Any:
    from lightning_sft.models import registry

    config = get_config(run)
    return registry.family_of(config).model(config)


def make_chapter_model(run: Namespace) -> Any:
    from llms_from_scratch.ch04 import GPTModel

    return GPTModel(dataclasses.asdict(get_config(run)))


def make_transformers_model(run: Namespace) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from lightning_sft.models import registry

    ours = get_config(run)
    if not is_gpt2(run):
        facts = registry.family_of(ours).hf_config(ours)
        theirs = AutoConfig.for_model(**facts)
        theirs.dtype = "float32"
        return AutoModelForCausalLM.from_config(theirs)
    sizes: dict[str, Any] = {
        "n_embd": ours.emb_dim,
        "n_layer": ours.n_layers,
        "n_head": ours.n_heads,
    }
    sizes |= {"vocab_size": ours.vocab_size, "n_positions": ours.context_length}
    dropout: Any = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, tie_word_embeddings=False))
