"""A batch of pairs → the sum of their losses and of what is watched of them.

Sums, not means: a step divides by its own number of pairs, over all micro-batches and ranks, and an
evaluation by its split's, so that neither depends on how the pairs were cut into batches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchmetrics import Metric

from lightning_sft.data.loader import Batch
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.training.log_probs import row_log_probs
from lightning_sft.training.objectives import DPO
from lightning_sft.training.preference_loss import PREFERENCE_METRICS
from lightning_sft.training.reference import Reference


class PairSums(NamedTuple):
    """Of the P pairs of a batch, repeats left out.

    loss: Their losses' sum, differentiable.
    metrics: (6,) sums of `PREFERENCE_METRICS`.
    num_pairs: P.
    """

    loss: torch.Tensor
    metrics: torch.Tensor
    num_pairs: torch.Tensor


def sum_pairs(
    model: GPTModel, objective: DPO, reference: Reference | None, batch: Batch
) -> PairSums:
    """Compute the losses of a batch of `PairBatchMaker`."""
    is_real = batch["index"] >= 0  # (P,) repeats that even out ranks have no targets
    sums, num_tokens = row_log_probs(model, batch)  # (2P,): chosen, rejected, chosen, …
    theirs = None
    if reference is not None and objective.needs_reference:
        theirs = reference.log_probs(model, batch).view(-1, 2)[is_real]
    losses, metrics = objective(sums.view(-1, 2)[is_real], theirs, num_tokens.view(-1, 2)[is_real])
    return PairSums(losses.sum(), metrics.sum(0), is_real.sum())


class PairMeans(Metric):
    """Means of `PREFERENCE_METRICS` over all pairs that it has seen, on all ranks."""

    full_state_update = False
    sums: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        zeros = torch.zeros(len(PREFERENCE_METRICS), dtype=dtype)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, pairs: PairSums) -> None:
        self.sums = self.sums + pairs.metrics.to(self.sums)
        self.count = self.count + pairs.num_pairs.to(self.count)

    def compute(self) -> torch.Tensor:
        return self.sums / self.count
