"""The batches that a run will have, known from data and seed alone, before it is run.

>>> Outlook(data, devices=1, trainer=settings).longest
BatchShape(tokens=728, rows=8, width=91)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.data.loader import TrainLoader
from lightning_sft.data.order import count_tree


@dataclass(frozen=True)
class BatchShape:
    """Size of a batch: `tokens` are computed, spread over `rows` rows of `width` in attention."""

    tokens: int
    rows: int
    width: int


class Outlook:
    """The batches that a run will have, known from data and seed alone.

    Args:
        data: The data module of the run.
        devices: How many share a batch.
        trainer: Its settings.
    """

    def __init__(self, data: InstructionDataModule, devices: int, trainer: Any) -> None:
        self.data, self.devices = data, devices
        self.sharded = trainer.strategy == "sharded"
        self.accumulate = trainer.accumulate_grad_batches
        if self.accumulate < 1:
            raise InputError("trainer.accumulate_grad_batches must be >= 1")
        self.rows = data.rows("train")
        self.lengths = self.rows.lengths.clip(max=data.max_length)
        loader = self.loader(data.batch_size)
        limit = trainer.limit_train_batches
        limit = 1.0 if limit is None else limit
        batches = len(loader)
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        self.batches = batches
        self.steps_per_epoch = -(-batches // self.accumulate)
        self.epochs, self.steps = self._count_steps(trainer)
        self.by_size = self._sort_by_size(loader)
        self.longest = self.shape(self.by_size[0])

    def _count_steps(self, trainer: Any) -> tuple[int, int]:
        epochs, max_steps = trainer.max_epochs, trainer.max_steps
        if max_steps < 0 and (epochs is None or epochs < 1):
            raise InputError("trainer.max_epochs: a plan needs at least 1, or trainer.max_steps")
        steps = self.steps_per_epoch * epochs if epochs and epochs > 0 else max_steps
        steps = min(steps, max_steps) if max_steps >= 0 else steps
        return max(-(-steps // max(self.steps_per_epoch, 1)), 1), steps

    def loader(self, batch_size: int) -> TrainLoader:
        """The run's loader, with batches of another size if wanted."""
        data = self.data
        return TrainLoader(
            self.rows,
            data.make_batch,
            num_targets=self.rows.count_targets(data.max_length, data.mask_prompt),
            num_tokens=self.lengths,
            batch_size=batch_size,
            seed=data.seed,
            world_size=self.devices,
            drop_last=data.drop_last,
            group_by_length=data.group_by_length,
        )

    def _sort_by_size(self, loader: TrainLoader) -> list[list[int]]:
        """Each device's share of every batch of the run, the one of most padded tokens first."""
        parts = [
            [place if place >= 0 else ~place for place in part]
            for epoch in range(self.epochs)
            for batch in loader.plan(epoch)
            for part in batch
        ]
        return sorted(parts, key=lambda part: -len(part) * int(self.lengths[part].max()))

    def longest_of(self, batch_size: int) -> BatchShape:
        """The largest share of a batch, were batches of that size."""
        return self.shape(self._sort_by_size(self.loader(batch_size))[0])

    def shape(self, places: list[int], split: str = "train") -> BatchShape:
        """What a batch of these rows computes."""
        rows, make = self.data.rows(split), self.data.make_batch
        ids = [list(map(int, rows[place].ids[: make.max_length])) for place in places]
        width = max(map(len, ids))
        if make.share_prefix:
            return BatchShape(count_tree(ids), len(ids), width)
        return BatchShape(
            sum(map(len, ids)) if make.padding_free else len(ids) * width, len(ids), width
        )

    def train_tokens(self) -> int:
        """Tokens that one device computes in an epoch, forward and back."""
        plan = self.loader(self.data.batch_size).plan(0)[: self.batches]
        parts = [[p if p >= 0 else ~p for p in batch[0]] for batch in plan]
        return sum(self.shape(part).tokens for part in parts)

    def eval_tokens(self, split: str, batches: int | None = None) -> int:
        """Tokens of a split's batches in order, or of the first few of them."""
        size, count = self.data.batch_size, len(self.data.rows(split))
        parts = [list(range(k, min(k + size, count))) for k in range(0, count, size)]
        return sum(self.shape(part, split).tokens for part in parts[:batches])
