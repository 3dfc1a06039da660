"""The order that a config asks for: one place that `fit`, `inspect` and `plan` ask.

    >>> make_order(rows, config, seed=123).plan(epoch=0)[0]

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sft.data.config import DataConfig
from lightning_sft.data.mixture import plan_stretches
from lightning_sft.data.order import BatchOrder, Stretch
from lightning_sft.data.pair_rows import PairRows
from lightning_sft.data.rows import TokenRows
from lightning_sft.data.token_budget import TokenBudgetOrder


def make_order(
    rows: TokenRows | PairRows,
    config: DataConfig,
    seed: int,
    world_size: int = 1,
    stretches: tuple[Stretch, ...] = (),
) -> BatchOrder | TokenBudgetOrder:
    """The micro-batches of every epoch, for the rows that take part in training.

    Args:
        stretches: Of a mixture, as `plan_mixture` has them.

    Raises:
        InputError: The rows do not fill one micro-batch, or one of them does not fit into any.
    """
    if config.max_tokens is not None:  # which preferences do not go with
        return TokenBudgetOrder(
            rows.lengths.clip(max=config.max_length),
            config.max_tokens,
            seed,
            world_size,
            padded=not (config.padding_free or config.share_prefix),
            largest_first=config.largest_first,
        )
    return BatchOrder(
        rows.lengths,
        batch_size=config.batch_size,
        seed=seed,
        world_size=world_size,
        drop_last=config.drop_last,
        group_by_length=config.group_by_length,
        stretches=stretches,
    )


def plan_mixture(rows: TokenRows, config: DataConfig, counts: Sequence[int]) -> tuple[Stretch, ...]:
    """How often an epoch takes the rows of each file; nothing where there is no mixture.

    Args:
        counts: Training entries of each file.
    """
    if not config.mixture:
        return ()
    lengths = rows.lengths.clip(max=config.max_length)
    return plan_stretches(config.sources(), counts, rows.indices, lengths)
