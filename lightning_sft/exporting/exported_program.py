"""A model in the program that holds it: ours, or an export loaded by what it is for.

`verify_export.py` asks both the same and compares.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_sft.common import files
from lightning_sft.common.errors import ServiceError
from lightning_sft.decoding.generation import generate
from lightning_sft.models.found_config import found_config
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import LONGEST_BOOK_MASK
from lightning_sft.models.loading import load_weights, make_model
from lightning_sft.models.registry import family_of, get_config
from lightning_sft.models.tensor_files import read_torch


@dataclass(frozen=True)
class Program:
    """Something that holds a model: logits (T, V) of ids, and its own greedy continuation.

    `eos_token_id` ends the continuation and is not part of it.
    """

    name: str
    logits: Callable[[list[int]], torch.Tensor]
    greedy: Callable[[list[int], int], list[int]]
    eos_token_id: int


Reader = Callable[[Path, int], Program]  # of an export's folder, and the model's end-of-text


def our_program(model: GPTModel, eos_token_id: int, name: str = "this package") -> Program:
    """A model of ours as something to ask."""

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids], device=model.tok_emb.weight.device))[0].cpu()

    def greedy(ids: list[int], count: int) -> list[int]:
        return generate(model, [ids], max_new_tokens=count, eos_token_id=eos_token_id)[0]

    return Program(name, logits, greedy, eos_token_id)


def readers(format: str) -> list[Reader]:
    """What loads an export: our own code by the letter of the files, then the program itself.

    Both, because transformers 5 forgives a config that ties a head which is not tied; earlier
    versions and other programs go by the config, and lose the head.
    """
    if format == "hf" and importlib.util.find_spec("transformers") is not None:
        return [_load_hf, load_transformers]
    return [{"pth": _load_pth, "hf": _load_hf, "gguf": _load_gguf}[format]]


def _load_pth(folder: Path, eos_token_id: int) -> Program:
    """Into the book's names, and each of them; also the causal masks that its code expects."""
    (path,) = folder.glob("*.pth")
    state = read_torch(path)
    config = get_config(files.read_json(folder / "config.json"))
    family = family_of(config)
    if isinstance(config, GPTConfig):
        _check_masks(state, config, path)
    weights = {name: state[name] for name in state if not family.is_book_extra(name)}
    # These very tensors: every name must be there, and no other.
    model = make_model(config)
    model.load_state_dict(family.from_book(weights, config), assign=True)
    return our_program(model.eval(), eos_token_id, "the book's names")


def _check_masks(state: Mapping[str, torch.Tensor], config: GPTConfig, path: Path) -> None:
    is_mask = family_of(config).is_book_extra
    masks = [tensor for name, tensor in state.items() if is_mask(name)]
    if config.context_length <= LONGEST_BOOK_MASK:
        wanted = torch.triu(torch.ones(config.context_length, config.context_length), diagonal=1)
        if len(masks) != config.n_layers or not all(torch.equal(mask, wanted) for mask in masks):
            raise ServiceError(f"verify: {path.name} lacks the causal masks of the book's code")


def _load_hf(folder: Path, eos_token_id: int) -> Program:
    said = "this package; transformers is not installed"
    return our_program(_load(folder), eos_token_id, said)


def _load_gguf(folder: Path, eos_token_id: int) -> Program:
    (path,) = folder.glob("*.gguf")
    return our_program(_load(path), eos_token_id, "the GGUF read back")


def _load(path: Path) -> Any:
    """The model that an export says it is, with the weights that it holds."""
    model = make_model(found_config(str(path)))
    load_weights(model, str(path))
    return model.eval()


def load_transformers(folder: Path, eos_token_id: int) -> Program:
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

    return Program(f"transformers {transformers.__version__}", logits, greedy, eos_token_id)
