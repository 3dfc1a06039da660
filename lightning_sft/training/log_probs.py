"""A batch → the log-probability of each row's supervised tokens, summed, without all logits.

The loss of a preference is a function of a few such sums, so that its gradient is that of
cross-entropy with a weight a row. Forward, the head is walked through in chunks and nothing but the
sums is kept; backward, when each row's weight is known, it is walked through again and `loss.py`
makes the gradients chunk by chunk. What that costs is a second product with the head; what it saves
is to hold logits of all tokens and their gradient.

    >>> log_probs, num_tokens = row_log_probs(model, batch)  # (rows,) each
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_sft.data.batching import IGNORE_INDEX
from lightning_sft.data.loader import Batch
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.layers import PackedLayout
from lightning_sft.models.lora import LoRALinear
from lightning_sft.training.loss import (
    SumCrossEntropy,
    arrange,
    count_chunk_positions,
    even_chunk,
    sum_products,
)


def supervised_states(
    model: GPTModel, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model's states of a batch, and which of them predict what.

    Args:
        batch: Of `collate` or `pack`.

    Returns:
        Hidden states (M, D); `supervised` (B, T), where there are targets; `places` (K,), which of
        the states predicts each target.
    """
    supervised = batch["targets"] != IGNORE_INDEX  # (B, T)
    # `places`: where, among all hidden states laid end to end, each supervised token's
    # prediction stands. Prompts under `mask_prompt` and padding have none (figure 7.13).
    layout = None
    if "gather" in batch:  # packed rows share states, so that several targets may share a place
        layout = PackedLayout(batch["positions"], batch["gather"], batch["scatter"])
        places = batch["gather"][supervised]
    else:
        places = supervised.flatten().nonzero().flatten()
    hidden = model.hidden_states(batch["input_ids"], layout=layout)  # (B, T, D) or (N, D)
    return hidden.flatten(0, -2), supervised, places


def row_log_probs(model: GPTModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of each row's targets, summed, and how many there are.

    Args:
        batch: Of `collate` or `pack`, without weights.

    Returns:
        (B,) float32 (float64 for a float64 model), differentiable; (B,) int64.
    """
    hidden, supervised, places = supervised_states(model, batch)
    head = model.out_head
    places, order, factors = arrange(hidden, head.weight, places, adapter_of(head))
    rows = supervised.nonzero()[:, 0]  # (K,) which row each target is of
    targets = batch["targets"][supervised]
    sums = _RowLogProbs.apply(targets[order], places[order], rows[order], len(supervised), *factors)  # type: ignore[no-untyped-call]
    return sums, supervised.sum(1)


def adapter_of(
    head: torch.nn.Module,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """What makes the two factors that a head's adapter adds; None where there is none, or off."""
    return head.factors if isinstance(head, LoRALinear) and head.is_on else None


class _RowLogProbs(torch.autograd.Function):
    """Log-probabilities summed by row; the gradients are made in a second walk, backward."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: torch.Tensor,
        places: torch.Tensor,
        rows: torch.Tensor,
        num_rows: int,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """`targets`, sorted `places` and `rows` (K,); `factors` as in `SumCrossEntropy`."""
        num_products = len(factors) // 2
        hidden, weight = factors[0], factors[num_products]
        device = hidden.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        dtype = ctx.autocast[1] if ctx.autocast[0] else hidden.dtype
        exact = torch.promote_types(weight.dtype, torch.float32)
        rights = [right.to(dtype) for right in factors[num_products:]]
        size = even_chunk(len(hidden), count_chunk_positions(len(weight), exact.itemsize))
        buffer = torch.empty(size * len(weight), dtype=exact, device=hidden.device)
        log_probs = torch.empty(len(targets), dtype=exact, device=hidden.device)  # (K,)
        for begin in range(0, len(hidden), size):
            chunks = [left[begin : begin + size].to(dtype) for left in factors[:num_products]]
            length = len(chunks[0])
            first, last = torch.searchsorted(
                places, torch.tensor([begin, begin + length], device=places.device)
            ).tolist()
            place, target = places[first:last] - begin, targets[first:last]
            logits = sum_products(rights, chunks, buffer[: length * len(weight)])  # (V, C)
            wanted = logits[target, place]
            largest = logits.amax(0)
            normalizer = logits.sub_(largest).exp_().sum(0).log() + largest  # (C,)
            log_probs[first:last] = wanted - normalizer[place]
        ctx.save_for_backward(targets, places, rows, *factors)
        sums = torch.zeros(num_rows, dtype=exact, device=hidden.device)
        return sums.index_add_(0, rows, log_probs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        targets, places, rows, *factors = ctx.saved_tensors
        # A log-probability is cross-entropy with the other sign.
        weights = -grad_sums[rows]  # (K,)
        is_on, dtype = ctx.autocast
        needed = ctx.needs_input_grad[4:]
        with torch.enable_grad(), torch.autocast(factors[0].device.type, dtype, enabled=is_on):
            leaves = [
                factor.detach().requires_grad_(is_needed)
                for factor, is_needed in zip(factors, needed, strict=True)
            ]
            loss = SumCrossEntropy.apply(targets, places, weights, True, *leaves)  # type: ignore[no-untyped-call]
            found = iter(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))
        return None, None, None, None, *(next(found) if is_needed else None for is_needed in needed)
