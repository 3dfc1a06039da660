"""Weights of a file or a name, and how they get into a model.

All names and shapes are checked before the model is touched. Tensors are read one by one from a
memory-mapped file into parameters that own their memory, so loading takes about one copy of the
model. Where files come from is `files.py`'s business, what tensors are called `gpt2_weights.py`'s.

    >>> load_weights(model, "gpt2-medium")

Source: `load_weights_into_gpt` of chapter 5 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_sft.common.errors import InputError
from lightning_sft.models.files import find_weights, read_tensors
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import count_layers
from lightning_sft.models.registry import ARCHITECTURES, GPT2, MODEL_SIZES, family_of
from lightning_sft.models.tensor_files import check_finite

Tensors = Mapping[str, torch.Tensor]


def load_weights(model: GPTModel, source: str | None) -> Path | None:
    """Fill a model with pretrained or fine-tuned weights.

    Args:
        model: On the meta device (its parameters become real ones on the CPU) or any other.
        source: A name (of `REPOSITORIES`, or owner/name), a folder or a file; None leaves the
            model as it is.

    Returns:
        Where the weights were read from.

    Raises:
        InputError: No such source, a damaged file, or tensors that do not fit this model.
        ServiceError: A named model is neither in the cache nor to be had.
    """
    if source is None:
        return None
    path = find_weights(source)
    fill(model, read_tensors(path), path)
    return path


def fill(model: GPTModel, tensors: Tensors, path: Path) -> None:
    """Copy tensors, under any of the names that are known, into a model.

    Args:
        path: Where they are from, for messages.

    Raises:
        InputError: They do not fit the model, or hold NaN or infinity.
    """
    state = _fit(tensors, model, path)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.materialize()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head is not named again
            parameter.copy_(state[name])
            check_finite([(name, parameter)], path)  # here, as a conversion may overflow


def make_model(config: Any) -> Any:
    """The model of a configuration, on the meta device."""
    with torch.device("meta"):  # shapes alone: no memory, and no random numbers that go unused
        return family_of(config).model(config)


def load_pretrained(name: str) -> GPTModel:
    """A named model with its published weights.

    Args:
        name: `gpt2-small`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`.

    Raises:
        InputError: Unknown name.
        ServiceError: The weights are neither in the cache nor to be had.
    """
    if name not in GPT2.sizes:
        raise InputError(f"weights: unknown {name!r}; allowed: {', '.join(GPT2.sizes)}")
    model = make_model(GPT2.sizes[name])
    load_weights(model, name)
    return model


def book_state_dict(model: GPTModel) -> dict[str, torch.Tensor]:
    """The state dict that the book's own code of this family loads."""
    return family_of(model.config).book_state_dict(model)


def _fit(tensors: Tensors, model: GPTModel, path: Path) -> dict[str, torch.Tensor]:
    """Tensors by the model's names, after checking that each is there and of the right shape."""
    # Lightning puts the attribute's name, `model.`, before what it saves.
    family = family_of(model.config)
    is_extra = family.is_book_extra
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    state = {name: stripped[name] for name in stripped if not is_extra(name)}
    if "tok_emb.weight" not in state and any(name.endswith("lora_a") for name in state):
        raise InputError(
            f"{path}: holds LoRA adapters and not the weights they belong to; give the merged "
            "weights, the .pth in the folder of their run"
        )
    # Either the book's names or Hugging Face's.
    rename = family.from_book if "tok_emb.weight" in state else family.from_hf
    state = rename(state, model.config)
    head = state.pop("out_head.weight", state.get("tok_emb.weight"))  # without one: the embedding
    if head is not None and not model.config.tie_embeddings:
        state["out_head.weight"] = head
    _check_names_and_shapes(state, model, path)
    _check_held(state, path)
    embedding = state["tok_emb.weight"]
    if model.config.tie_embeddings and head is not None and head is not embedding:
        same_kind = _describe(head) == _describe(embedding)
        if not (same_kind and torch.equal(head.to(embedding.dtype), embedding)):
            raise InputError(
                f"{path}: its output head differs from its embedding and would be lost in a model "
                "that ties them; set tie_embeddings: false"
            )
    return state


def _check_names_and_shapes(state: Tensors, model: GPTModel, path: Path) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [f"{name} is missing" for name in wanted if name not in state]
    extra = [f"{name} has no place" for name in state if name not in wanted]
    other = [
        f"{name} is {_describe(state[name])} instead of {shape}"
        for name, shape in wanted.items()
        if name in state and _describe(state[name]) != str(shape)
    ]
    if faults := missing + extra + other:
        raise InputError(
            f"{path}: {len(faults)} tensors do not fit the model ({len(missing)} missing, "
            f"{len(extra)} without a place, {len(other)} of another shape)"
            f"{_guess_size(state, model.config)}: {', '.join(faults[:5])}"
        )


def _check_held(state: Tensors, path: Path) -> None:
    """Refuse a few bytes that stand for a whole model: a stride of zero makes any shape of them."""
    stored = {tensor.untyped_storage().data_ptr(): tensor for tensor in state.values()}
    held = sum(t.untyped_storage().nbytes() // t.element_size() for t in stored.values())
    wanted = sum(tensor.numel() for tensor in state.values())
    if wanted > 2 * held:  # twice: the head may be the embedding
        raise InputError(f"{path}: its tensors stand for {wanted:,} numbers and hold {held:,}")


def _describe(tensor: torch.Tensor) -> str:
    is_plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return str(tuple(tensor.shape)) if is_plain else f"{tensor.type()} {tuple(tensor.shape)}"


def _guess_size(state: Tensors, config: GPTConfig) -> str:
    width = state["tok_emb.weight"].shape[-1:] if "tok_emb.weight" in state else ()
    for name, known in ARCHITECTURES.items():
        is_it = (known.emb_dim,) == tuple(width) and known.n_layers == count_layers(state)
        if is_it and (known.emb_dim, known.n_layers) != (config.emb_dim, config.n_layers):
            size = f" ({MODEL_SIZES[name]})" if name in MODEL_SIZES else ""
            return f", it looks like {name}{size}"
    return ""
