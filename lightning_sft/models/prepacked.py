"""Weights laid out anew for answering on a CPU, where reading them is what takes the time.

A step of decoding multiplies a few rows with every weight of the model. oneDNN reads weights in
blocks of its own at 1.5 to 2 times the speed of rows, if it may lay them out once; and a matrix
made of several that have the same input is read faster than each alone. Both cost a second copy of
the weights, which is made while a model answers and then given back.

>>> with prepacked(model):
...     generate(model, prompts)

The operators are private to torch: they are used from this file alone, after a check that they are
there and compute what `F.linear` does. Where not, or where memory is short, nothing changes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from lightning_sft.models.layers import Linear

# Rows that the layout is chosen for. The blocks for 8 are as quick as any with 1 to 128 rows.
ROWS = 8


class PrepackedWeights:
    """The weights of layers on one input, as one matrix in oneDNN's layout.

    Args:
        layers: Their weights are (out, in) with one `in`.
        dtype: To compute in.
    """

    def __init__(self, layers: Sequence[Linear], dtype: torch.dtype) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.dtype = dtype
        # torch counts the changes of a tensor: weights that were trained on are not used packed.
        self._sources = [
            (layer, layer.weight, layer.weight._version, layer.weight.dtype) for layer in layers
        ]
        weights = [layer.weight.to(dtype) for layer in layers]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(_join(weights), ROWS)
        biases = [layer.bias.to(dtype) for layer in layers if layer.bias is not None]
        self._bias = _join(biases) if biases else None

    def fit(self, x: torch.Tensor) -> bool:
        """Whether these are still the layers' weights, and in the kind of number x asks for.

        A model may have been trained, loaded, cast or moved since.
        """
        if x.device.type != "cpu":
            return False
        layer = self._sources[0][0]
        return _dtype_for(layer.weight) is self.dtype and self.are_current()

    def are_current(self) -> bool:
        """Whether the layers' weights are those that were packed."""
        return all(
            layer.weight is weight and weight._version == version and weight.dtype is dtype
            for layer, weight, version, dtype in self._sources
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, all outputs), without a gradient."""
        return _multiply(x.to(self.dtype), self._weight, self._bias)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a model has none: its weights are others


@contextlib.contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Pack a model's weights, for as long as this lasts, unless they are packed already."""
    mine = prepack(model)
    try:
        yield
    finally:
        if mine:
            discard_prepacked(model)


@torch.no_grad()
def prepack(model: nn.Module) -> bool:
    """Pack a model's weights until `discard_prepacked`, where that can be and there is room.

    Returns:
        Whether it was done here.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    if not layers or not all(_can_pack(layer) for layer in layers):
        return False
    dtype = _dtype_for(layers[0].weight)
    packs = [one for layer in layers if (one := layer.prepacked or layer.prepacked_together)]
    if packs and all(one.are_current() and one.dtype is dtype for one in packs):
        return False
    discard_prepacked(model)
    size = sum(layer.weight.numel() for layer in layers) * dtype.itemsize
    if not works(dtype) or size > _free_memory() / 2:
        return False
    neighbours: set[nn.Module] = set()
    for part in model.modules():
        members = [getattr(part, name) for name in getattr(part, "same_input", ())]
        if members and all(type(member) is Linear for member in members):
            with_bias = {member.bias is not None for member in members}
            if len(with_bias) == 1:
                members[0].prepacked_together = PrepackedWeights(members, dtype)
                neighbours.update(members)
    for layer in layers:
        if layer not in neighbours:
            layer.prepacked = PrepackedWeights([layer], dtype)
    return True


def discard_prepacked(model: nn.Module) -> None:
    """Give the second copy of the weights back."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.prepacked = layer.prepacked_together = None


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether torch has the operators for this kind of number, and they compute what they should.

    Half precision without instructions for it would be slower than without packing.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        rng = torch.Generator().manual_seed(0)
        x, weight = torch.randn(3, 24, generator=rng), torch.randn(40, 24, generator=rng)
        x, weight = x.to(dtype), weight.to(dtype)
        with torch.no_grad():
            blocks = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            found = _multiply(x, blocks, None)
            return torch.allclose(found.float(), F.linear(x, weight).float(), 1e-2, 1e-2)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _join(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _can_pack(layer: Linear) -> bool:
    weight = layer.weight  # a sharded one is no plain tensor, and one of inference has no version
    is_plain = type(weight.data) is torch.Tensor and not weight.is_inference()
    return is_plain and weight.device.type == "cpu"


def _dtype_for(weight: torch.Tensor) -> torch.dtype:
    """Under autocast linear layers compute in its kind of number, else in their weights'."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _free_memory() -> float:
    """Bytes that could be had now; where that is not told, any number of them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        facts = dict(line.split(":") for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        with contextlib.suppress(ValueError, OSError, AttributeError):
            return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")
