"""The order of batches: a function of seed and epoch alone, shared by ranks, resumable anywhere.

The permutation of epoch `e` equals what `DataLoader(shuffle=True)` yields after
`torch.manual_seed(seed)` when nothing else draws, so seed 123 gives the chapter's printed batch
shapes. Nothing has to be stored to go on in the middle of an epoch but how many batches were
handed out.

A batch also says how many tokens it holds on all ranks, and how many supervised tokens its
whole optimizer step holds, over the accumulation window and all ranks: `module.py` divides by that
number, so that the step does not depend on how its entries were cut into batches. A trainer that
the loader follows says at each pass how many micro-batches make a step and an epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Dataset

from lightning_sft.common.errors import InputError
from lightning_sft.data.order import epoch_order
from lightning_sft.data.rows import Row

Batch = dict[str, Any]
WORKERS_PER_CPU = 8  # more help nobody, and each takes memory


class _Rows(Dataset[Row]):
    """A sequence of rows as torch's loader wants it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __getitem__(self, place: int) -> Row:
        # A negative place stands for a repeat that evens out the ranks: same tokens, no loss.
        return self.rows[place] if place >= 0 else self.rows[~place]._replace(index=-1)


class TrainLoader:
    """Batches of one rank in the seeded order of the current epoch.

    Args:
        rows: The training split.
        collate: Rows → batch.
        num_targets, num_tokens: (rows,) supervised tokens and input tokens of each row.
        batch_size: Rows a micro-batch on one rank.
        seed: Orders the epochs.
        current_epoch: Asked at the start of each pass.
        rank, world_size: This process and how many share the order. Micro-batch `k` of all ranks
            together holds the entries `[k·R·B, (k+1)·R·B)` of the order; ranks take consecutive
            slices of it.
        accumulate: Micro-batches per optimizer step.
        drop_last: Leave out the last incomplete micro-batch, as the chapter does.
        num_workers, pin_memory: As in torch's `DataLoader`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[list[Row]], Batch],
        *,
        num_targets: np.ndarray,
        num_tokens: np.ndarray,
        batch_size: int,
        seed: int,
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
        self.batch_size, self.seed, self.accumulate = batch_size, seed, accumulate
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.group_by_length, self.current_epoch = group_by_length, current_epoch
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.trainer: L.Trainer | None = None
        self._handed_out = 0
        self._epoch = 0
        self._resume_at: tuple[int, int] | None = None  # (epoch, batches already handed out)
        if not len(self):
            raise InputError(
                f"data.batch_size: {batch_size} on {world_size} device(s) needs at least "
                f"{batch_size * world_size} training entries, there are {len(rows)}; give a "
                "smaller batch_size or set data.drop_last to false"
            )

    def follow(self, trainer: L.Trainer) -> TrainLoader:
        """Take rank, epoch, accumulation and limits from a trainer, whatever was given before.

        A pass reads them as it begins, which is later than its iterator is made: by then a schedule
        of accumulation has set the epoch's value, and the trainer has applied its limits.
        """
        self.trainer = trainer
        self.current_epoch = lambda: trainer.current_epoch
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
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
        together = self.batch_size * self.world_size
        return len(self.rows) // together if self.drop_last else -(-len(self.rows) // together)

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

    def plan(self, epoch: int) -> list[list[list[int]]]:
        """Places of the rows by micro-batch and rank. Ragged ends are filled with repeats (< 0)."""
        order = epoch_order(len(self.rows), self.seed, epoch)
        together = self.batch_size * self.world_size
        micro_batches = [order[k * together : (k + 1) * together] for k in range(len(self))]
        if self.group_by_length:
            micro_batches = self._grouped(order, together, epoch)
        return [deal(places, self.world_size) for places in micro_batches]

    def count_tokens(self, plan: list[list[list[int]]]) -> list[int]:
        """Input tokens of each micro-batch, on all ranks together."""
        return [_total(self.num_tokens, parts) for parts in plan]

    def count_step_targets(self, plan: list[list[list[int]]]) -> list[int]:
        """Supervised tokens of the optimizer step that each micro-batch belongs to."""
        counts = [_total(self.num_targets, parts) for parts in plan]
        size = self.trainer.accumulate_grad_batches if self.trainer else self.accumulate
        steps = [sum(counts[k : k + size]) for k in range(0, len(counts), size)]
        return [steps[k // size] for k in range(len(counts))]

    def _grouped(self, order: list[int], together: int, epoch: int) -> list[list[int]]:
        """Like lengths share a batch: sort within windows of 50 batches, shuffle the batches."""
        window = 50 * together
        kept = order[: len(self) * together]
        batches = []
        for begin in range(0, len(kept), window):
            part = sorted(kept[begin : begin + window], key=lambda place: len(self.rows[place].ids))
            batches += [part[k : k + together] for k in range(0, len(part), together)]
        # The short batch of an epoch stays last, where its optimizer step expects it.
        short = [batch for batch in batches if len(batch) < together]
        full = [batch for batch in batches if len(batch) == together]
        return [full[k] for k in epoch_order(len(full), self.seed + 1, epoch)] + short

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
        rows: Sequence[Row],
        collate: Callable[[list[Row]], Batch],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_workers(num_workers)
        together = batch_size * world_size
        places = list(range(len(rows)))
        chunks = [places[k : k + together] for k in range(0, len(places), together)]
        self._loader = DataLoader(
            _Rows(rows),
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


def deal(places: list[int], world_size: int) -> list[list[int]]:
    """Cut places into one consecutive, equally long part per rank, filling up with repeats.

    A repeat of place `p` is written `~p`. One process needs no filling.
    """
    size = -(-len(places) // world_size)
    filled = places + [~places[-1]] * (size * world_size - len(places))
    return [filled[rank * size : (rank + 1) * size] for rank in range(world_size)]


def _total(counts: np.ndarray, parts: list[list[int]]) -> int:
    """Sum over one micro-batch's rows on all ranks, repeats left out."""
    return sum(int(counts[place]) for part in parts for place in part if place >= 0)
