"""The batches that a run will have, known from data and seed alone, before it is run.

>>> Outlook(data, devices=1, trainer=settings).longest
BatchShape(tokens=728, rows=8, width=91)
"""

from __future__ import annotations

from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.counting import (
    BatchShape,
    count_epoch_steps,
    count_run_steps,
    limit_batches,
    measure_batch,
)
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.data.order import BatchOrder, row_places
from lightning_sft.data.token_budget import TokenBudgetOrder


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
        self.lengths = self.rows.lengths.clip(max=data.config.max_length)
        order = self.order()
        self.batches = limit_batches(len(order), trainer.limit_train_batches)
        self.steps_per_epoch = count_epoch_steps(self.batches, self.accumulate)
        steps = count_run_steps(
            self.batches, self.accumulate, trainer.max_epochs or None, trainer.max_steps
        )
        if steps is None:
            raise InputError("trainer.max_epochs: a plan needs at least 1, or trainer.max_steps")
        self.steps = steps
        self.epochs = max(-(-steps // max(self.steps_per_epoch, 1)), 1)
        self.by_size = self._sort_by_size(order)
        self.longest = self.shape(self.by_size[0])

    def order(self, size: int | None = None) -> BatchOrder | TokenBudgetOrder:
        """The run's batches, of another size if wanted: of rows, or tokens with `max_tokens`."""
        return self.data.order(size, self.devices)

    def smaller_sizes(self) -> list[int]:
        """Sizes of a batch to try where the wanted one is too much, the largest first.

        Each goes into the wanted one, or nearly so, so that several of them make the same step.
        """
        tokens = self.data.config.max_tokens
        if tokens is None:
            wanted = self.data.batch_size
            return [size for size in range(wanted - 1, 0, -1) if wanted % size == 0]
        longest = max(int(self.lengths.max()), 1)  # no batch is smaller than that row
        halves = [tokens >> times for times in range(1, (tokens // longest).bit_length())]
        return halves + [longest] * (longest < min([tokens, *halves]))

    def _sort_by_size(self, order: BatchOrder | TokenBudgetOrder) -> list[list[int]]:
        """Each device's share of every batch of the run, the one of most padded tokens first."""
        parts = [
            row_places(part)
            for epoch in range(self.epochs)
            for batch in order.plan(epoch)
            for part in batch
        ]
        if isinstance(order, TokenBudgetOrder) and not order.padded:  # of most tokens at all
            return sorted(parts, key=lambda part: -int(self.lengths[part].sum()))
        return sorted(parts, key=lambda part: -len(part) * int(self.lengths[part].max()))

    def longest_of(self, size: int) -> BatchShape:
        """The largest share of a batch, were batches of that size."""
        return self.shape(self._sort_by_size(self.order(size))[0])

    def shape(self, places: list[int], split: str = "train") -> BatchShape:
        """What a batch of these rows computes."""
        rows, config = self.data.rows(split), self.data.config
        return measure_batch(
            [rows[place].ids[: config.max_length] for place in places],
            padding_free=config.padding_free,
            share_prefix=config.share_prefix,
        )

    def train_tokens(self) -> int:
        """Tokens that one device computes in an epoch, forward and back."""
        plan = self.order().plan(0)[: self.batches]
        return sum(self.shape(row_places(batch[0])).tokens for batch in plan)

    def eval_tokens(self, split: str, batches: int | None = None) -> int:
        """Tokens of a split's batches in order, or of the first few of them."""
        size, count = self.data.batch_size, len(self.data.rows(split))
        parts = [list(range(k, min(k + size, count))) for k in range(0, count, size)]
        return sum(self.shape(part, split).tokens for part in parts[:batches])
