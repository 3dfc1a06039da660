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

# Most positions whose logits are held at once, and most bytes of them: 512 × 50,257 × 4 are 103 MB,
# GPT-2's, and a larger vocabulary gets fewer positions. Each chunk reads the head's whole matrix
# three times, so that a small one costs almost as much as a large one.
CHUNK_SIZE = 512
CHUNK_BYTES = 512 * 50_257 * 4


def count_chunk_positions(vocab_size: int, itemsize: int = 4) -> int:
    """Most positions whose logits are held at once, in numbers of `itemsize` bytes."""
    return max(1, min(CHUNK_SIZE, CHUNK_BYTES // (vocab_size * itemsize)))


def sum_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    adapter: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over all targets, each times its weight where they have one.

    Args:
        hidden: (M, D) the model's output before the head.
        weight: (V, D) the head's weight.
        targets: (K,) int64 wanted token ids.
        places: (K,) which hidden state predicts each target; any order, repeats welcome.
        adapter: Hidden states → (M, rank) and (V, rank), whose product is added to the logits.
        weights: (K,) what each target counts; all 1 by default.

    Returns:
        A float32 scalar (float64 for float64 inputs). Differentiable in `hidden`, `weight` and what
        the adapter returns; what needs no gradient costs none.
    """
    places, order, factors = arrange(hidden, weight, places, adapter)
    with_grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    ordered = None if weights is None else weights[order]
    return SumCrossEntropy.apply(targets[order], places[order], ordered, with_grad, *factors)  # type: ignore[no-untyped-call]


def arrange(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    places: torch.Tensor,
    adapter: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What the head is to be multiplied with, and in which order its targets come.

    Returns:
        `places` (K,) among the hidden states that are used; an order (K,) that sorts them; and the
        factors of the logits, all lefts (M, D or rank), then all rights (V, D or rank).
    """
    used, places = torch.unique(places, return_inverse=True)  # sorted, so a chunk is a range
    order = torch.argsort(places)
    hidden = hidden.index_select(0, used)
    lefts, rights = [hidden], [weight]  # logits = the sum of all left @ right.T
    if adapter is not None:  # W + BA, without ever making it: hidden @ W.T + (hidden @ A.T) @ B.T
        low, lora_b = adapter(hidden)
        lefts, rights = [hidden, low], [weight, lora_b]
    return places, order, [*lefts, *rights]


class SumCrossEntropy(torch.autograd.Function):
    """All gradients are made while a chunk's logits are at hand; backward only scales them.

    Let p be the softmax of a position's logits (V,). The loss of a target t there is -log p[t], and
    its gradient in the logits is p - one_hot(t): what the model says less what is wanted. Targets
    that share a position add up. From there the chain rule through `left @ right.T` gives the
    gradients of hidden states and head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        targets: torch.Tensor,
        places: torch.Tensor,
        weights: torch.Tensor | None,
        with_grad: bool,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """`targets`, sorted `places` and `weights` (K,); `factors` are all lefts, then all rights.

        A left is (M, D) or (M, rank), its right (V, D) or (V, rank).
        """
        num_products = len(factors) // 2
        hidden, weight = factors[0], factors[num_products]
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype  # of the products
        exact = torch.promote_types(weight.dtype, torch.float32)  # of softmax and sums
        lefts = factors[:num_products]
        rights = [right.to(dtype) for right in factors[num_products:]]
        make = torch.empty_like if len(hidden) else torch.zeros_like  # nothing: no chunk fills it
        gradients = [
            make(factor) if with_grad and needed else None
            for factor, needed in zip(factors, ctx.needs_input_grad[4:], strict=True)
        ]
        grad_lefts, grad_rights = gradients[:num_products], gradients[num_products:]

        loss = torch.zeros((), dtype=exact, device=hidden.device)
        # Chunks of like size, and one buffer for all of them: fresh memory of this size costs as
        # much as the softmax in it.
        size = even_chunk(len(hidden), count_chunk_positions(len(weight), exact.itemsize))
        buffer = torch.empty(size * len(weight), dtype=exact, device=hidden.device)
        for begin in range(0, len(hidden), size):
            chunks = [left[begin : begin + size].to(dtype) for left in lefts]
            length = len(chunks[0])  # C positions; the last chunk may be shorter
            first, last = torch.searchsorted(
                places, torch.tensor([begin, begin + length], device=places.device)
            ).tolist()
            place, target = places[first:last] - begin, targets[first:last]
            counted = None if weights is None else weights[first:last].to(exact)
            # (V, C), not (C, V): `W x^T` is a third faster on CPUs for a matrix as tall as W.
            logits = sum_products(rights, chunks, buffer[: length * len(weight)])
            loss += _turn_into_gradient(logits, target, place, counted, with_grad)
            if not with_grad:
                continue
            grad_logits = logits.to(dtype)  # (V, C)
            for grad_left, right in zip(grad_lefts, rights, strict=True):
                if grad_left is not None:
                    grad_left[begin : begin + length] = grad_logits.T @ right
            for grad_right, chunk in zip(grad_rights, chunks, strict=True):
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
        return None, None, None, None, *scaled


def even_chunk(num_positions: int, most: int) -> int:
    """The size of chunks that are all alike, of at most so many positions."""
    num_chunks = max(1, math.ceil(num_positions / most))
    return max(1, math.ceil(num_positions / num_chunks))


def _turn_into_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    place: torch.Tensor,
    weight: torch.Tensor | None,
    with_grad: bool,
) -> torch.Tensor:
    """The loss of a chunk's targets; its gradient takes the logits' place in memory.

    Args:
        logits: (V, C), overwritten.
        target, place: (k,) wanted ids, and at which of the C positions.
        weight: (k,) what each counts; None where all count 1.
    """
    wanted = logits[target, place]
    # The largest is taken off first, so that no exp overflows; the softmax stays the same.
    largest = logits.amax(0)  # (C,)
    exp_sum = logits.sub_(largest).exp_().sum(0)  # in place all the way
    losses = (exp_sum.log() + largest)[place] - wanted  # (k,)
    if with_grad:
        # Of each position: its targets, or their weights added up.
        num_targets = torch.bincount(place, weight, minlength=logits.shape[1])
        logits.mul_(num_targets / exp_sum)
        taken = -torch.ones_like(wanted) if weight is None else -weight
        logits.index_put_((target, place), taken, accumulate=True)
    return losses.sum() if weight is None else (losses * weight).sum()


def sum_products(
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
