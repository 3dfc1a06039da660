"""Pairs of preferences as rows of token ids, two for each pair, which nothing parts.

A pair is one unit to the epoch's order, to ranks and micro-batches; only a batch lays its two rows
side by side, where a prefix tree computes their prompt, and whatever else they begin with, once.

    >>> rows = tokenize_pairs(pairs, get_style("alpaca"), gpt2_tokenizer())
    >>> rows[0].chosen.ids, rows[0].rejected.ids

Source: chapter 7's `ch07/04_preference-tuning-with-dpo` in the repository of "Build a Large
Language Model (From Scratch)". This module does not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation, Example
from lightning_sft.data.preferences import Pair
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.rows import Row, TokenRows
from lightning_sft.data.segments import Masking
from lightning_sft.data.token_cache import tokenize_entries
from lightning_sft.data.tokenizer import Tokenizer


class PairRow(NamedTuple):
    """One pair: a prompt with either answer.

    index: The pair's place in its split; -1 marks a pair repeated only to even out ranks.
    """

    chosen: Row
    rejected: Row
    index: int = 0  # type: ignore[assignment]  # shadows tuple.index, as in `Row`


@dataclass(frozen=True)
class PairRows(Sequence[PairRow]):
    """Many pairs; `rows[i]` is a `PairRow`.

    chosen, rejected: As many rows each, pair by pair.
    """

    chosen: TokenRows
    rejected: TokenRows

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> PairRow:  # type: ignore[override]
        chosen, rejected = self.chosen[place], self.rejected[place]
        return PairRow(chosen, rejected, chosen.index)

    @property
    def indices(self) -> npt.NDArray[np.int32]:
        """(pairs,) places in the split."""
        return self.chosen.indices

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(pairs,) tokens of both rows together, before any cut."""
        return self.chosen.lengths + self.rejected.lengths

    def clipped_lengths(self, max_length: int) -> npt.NDArray[np.int64]:
        """(pairs,) tokens of both rows, each cut to `max_length`."""
        return self.chosen.lengths.clip(max=max_length) + self.rejected.lengths.clip(max=max_length)

    def select(self, keep: npt.NDArray[np.bool_]) -> PairRows:
        """The pairs where `keep` is true."""
        return PairRows(self.chosen.select(keep), self.rejected.select(keep))

    def fingerprint(self) -> str:
        """A digest of both answers' ids and boundaries."""
        both = self.chosen.fingerprint() + self.rejected.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()[:16]


def tokenize_pairs(pairs: Sequence[Pair], style: PromptStyle, tokenizer: Tokenizer) -> PairRows:
    """The rows of a split's pairs: loss on the last answer alone, whatever stands before it.

    Raises:
        InputError: The style has no place for a message; names the pair.
    """
    masking = Masking(mask_prompt=True, train_on="last")
    chosen, rejected = (
        tokenize_entries([_plain(pair.examples[k]) for pair in pairs], style, tokenizer, masking)
        for k in (0, 1)
    )
    if not len(chosen) == len(rejected) == len(pairs):
        raise InputError(f"prompt_style {style.name}: makes other than one row of an answer")
    return PairRows(chosen, rejected)


def _plain(example: Example) -> Example:
    """Without `train` and `weight` of single messages: what was said before is not learned."""
    if not isinstance(example, Conversation):
        return example
    messages = (replace(message, train=None, weight=1.0) for message in example.messages)
    return Conversation(tuple(messages))


def fit_pairs(rows: PairRows, *, max_length: int, overlong: str, where: str) -> PairRows:
    """Apply the policy for rows of more than `max_length` tokens to pairs.

    Args:
        overlong: As in `DataConfig`; a pair goes as a whole.

    Raises:
        InputError: Names the first offending pair, or says that none is left.
    """
    longest = np.maximum(rows.chosen.lengths, rows.rejected.lengths)  # (pairs,)
    too_long = longest > max_length
    if overlong == "error" and too_long.any():
        first = int(np.flatnonzero(too_long)[0])
        raise InputError(
            f"{where}: pair {rows.indices[first]} has {longest[first]} tokens, more than "
            f"max_length {max_length} ({too_long.sum()} such pairs); raise data.max_length or set "
            "data.overlong to truncate or drop"
        )
    if overlong == "drop" and too_long.any():
        rows = rows.select(~too_long)
    if not len(rows):
        raise InputError(f"{where}: no pair is left to train on")
    targets = np.minimum(
        rows.chosen.count_targets(max_length, True), rows.rejected.count_targets(max_length, True)
    )
    # An answer that was cut away has no likelihood to compare.
    without = np.flatnonzero(targets <= 0)
    if len(without):
        raise InputError(
            f"{where}: pair {rows.indices[without[0]]} has an answer that data.max_length "
            f"{max_length} cuts away; raise it or set data.overlong to drop"
        )
    return rows


def find_equal(pairs: Sequence[Pair]) -> npt.NDArray[np.bool_]:
    """(pairs,) whether both answers are the same text, which teaches nothing."""
    return np.array([pair.chosen == pair.rejected for pair in pairs], bool)
