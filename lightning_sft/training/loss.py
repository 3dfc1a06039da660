"""Hidden states and targets → summed cross-entropy, without logits that nobody needs.

Only positions that carry loss are multiplied with the head, in chunks: for 8 rows of 1,024 tokens
the logits alone would take 1.6 GB in float32, and their gradient as much again. Where several rows
share a position (a packed batch's common prefix) its logits are computed once and each of its
targets is counted.

Source: the loss is `torch.nn.functional.cross_entropy(..., reduction="sum")` of section 7.5's
`calc_loss_batch`. Computing the head's gradient together with its loss, chunk by chunk, follows
Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

# Most positions whose logits are held at once: 512 × 50,257 × 4 bytes are 103 MB. Each chunk reads
# the head's whole matrix three times, so that a small one costs almost as much as a large one.
CHUNK_SIZE = 512


def sum_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    adapter: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over all targets.

    Args:
        hidden: (M, D) the model's output before the head.
        weight: (V, D) the head's weight.
        targets: (K,) int64 wanted token ids.
        places: (K,) which hidden state predicts each target; any order, repeats welcome.
        adapter: Hidden states → (M, rank) and (V, rank), whose product is added to the logits.

    Returns:
        A float32 scalar (float64 for float64 inputs). Differentiable in `hidden`, `weight` and what
        the adapter returns; what needs no gradient costs none.
    """
    used, places = torch.unique(places, return_inverse=True)  # sorted, so a chunk is a range
    order = torch.argsort(places)
    hidden = hidden.index_select(0, used)
    factors = [hidden, weight, *(adapter(hidden) if adapter is not None else ())]
    with_grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    return _SumCrossEntropy.apply(targets[order], places[order], with_grad, *factors)  # type: ignore[no-untyped-call]


class _SumCrossEntropy(torch.autograd.Function):
    """All gradients are made while a chunk's logits are at hand; backward only scales them.

    The logits are a sum of products `left @ right.T`: hidden states and the head's weight, and
    likewise a low-rank part.

    For one target the gradient of the logits is `softmax(logits) - one_hot(target)`; targets that
    share a position add up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        targets: torch.Tensor,
        places: torch.Tensor,
        with_grad: bool,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        hidden, weight = factors[:2]
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        lefts, rights = factors[::2], [right.to(dtype) for right in factors[1::2]]
        exact = torch.promote_types(weight.dtype, torch.float32)  # of softmax and sums
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        needed = [with_grad and need for need in ctx.needs_input_grad[3:]]
        make = torch.empty_like if len(hidden) else torch.zeros_like  # nothing: no chunk fills it
        gradients = [
            make(factor) if need else None for factor, need in zip(factors, needed, strict=True)
        ]
        # Chunks of like size, and one buffer for all of them: fresh memory of this size costs as
        # much as the softmax in it.
        num_chunks = max(1, math.ceil(len(hidden) / CHUNK_SIZE))
        size = max(1, math.ceil(len(hidden) / num_chunks))
        buffer = torch.empty(size * len(rights[0]), dtype=exact, device=hidden.device)
        for begin in range(0, len(hidden), size):
            chunks = [left[begin : begin + size].to(dtype) for left in lefts]
            length = len(chunks[0])  # the last chunk may be shorter
            first, last = torch.searchsorted(
                places, torch.tensor([begin, begin + length], device=places.device)
            ).tolist()
            place, target = places[first:last] - begin, targets[first:last]
            # (V, C), not (C, V): `W x^T` is a third faster on CPUs for a matrix as tall as W.
            logits = _sum_products(rights, chunks, buffer[: length * len(rights[0])])
            wanted = logits[target, place]
            largest = logits.amax(0)
            exp_sum = logits.sub_(largest).exp_().sum(0)  # in place all the way
            loss += ((exp_sum.log() + largest)[place] - wanted).sum()
            if not with_grad:
                continue
            logits.mul_(torch.bincount(place, minlength=length) / exp_sum)
            logits.index_put_((target, place), -torch.ones_like(place, dtype=exact), True)
            grad_logits = logits.to(dtype)
            for number, (chunk, right) in enumerate(zip(chunks, rights, strict=True)):
                grad_left, grad_right = gradients[2 * number : 2 * number + 2]
                if grad_left is not None:
                    grad_left[begin : begin + length] = grad_logits.T @ right
                if grad_right is not None:
                    _put_product(grad_right, grad_logits, chunk, add=begin > 0)
        ctx.gradients = gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.gradients
        ctx.gradients = None  # in place below, so a second backward must not find them
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in gradients]
        return None, None, None, *scaled


def _sum_products(
    lefts: list[torch.Tensor], rights: list[torch.Tensor], memory: torch.Tensor
) -> torch.Tensor:
    """The sum of all `left @ right.T`, in a flat piece of memory, which may have a wider type."""
    total = memory.view(len(lefts[0]), len(rights[0]))
    for number, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        _put_product(total, left, right.T.contiguous(), add=number > 0)
    return total


def _put_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, add: bool
) -> None:
    """`total = left @ right`, or `+=`; the types may differ."""
    if total.dtype != left.dtype:
        product = left @ right
        total.add_(product) if add else total.copy_(product)
    elif add:
        total.addmm_(left, right)
    else:
        torch.mm(left, right, out=total)
