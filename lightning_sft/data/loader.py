"""Loaders: batches in the order of `order.py`, shared by ranks, resumable anywhere.

They stand where the chapter has torch's `DataLoader` (listing 7.6), and use it inside. Nothing has
to be stored to go on in the middle of an epoch but how many batches were handed out.

A batch also says how many tokens it holds on all ranks, and how many supervised tokens its
whole optimizer step holds, over the accumulation window and all ranks: `module.py` divides by that
number, so that the step does not depend on how its entries were cut into batches. A trainer that
the loader follows says at each pass how many micro-batches make a step and an epoch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Dataset

from lightning_sft.common.errors import InputError
from lightning_sft.data.order import BatchOrder, MicroBatch, deal, sum_batches, sum_steps
from lightning_sft.data.pair_rows import PairRow
from lightning_sft.data.rows import Row
from lightning_sft.data.token_budget import TokenBudgetOrder

Batch = dict[str, Any]
WORKERS_PER_CPU = 8  # more help nobody, and each takes memory


class _Rows(Dataset[Row | PairRow]):
    """A sequence of rows, or of pairs of them, as torch's loader wants it."""

    def __init__(self, rows: Sequence[Row] | Sequence[PairRow]) -> None:
        self.rows = rows

    def __getitem__(self, place: int) -> Row | PairRow:
        # A negative place stands for a repeat that evens out the ranks: same tokens, no loss.
        return self.rows[place] if place >= 0 else self.rows[~place]._replace(index=-1)


