"""Bytes that a model keeps from its forward pass for its backward pass, block by block.

What a block keeps of a token, its family says (`Family.activation_numbers`). Here it is settled
which of it a run needs, how wide a number is in the run's precision, and how many tokens there are:

- a packed batch keeps attention's tensors for all B·W places, and the rest for computed tokens;
- a frozen layer without an adapter does not ask for its input again, and a block before the first
  adapter keeps nothing at all;
- an adapter keeps its `rank` numbers a token, and with dropout an input and a mask of its own;
- the model's own dropout keeps masks, and attention weights, as it rules out the fused kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn as nn

from lightning_sft.data.counting import BatchShape
from lightning_sft.models.activations import KeptTensor
from lightning_sft.models.decoder import Decoder
from lightning_sft.models.lora import LoRALinear
from lightning_sft.models.registry import family_of


class NumberSizes(NamedTuple):
    """Bytes of a number on the residual stream, and of one that a matrix product made."""

    stream: int
    product: int

    @classmethod
    def of(cls, precision: str) -> NumberSizes:
        """Of a precision as Lightning names it: `32-true`, `bf16-mixed`, `bf16-true` …"""
        if "64" in precision:
            return cls(8, 8)
        if "16" not in precision:
            return cls(4, 4)
        return cls(2, 2) if "true" in precision else cls(4, 2)


def measure_blocks(model: Decoder, batch: BatchShape, sizes: NumberSizes) -> list[float]:
    """Bytes that each block keeps, of those that keep anything.

    Args:
        model: With its adapters, if there are any; no memory is needed.
    """
    config = model.config
    places = batch.rows * batch.width
    tensors = family_of(config).activation_numbers(config, batch.tokens != places)
    of_dropout = _count_dropout(config, batch, sizes.stream) if config.drop_rate > 0 else 0.0
    kept: list[float] = []
    for block in model.trf_blocks:
        if not kept and not any(p.requires_grad for p in block.parameters()):
            continue  # no gradient comes this far down
        adapters = [part for part in block.modules() if isinstance(part, LoRALinear)]
        total = of_dropout
        for tensor in tensors:
            count = places if tensor.in_rows else batch.tokens
            total += count * tensor.numbers * _bytes_each(tensor, block, sizes)
        total += batch.tokens * sum(_adapter_bytes(part, sizes) for part in adapters)
        kept.append(total)
    return kept


def _bytes_each(tensor: KeptTensor, block: nn.Module, sizes: NumberSizes) -> int:
    """Bytes of one of a tensor's numbers; 0 where nothing that is trained needs it."""
    needing = sum(_needs_input(block.get_submodule(name)) for name in tensor.needed_by)
    if tensor.needed_by and not needing:
        return 0
    if tensor.kind == "copy" and sizes.product < sizes.stream:
        return sizes.product * needing  # autocast narrows it for each layer anew
    return sizes.product if tensor.kind == "product" else sizes.stream


def _needs_input(module: Any) -> bool:
    if isinstance(module, LoRALinear):
        return not module.dropout  # with dropout it has one of its own
    return bool(module.weight.requires_grad)


def _adapter_bytes(layer: LoRALinear, sizes: NumberSizes) -> int:
    """What an adapter keeps of a token beside its input."""
    # A mask is as wide as what it masks; GPUs do with a byte.
    own_input = layer.in_features * (sizes.product + sizes.stream) if layer.dropout else 0
    return layer.lora_a.shape[0] * sizes.product + own_input


def _count_dropout(config: Any, batch: BatchShape, size: int) -> float:
    """Bytes of a block's dropout: two shortcuts' masks, and attention weights.

    Of these there are W for each place and head: as softmax made them, the mask (numbers too), and
    their product.
    """
    of_shortcuts = 2 * size * batch.tokens * config.emb_dim
    return of_shortcuts + 3.0 * size * batch.rows * batch.width * config.n_heads * batch.width
