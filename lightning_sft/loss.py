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

from typing import Any

import torch

IGNORE_INDEX = -100
# Rows of logits held at once: 256 × 50,257 × 4 bytes are 51 MB, and larger chunks run no faster.
CHUNK_SIZE = 256


def sum_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy summed over all targets.

    Args:
        hidden: (M, D) the model's output before the head.
        weight: (V, D) the head's weight.
        targets: (K,) int64 wanted token ids.
        places: (K,) which hidden state predicts each target; any order, repeats welcome.

    Returns:
        A float32 scalar (float64 for float64 inputs). Differentiable in `hidden` and `weight`.
    """
    if not targets.numel():
        return hidden.sum() * 0.0  # an empty sum that still has a graph
    used, places = torch.unique(places, return_inverse=True)  # sorted, so a chunk is a range
    order = torch.argsort(places)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _SumCrossEntropy.apply(
        hidden.index_select(0, used), weight, targets[order], places[order], with_grad
    )


class _SumCrossEntropy(torch.autograd.Function):
    """Both gradients are made while a chunk's logits are at hand; backward only scales them.

    For one target the gradient of the logits is `softmax(logits) - one_hot(target)`; targets that
    share a position add up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        places: torch.Tensor,
        with_grad: bool,
    ) -> torch.Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        head = weight.to(dtype)
        exact = torch.promote_types(weight.dtype, torch.float32)  # of softmax and sums
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        need_hidden, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        # One buffer for all chunks: fresh memory of this size costs as much as the softmax in it.
        buffer = torch.empty(
            min(CHUNK_SIZE, len(hidden)), len(head), dtype=exact, device=hidden.device
        )
        for begin in range(0, len(hidden), CHUNK_SIZE):
            chunk = hidden[begin : begin + CHUNK_SIZE].to(dtype)
            first, last = torch.searchsorted(
                places, torch.tensor([begin, begin + len(chunk)], device=places.device)
            ).tolist()
            place, target = places[first:last] - begin, targets[first:last]
            logits = _multiply(chunk, head.T, buffer[: len(chunk)])  # (C, V)
            wanted = logits[place, target]
            largest = logits.amax(-1, keepdim=True)
            exp_sum = logits.sub_(largest).exp_().sum(-1, keepdim=True)  # in place all the way
            loss += ((exp_sum.log() + largest)[place, 0] - wanted).sum()
            if not with_grad:
                continue
            counts = torch.bincount(place, minlength=len(chunk))[:, None]
            logits.mul_(counts / exp_sum)
            logits.index_put_((place, target), -torch.ones_like(place, dtype=exact), True)
            grad_logits = logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[begin : begin + CHUNK_SIZE] = grad_logits @ head
            if grad_weight is not None:
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad_logits.T, chunk)
                else:
                    grad_weight += grad_logits.T @ chunk
        ctx.gradients = grad_hidden, grad_weight
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # in place below, so a second backward must not find them
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss)
        return grad_hidden, grad_weight, None, None, None


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A matrix product written into `out`, which may have a wider type."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return out.copy_(left @ right)