class TrainLoader:
    """Batches of one rank in the seeded order of the current epoch.

    Args:
        rows: The training split; a pair of preferences counts as one row.
        collate: Rows → batch.
        num_targets, num_tokens: (rows,) supervised tokens of each row, or their weights added up
            (of pairs, whose losses count alike, 1), and input tokens.
        order: Which rows come when, on however many ranks; by default as the settings that follow
            say.
        lengths: (rows,) what `group_by_length` sorts by; `num_tokens` by default.
        batch_size, seed, world_size, drop_last, group_by_length: As in `BatchOrder`.
        current_epoch: Asked at the start of each pass.
        rank: This process among the `world_size` that share the order.
        accumulate: Micro-batches per optimizer step.
        num_workers, pin_memory: As in torch's `DataLoader`.
    """

    def __init__(
        self,
        rows: Sequence[Row] | Sequence[PairRow],
        collate: Callable[[list[Any]], Batch],
        *,
        num_targets: np.ndarray,
        num_tokens: np.ndarray,
        order: BatchOrder | TokenBudgetOrder | None = None,
        lengths: np.ndarray | None = None,
        batch_size: int = 1,
        seed: int = 0,
        current_epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        drop_last: bool = True,
        group_by_length: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if accumulate < 1:
            raise InputError(
                f"trainer.accumulate_grad_batches: {accumulate} is not allowed; it must be >= 1"
            )
        check_workers(num_workers)
        self.rows, self.collate = rows, collate
        self.num_targets, self.num_tokens = num_targets, num_tokens
        if order is not None:
            order = dataclasses.replace(order, world_size=world_size)
        self.order = order or BatchOrder(
            num_tokens if lengths is None else lengths,
            batch_size=batch_size,
            seed=seed,
            world_size=world_size,
            drop_last=drop_last,
            group_by_length=group_by_length,
        )
        self.accumulate, self.rank, self.current_epoch = accumulate, rank, current_epoch
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.trainer: L.Trainer | None = None
        self._handed_out = 0
        self._epoch = 0
        self._resume_at: tuple[int, int] | None = None  # (epoch, batches already handed out)

    def follow(self, trainer: L.Trainer) -> TrainLoader:
        """Take rank, epoch, accumulation and limits from a trainer, whatever was given before.

        A pass reads them as it begins, which is later than its iterator is made: by then a schedule
        of accumulation has set the epoch's value, and the trainer has applied its limits.
        """
        self.trainer = trainer
        self.current_epoch = lambda: trainer.current_epoch
        self.rank = trainer.global_rank
        self.order = dataclasses.replace(self.order, world_size=trainer.world_size)
        return self

    def _num_batches(self) -> int:
        """Micro-batches of a pass that will be asked for; a step's targets end with them."""
        limit = self.trainer.num_training_batches if self.trainer else len(self)
        return int(min(limit, len(self)))

    def _order_epoch(self) -> int:
        """The epoch whose order counts: of a trainer that overfits always the first one."""
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return 0 if overfits else self._epoch

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, also after a resume in its middle."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        self._epoch = self.current_epoch()
        start = 0
        if self._resume_at is not None:
            epoch, handed_out = self._resume_at
            start = handed_out if epoch == self._epoch else 0
            self._resume_at = None
        self._handed_out = start
        plan = self.plan(self._order_epoch())[: self._num_batches()]
        num_tokens, step_targets = self.count_tokens(plan), self.count_step_targets(plan)
        loader = DataLoader(
            _Rows(self.rows),
            batch_sampler=[micro_batch[self.rank] for micro_batch in plan[start:]],
            collate_fn=self.collate,
            # Without its own generator each pass would draw from the global one.
            generator=torch.Generator().manual_seed(0),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        for place, batch in enumerate(loader, start):
            self._handed_out = place + 1  # before the yield: the step may save a checkpoint
            counts = {"num_tokens": num_tokens[place], "step_targets": step_targets[place]}
            yield batch | counts

    def plan(self, epoch: int) -> list[MicroBatch]:
        """Places of the rows by micro-batch and rank. Ragged ends are filled with repeats (< 0)."""
        return self.order.plan(epoch)

    def count_tokens(self, plan: list[MicroBatch]) -> list[int]:
        """Input tokens of each micro-batch, on all ranks together."""
        return sum_batches(self.num_tokens, plan)

    def count_step_targets(self, plan: list[MicroBatch]) -> list[int]:
        """Supervised tokens of the optimizer step that each micro-batch belongs to; where rows
        have weights, the sum of these."""
        size = self.trainer.accumulate_grad_batches if self.trainer else self.accumulate
        return sum_steps(sum_batches(self.num_targets, plan), size)

    def state_dict(self) -> dict[str, int]:
        """Where this epoch stands: plain integers."""
        epoch, batches = self._resume_at or (self._epoch, self._handed_out)
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches that a checkpoint's run had taken."""
        self._resume_at = (state["epoch"], state["batches"])


def accumulation_plan(trainer: L.Trainer) -> dict[int, int]:
    """Micro-batches per optimizer step, by the first epoch in which they are so many."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return dict(callback.scheduling)
    return {0: trainer.accumulate_grad_batches}


class EvalLoader:
    """Every row once, in order; every rank gets the same number of batches.

    Where the rows do not divide evenly a rank's batch is filled with repeats that carry index -1
    and no loss, so that sharded strategies stay in step and no figure counts a row twice.

    A class of its own around torch's loader: Lightning takes a `DataLoader` apart for `predict`.
    """

    def __init__(
        self,
        rows: Sequence[Row] | Sequence[PairRow],
        collate: Callable[[list[Any]], Batch],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_workers(num_workers)
        together = batch_size * world_size
        places = list(range(len(rows)))  # in file order: nothing is learned from these batches
        chunks = [places[k : k + together] for k in range(0, len(places), together)]
        self._loader = DataLoader(
            _Rows(rows),
            # A ready list of lists of places takes the part of torch's sampler.
            batch_sampler=[deal(chunk, world_size)[rank] for chunk in chunks],
            collate_fn=collate,
            generator=torch.Generator().manual_seed(0),
            num_workers=num_workers,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


def check_workers(num_workers: int) -> None:
    """Refuse to start more worker processes than this machine could ever use.

    Raises:
        InputError: More than `WORKERS_PER_CPU` for each of its processors.
    """
    most = WORKERS_PER_CPU * (os.cpu_count() or 1)
    if num_workers > most:
        raise InputError(
            f"data.num_workers: {num_workers} is not allowed; at most {most} here "
            f"({WORKERS_PER_CPU} a processor)"
        )
