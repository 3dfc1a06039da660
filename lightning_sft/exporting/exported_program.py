"""A model in the program that holds it: ours, or an export loaded by what it is for.

`verify_export.py` asks both the same and compares.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_sft.common import files
from lightning_sft.common.errors import ServiceError
from lightning_sft.decoding.generation import generate
from lightning_sft.exporting.export_gguf import read_gguf, to_hf_names
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import (
    LONGEST_BOOK_MASK,
    from_hf,
    from_hf_config,
    is_book_mask,
)
from lightning_sft.models.loading import load_weights
from lightning_sft.models.tensor_files import read_torch


@dataclass(frozen=True)
class Program:
    """Something that holds a model: logits (T, V) of ids, and its own greedy continuation."""

    name: str
    logits: Callable[[list[int]], torch.Tensor]
    greedy: Callable[[list[int], int], list[int]]


def our_program(model: GPTModel, name: str = "this package") -> Program:
    """A `GPTModel` as something to ask."""

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids], device=model.tok_emb.weight.device))[0].cpu()

    return Program(name, logits, lambda ids, n: generate(model, [ids], max_new_tokens=n)[0])


def readers(format: str) -> list[Callable[[Path], Program]]:
    """What loads an export: our own code by the letter of the files, then the program itself.

    Both, because transformers 5 forgives a config that ties a head which is not tied; earlier
    versions and other programs go by the config, and lose the head.
    """
    if format == "hf" and importlib.util.find_spec("transformers") is not None:
        return [_load_hf, load_transformers]
    return [{"pth": _load_pth, "hf": _load_hf, "gguf": _load_gguf}[format]]


def _load_pth(folder: Path) -> Program:
    """Into the book's names, and each of them; also the causal masks that its code expects."""
    (path,) = folder.glob("*.pth")
    state = read_torch(path)
    config = GPTConfig(**files.read_json(folder / "config.json"))
    masks = [state.pop(name) for name in [*state] if is_book_mask(name)]
    if config.context_length <= LONGEST_BOOK_MASK:
        wanted = torch.triu(torch.ones(config.context_length, config.context_length), diagonal=1)
        if len(masks) != config.n_layers or not all(torch.equal(mask, wanted) for mask in masks):
            raise ServiceError(f"verify: {path.name} lacks the causal masks of the book's code")
    return our_program(_assemble(config, state), "the book's names")


def _load_hf(folder: Path) -> Program:
    config = from_hf_config(files.read_json(folder / "config.json"))
    with torch.device("meta"):
        model = GPTModel(config)
    load_weights(model, str(folder))
    return our_program(model.eval(), "this package; transformers is not installed")


def load_transformers(folder: Path) -> Program:
    """The exported folder as transformers loads it, ready to be asked."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=torch.tensor([ids])).logits[0]

    def greedy(ids: list[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        said = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
        )[0].tolist()[len(ids) :]
        end = model.generation_config.eos_token_id
        return said[: said.index(end)] if end in said else said

    return Program(f"transformers {transformers.__version__}", logits, greedy)


def _load_gguf(folder: Path) -> Program:
    (path,) = folder.glob("*.gguf")
    fields, tensors = read_gguf(path)
    config = GPTConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        context_length=fields["gpt2.context_length"],
        emb_dim=fields["gpt2.embedding_length"],
        n_heads=fields["gpt2.attention.head_count"],
        n_layers=fields["gpt2.block_count"],
    )
    state = from_hf(to_hf_names(tensors), config)
    state.setdefault("out_head.weight", state["tok_emb.weight"])
    return our_program(_assemble(config, state), "the GGUF read back")


def _assemble(config: GPTConfig, state: dict[str, Any]) -> GPTModel:
    """A model of these very tensors; every name must be there, and no other."""
    with torch.device("meta"):
        model = GPTModel(config)
    model.load_state_dict(state, assign=True)
    return model.eval()
