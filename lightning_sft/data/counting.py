"""What is counted before anything is trained: tokens, targets, computed tokens, steps.

One owner for each number: `fit` opens with it, `inspect` prints it, `plan` extrapolates from it.

    >>> count_split(rows, config, style, tokenizer).supervised
    52760
    >>> count_run_steps(batches=116, accumulate=1, max_epochs=2)
    232

This module does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig
from lightning_sft.data.encoding import encode_pieces
from lightning_sft.data.prefix_tree import Ids, count_tree
from lightning_sft.data.prompts import PromptStyle, Template
from lightning_sft.data.rows import TokenRows
from lightning_sft.data.tokenizer import Tokenizer


class SplitCounts(NamedTuple):
    """What training takes of one split; arrays hold the entries' places in it.

    entries: All entries, those that `overlong: drop` leaves out included.
    tokens, supervised: Input tokens and targets of an epoch, padding not counted.
    longest: Tokens of the longest row, before any cut.
    overlong: Entries of rows of more than `max_length` tokens, row by row.
    without_target: Entries of rows that are left with nothing to learn from; `fit` refuses these.
    answerless: Entries of rows that are cut before their answer begins.
    rows: Of the entries: one each, but for conversations of which each answer is a row.
    """

    entries: int
    tokens: int
    supervised: int
    longest: int
    overlong: npt.NDArray[np.int32]
    without_target: npt.NDArray[np.int32]
    answerless: npt.NDArray[np.int32]
    rows: int


def count_split(
    rows: TokenRows, config: DataConfig, style: PromptStyle, tokenizer: Tokenizer
) -> SplitCounts:
    """Count what training takes of the rows of a split.

    Args:
        rows: All rows of the split, before `fit_to_length`.
    """
    targets = rows.count_targets(config.max_length, config.mask_prompt)
    # A row of n tokens has n inputs and, thanks to the end-of-text behind it, n targets.
    too_long = rows.lengths > config.max_length  # (rows,)
    is_used = ~too_long if config.overlong == "drop" else np.ones(len(rows), bool)
    # A header that the model writes itself stands between the prompt and the answer proper.
    header = (
        0 if style.header_in_prompt else len(encode_pieces([Template(style.header)], tokenizer))
    )
    # The last target of a cut row is the token in place `max_length`, counted from 0.
    is_unanswered = rows.prompt_lengths + header > config.max_length
    # Of a conversation that is cut the first answers are left, or their loss is.
    answerless = is_used & too_long & np.where(rows.is_plain, is_unanswered, targets <= 0)
    return SplitCounts(
        entries=len(np.unique(rows.indices)),
        rows=len(rows),
        tokens=int(rows.lengths[is_used].clip(max=config.max_length).sum()),
        supervised=int(targets[is_used].clip(min=0).sum()),
        longest=int(rows.lengths.max()),
        overlong=rows.indices[too_long],
        without_target=rows.indices[is_used & (targets <= 0)],
        answerless=rows.indices[answerless],
    )


def check_answers(counts: SplitCounts, config: DataConfig, where: str) -> None:
    """Refuse a split most of whose rows are cut before their answer begins.

    Raises:
        InputError: Says how many, and of which setting.
    """
    used = counts.rows - (len(counts.overlong) if config.overlong == "drop" else 0)
    if 2 * len(counts.answerless) > used:
        raise InputError(
            f"{where}: {len(counts.answerless)} of {used} entries are cut to max_length "
            f"{config.max_length} before their answer begins, so training would teach no "
            "answers; raise data.max_length or set data.overlong to drop"
        )


def check_masks(rows: TokenRows, config: DataConfig, style: PromptStyle, where: str) -> None:
    """Refuse a split of which nothing carries loss, or everything where something should not.

    Args:
        rows: All rows of the split, before `fit_to_length`.

    Raises:
        InputError: Names the style, which is where to look first.
    """
    if not config.mask_prompt:
        return
    targets = rows.count_targets(sys.maxsize, config.mask_prompt)
    if (targets <= 0).all():
        raise InputError(
            f"{where}: nothing carries loss with prompt_style {style.name} and data.train_on "
            f"{config.train_on!r}; see what the messages' own train and weight say"
        )
    if (targets >= rows.lengths).all():
        raise InputError(
            f"{where}: everything carries loss with prompt_style {style.name} and data.train_on "
            f"{config.train_on!r}, although data.mask_prompt is true; set it to false if that is "
            "meant"
        )


def describe_training(
    train: SplitCounts, val: SplitCounts, num_test: int, config: DataConfig
) -> list[str]:
    """The three lines that `fit` opens with: entries, tokens, and rows that are too long."""
    what = {"truncate": "cut to", "drop": "left out as over", "error": "over"}[config.overlong]
    # Conversations in a style that closes no answers have a row for each.
    has_more = train.rows != train.entries or val.rows != val.entries
    rows = f", the first two in {train.rows:,} and {val.rows:,} rows" if has_more else ""
    return [
        f"data: {train.entries:,} training, {val.entries:,} validation and {num_test:,} test "
        f"entries{rows}",
        f"tokens: {train.tokens:,} of training, {train.supervised:,} of them supervised; "
        f"{val.tokens:,} of validation, {val.supervised:,} supervised",
        f"rows: {len(train.overlong)} of training and {len(val.overlong)} of validation are "
        f"{what} {config.max_length:,} tokens; {len(train.answerless)} and {len(val.answerless)} "
        "of them end before their answer begins",
    ]


class BatchShape(NamedTuple):
    """Size of a batch: `tokens` are computed, spread over `rows` rows of `width` in attention."""

    tokens: int
    rows: int
    width: int


def measure_batch(
    ids: Sequence[Ids], *, padding_free: bool = False, share_prefix: bool = False
) -> BatchShape:
    """What a batch computes, padded by default.

    Args:
        ids: The input tokens of its rows, cut to `max_length`.
        padding_free, share_prefix: As in `DataConfig`.
    """
    width = max(map(len, ids))
    # Listing 7.5 pads to the longest row of the batch; packing computes real tokens alone.
    if share_prefix:
        tokens = count_tree(ids)
    else:
        tokens = sum(map(len, ids)) if padding_free else len(ids) * width
    return BatchShape(tokens, len(ids), width)


def limit_batches(batches: int, limit: int | float | None) -> int:
    """Micro-batches of an epoch under `trainer.limit_train_batches`, a number or a share."""
    if limit is None:
        return batches
    # As Lightning does it: a whole number counts batches, even 1; a float is a share, even 1.0.
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def count_epoch_steps(batches: int, accumulate: int) -> int:
    """Optimizer steps of an epoch; the last one may hold fewer micro-batches."""
    return -(-batches // accumulate)


def count_run_steps(
    batches: int,
    accumulate: int | Mapping[int, int],
    max_epochs: int | None,
    max_steps: int = -1,
) -> int | None:
    """Optimizer steps of a whole run; None where nothing but its own end limits it.

    Args:
        batches: Micro-batches of an epoch, after `limit_batches`.
        accumulate: Micro-batches of a step; where that changes, by the epoch from which on it does.
        max_epochs, max_steps: As the Trainer takes them; -1 or null is no limit.
    """
    steps = None  # whichever limit is reached first ends the run
    if max_epochs is not None and max_epochs >= 0:
        plan = {0: accumulate} if isinstance(accumulate, int) else accumulate
        begins = sorted(epoch for epoch in plan if epoch < max_epochs)
        ends = [*begins[1:], max_epochs]
        steps = sum(
            count_epoch_steps(batches, plan[begin]) * (end - begin)
            for begin, end in zip(begins, ends, strict=False)
        )
    if max_steps >= 0:
        steps = max_steps if steps is None else min(steps, max_steps)
    return steps
