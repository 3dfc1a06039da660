"""Rows of token ids, kept as flat arrays: `Row`, `tokenize`, `TokenRows`.

Figure 7.7 draws the two steps: lay an entry out as text, encode the text. A row holds prompt and
response without the end-of-text token; batching adds exactly one. Where its loss is, is said by
spans of tokens; a plain row, one question and one answer, does without: its prompt's length says it
all.

    >>> row = tokenize(entries[0], get_style("alpaca"), gpt2_tokenizer())
    >>> row.ids, row.prompt_length

Source: listing 7.4 of "Build a Large Language Model (From Scratch)". This module does not import
torch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Entry
from lightning_sft.data.encoding import encode_prompt, encode_response
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import Tokenizer


class Span(NamedTuple):
    """Tokens of a row that carry loss: those in places `start` to `end - 1`, counted from 0.

    `end` may be one more than the row's ids, whose end-of-text token is learned as well. `weight`
    is what each token counts.
    """

    start: int
    end: int
    weight: float = 1.0


class Row(NamedTuple):
    """One entry, a conversation, or one answer in it with what stands before, as ids.

    ids: prompt and response, joined, without the end-of-text token.
    prompt_length: How many of them stand before the last answer.
    index: The entry's place in its split; -1 marks a row repeated only to even out ranks.
    spans: Where its loss is, in order and without overlap. None for a plain row: behind the prompt,
        or everywhere, as `mask_prompt` says.
    """

    ids: Sequence[int]
    prompt_length: int = 0
    index: int = 0  # type: ignore[assignment]  # shadows tuple.index, which nobody calls on a row
    spans: Sequence[Span] | None = None

    def loss_spans(self, mask_prompt: bool) -> Sequence[Span]:
        """Where its loss is, whatever kind of row it is."""
        if self.spans is not None:
            return self.spans
        return (Span(self.prompt_length if mask_prompt else 0, len(self.ids) + 1),)


def tokenize(entry: Entry, style: PromptStyle, tokenizer: Tokenizer, index: int = 0) -> Row:
    """Encode prompt and response apart and join them, so that the boundary is known.

    On the chapter's 1,100 entries the joined ids equal those of the whole text, for GPT-2 and the
    styles that are meant for it. Two cases differ elsewhere: an answer that opens with a newline,
    which GPT-2's splitting would merge with the header's, and `chatml` with `header_in_prompt:
    false`, where the whole text would merge a closing full stop with the `<` of `<|im_end|>`.
    """
    prompt_ids = encode_prompt(entry, style, tokenizer)
    # Encoded as one text, a token could span the boundary, and the mask would cut through it.
    return Row(prompt_ids + encode_response(entry, style, tokenizer), len(prompt_ids), index)


_NO_LOSS = Span(0, 0)
_BLOCK = 1 << 16  # elements of an array that are read at a time


@dataclass(frozen=True)
class TokenRows(Sequence[Row]):
    """Many rows in three arrays; `rows[i]` is a `Row` whose ids are a view.

    ids: (total,) token ids of all rows, end to end.
    offsets: (rows + 1,) where each row begins in `ids`.
    prompt_lengths: (rows,) ids that stand before the last answer.
    indices: (rows,) the entries' places in their split; more than one row may be of one entry.
    spans: (spans, 2) where loss begins and ends, as in `Span`, row by row; plain rows have none.
    span_weights: (spans,) what each of their tokens counts.
    span_offsets: (rows + 1,) where each row's spans begin.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    prompt_lengths: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    span_weights: npt.NDArray[np.float32]
    span_offsets: npt.NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> TokenRows:
        """Lay rows end to end: 4 bytes a token, where lists of integers take 8 and more."""
        lengths = [len(row.ids) for row in rows]
        parts = [np.asarray(row.ids, np.int32) for row in rows]
        # A row without loss gets an empty span, as one without a span is a plain row.
        spans = [() if row.spans is None else row.spans or (_NO_LOSS,) for row in rows]
        every = [span for part in spans for span in part]
        return cls(
            ids=np.concatenate(parts) if parts else np.empty(0, np.int32),
            offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64),
            prompt_lengths=np.array([row.prompt_length for row in rows], np.int32),
            indices=np.array([row.index for row in rows], np.int32),
            spans=np.array([span[:2] for span in every], np.int32).reshape(-1, 2),
            span_weights=np.array([span.weight for span in every], np.float32),
            span_offsets=np.cumsum([0, *map(len, spans)], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, place: int) -> Row:  # type: ignore[override]
        # Made anew at each access, so that worker processes share arrays and not Python objects.
        ids = self.ids[self.offsets[place] : self.offsets[place + 1]]
        first, last = self.span_offsets[place], self.span_offsets[place + 1]
        spans = None
        if first < last:
            places, weights = self.spans[first:last].tolist(), self.span_weights[first:last]
            spans = [Span(p[0], p[1], w) for p, w in zip(places, weights.tolist(), strict=True)]
        return Row(ids, int(self.prompt_lengths[place]), int(self.indices[place]), spans)  # type: ignore[arg-type]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(rows,) ids of each row, without end-of-text."""
        return np.diff(self.offsets)

    def count_targets(self, max_length: int, mask_prompt: bool) -> npt.NDArray[np.int64]:
        """(rows,) how many positions of each row carry loss once it is batched."""
        # Position t predicts token t+1, so the prompt's last position predicts the first answer
        # token and carries loss even when the prompt does not.
        first = np.maximum(self.prompt_lengths - 1, 0) if mask_prompt else 0
        plain = (np.minimum(self.lengths, max_length) - first).astype(np.int64)
        return np.where(self.is_plain, plain, self._sum_spans(max_length, None).astype(np.int64))

    def sum_weights(self, max_length: int, mask_prompt: bool) -> npt.NDArray[np.number]:
        """(rows,) the weights of each row's targets, added up; int64 where all of them are 1."""
        targets = self.count_targets(max_length, mask_prompt)
        if not (self.span_weights != 1.0).any():
            return targets
        return np.where(self.is_plain, targets, self._sum_spans(max_length, self.span_weights))

    @property
    def is_plain(self) -> npt.NDArray[np.bool_]:
        """(rows,) whether a row is one question and one answer, without spans."""
        return np.diff(self.span_offsets) == 0

    def _sum_spans(
        self, max_length: int, weights: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float64]:
        """(rows,) targets of each row's spans, times their weights; 0 for plain rows."""
        counts = np.diff(self.span_offsets)
        # The first token is predicted from nothing; the last target is that of input `max_length`.
        most = np.repeat(np.minimum(self.lengths, max_length) + 1, counts)
        targets = np.minimum(self.spans[:, 1], most) - np.maximum(self.spans[:, 0], 1)
        sizes = targets.clip(min=0) * (1.0 if weights is None else weights.astype(np.float64))
        row_of = np.repeat(np.arange(len(self)), counts)
        return np.bincount(row_of, weights=sizes, minlength=len(self)).astype(np.float64)

    def select(self, keep: npt.NDArray[np.bool_]) -> TokenRows:
        """The rows where `keep` is true."""
        return self.take(np.flatnonzero(keep))

    def take(self, places: npt.NDArray[np.integer]) -> TokenRows:
        """The rows in these places, in this order, as a copy in memory."""
        spans = _stretches(self.span_offsets, places)
        offsets = _from_zero(self.lengths[places])
        ids = np.empty(int(offsets[-1]), np.int32)
        for begin in range(0, len(places), _BLOCK):  # what says which ids is larger than they are
            end = min(begin + _BLOCK, len(places))
            found = _stretches(self.offsets, places[begin:end])
            ids[offsets[begin] : offsets[end]] = self.ids[found]
        return TokenRows(
            ids=ids,
            offsets=offsets,
            prompt_lengths=self.prompt_lengths[places],
            indices=self.indices[places],
            spans=self.spans[spans],
            span_weights=self.span_weights[spans],
            span_offsets=_from_zero(np.diff(self.span_offsets)[places]),
        )

    def fingerprint(self) -> str:
        """A digest of ids and boundaries: equal exactly where two sets train alike."""
        # A checkpoint keeps it: going on with other rows would not be going on.
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        arrays: list[npt.NDArray[Any]] = [self.ids, self.offsets, self.prompt_lengths]
        if len(self.spans):
            arrays += [self.spans, self.span_weights, self.span_offsets]
        for array in arrays:
            for begin in range(0, len(array), _BLOCK):  # never all of a mapped file at once
                digest.update(np.ascontiguousarray(array[begin : begin + _BLOCK]).tobytes())
        return digest.hexdigest()[:16]


