"""The pairs of a split that are trained on, and what is said of them before training.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig, listed
from lightning_sft.data.pair_rows import PairRows, find_equal, fit_pairs, tokenize_pairs
from lightning_sft.data.preferences import Pair
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import Tokenizer


def make_pair_rows(
    pairs: Sequence[Pair],
    style: PromptStyle,
    tokenizer: Tokenizer,
    config: DataConfig,
    split: str,
) -> tuple[PairRows, list[str]]:
    """The rows of a split's pairs, and a line for each policy that concerned some.

    Pairs keep the places they have in the split, whichever are left out.

    Raises:
        InputError: A pair breaks a policy; names it.
    """
    where, notes = f"{split} split", []
    try:
        rows = tokenize_pairs(pairs, style, tokenizer)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    is_equal = find_equal(pairs)
    places = np.flatnonzero(is_equal).tolist()
    if places and config.equal_answers == "error":
        raise InputError(
            f"{where}: the two answers of {len(places)} pairs are equal: {listed(places)} "
            "(data.equal_answers: skip leaves such pairs out)"
        )
    if places:
        is_kept = config.equal_answers == "keep"
        what = "are trained on for nothing" if is_kept else "are left out"
        notes.append(f"{where}: {len(places)} pairs of two equal answers {what}: {listed(places)}")
        rows = rows if is_kept else rows.select(~is_equal)
    before = len(rows)
    rows = fit_pairs(rows, max_length=config.max_length, overlong=config.overlong, where=where)
    longest = np.maximum(rows.chosen.lengths, rows.rejected.lengths)
    if before > len(rows):
        notes.append(f"{where}: {before - len(rows)} pairs of over {config.max_length} tokens are "
                     "left out")  # fmt: skip
    if (longest > config.max_length).any():
        count = int((longest > config.max_length).sum())
        notes.append(f"{where}: {count} pairs are cut to {config.max_length} tokens")
    return rows, notes


def describe_pairs(train: PairRows, val: PairRows, num_test: int, config: DataConfig) -> list[str]:
    """The lines that `fit` opens with: pairs and tokens."""
    tokens, prompts = train.clipped_lengths(config.max_length).sum(), train.chosen.prompt_lengths
    answers = sum(
        int(rows.count_targets(config.max_length, True).sum())
        for rows in (train.chosen, train.rejected)
    )
    return [
        f"data: {len(train):,} training, {len(val):,} validation and {num_test:,} test pairs",
        f"tokens: {tokens:,} of training, both answers' rows together; {answers:,} of them are "
        f"answers, {int(prompts.sum()):,} prompts that both rows share",
    ]