def _from_zero(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """(n + 1,) where each of n neighbours begins that have so many elements."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64))).astype(np.int64)


def _stretches(
    offsets: npt.NDArray[np.integer], places: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """The elements between `offsets[place]` and `offsets[place + 1]`, for each place."""
    begins = _from_zero(np.diff(offsets)[places])
    shifts = offsets[:-1][places] - begins[:-1]
    return np.arange(begins[-1]) + np.repeat(shifts, np.diff(begins))


def fit_to_length(
    rows: TokenRows, *, max_length: int, overlong: str, mask_prompt: bool, where: str
) -> TokenRows:
    """Apply the policy for rows of more than `max_length` tokens, and demand a target in each.

    Args:
        max_length: Most input tokens of a row. A row of exactly that many keeps its end-of-text
            target; a longer one loses it with `truncate` (the chapter's behaviour, done by the
            collate), is left out with `drop`, and is refused with `error`.
        where: The split's name, for messages.

    Raises:
        InputError: Names the first offending entry, or says that no row is left.
    """
    too_long = rows.lengths > max_length  # (rows,)
    if overlong == "error" and too_long.any():
        first = int(np.flatnonzero(too_long)[0])
        raise InputError(
            f"{where}: entry {rows.indices[first]} has {rows.lengths[first]} tokens, more than "
            f"max_length {max_length} ({too_long.sum()} such entries); raise data.max_length or "
            "set data.overlong to truncate or drop"
        )
    if overlong == "drop":
        rows = rows.select(~too_long) if too_long.any() else rows
        if not len(rows):
            raise InputError(f"{where}: every entry is longer than max_length {max_length}")
    # Its mean loss would be 0 / 0, and the weights NaN after one step.
    without = np.flatnonzero(rows.count_targets(max_length, mask_prompt) <= 0)
    if len(without):
        first = int(without[0])
        if not rows.is_plain[first] and not rows.spans[rows.span_offsets[first], 1]:
            raise InputError(
                f"{where}: entry {rows.indices[first]} has no target: none of its messages carries "
                "loss (data.train_on, and their own train and weight)"
            )
        raise InputError(
            f"{where}: entry {rows.indices[first]} has no target left: its prompt of "
            f"{rows.prompt_lengths[first]} tokens fills max_length {max_length}; raise "
            "data.max_length or set data.overlong to drop"
        )
    return rows
