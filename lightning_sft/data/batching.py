"""Rows → batches: padded as in the chapter, or packed without padding.

`collate` is the chapter's: one end-of-text token behind every row, padding on the right, targets
shifted by one, `-100` where there is no loss. `pack` lays the same rows out without padding and,
with `share_prefix`, without computing what rows have in common more than once; the loss and its
gradient are the same.

    >>> collate([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])["targets"]
    tensor([[    1,     2,     3,     4, 50256],
            [    6, 50256,  -100,  -100,  -100],
            [    8,     9, 50256,  -100,  -100]])

Source: listings 7.4 to 7.6 and exercise 7.2 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_sft.data.loader import Batch
from lightning_sft.data.prefix_tree import NO_TOKEN, find_shared, side_by_side
from lightning_sft.data.rows import Row, Span
from lightning_sft.data.tokenizer import END_OF_TEXT

IGNORE_INDEX = -100  # a target of this value has no loss; torch's own default


def collate(
    rows: Sequence[Row | Sequence[int]],
    *,
    pad_token_id: int = END_OF_TEXT,
    eos_token_id: int = END_OF_TEXT,
    ignore_index: int = IGNORE_INDEX,
    max_length: int | None = None,
    mask_prompt: bool = False,
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of the batch and shift them into inputs and targets.

    Padding is masked by length, never by value: end-of-text tokens inside a row keep their loss.

    Args:
        rows: `Row`s, or plain lists of ids; without their end-of-text token.
        max_length: Most input tokens; a longer row is cut and then ends without end-of-text.
        mask_prompt: No loss for the prompt's own tokens (figure 7.13).

    Returns:
        `input_ids` and `targets`, both (B, T) int64; and `weights`, (B, T) float32, what each
        target counts, where some count other than 1.
    """
    ids, lengths, spans = _sequences(rows, eos_token_id, max_length, mask_prompt)
    # Figure 7.8: every row as long as the longest of its own batch, not of the whole data set. The
    # last token of each is a target only.
    is_input = np.arange(ids.shape[1] - 1) < lengths[:, None] - 1  # (B, T)
    input_ids = np.where(is_input, ids[:, :-1], pad_token_id)
    return {"input_ids": torch.from_numpy(input_ids), **_targets(ids, lengths, spans, ignore_index)}


def pack(
    rows: Sequence[Row | Sequence[int]],
    *,
    share_prefix: bool = False,
    eos_token_id: int = END_OF_TEXT,
    ignore_index: int = IGNORE_INDEX,
    max_length: int | None = None,
    mask_prompt: bool = False,
) -> dict[str, torch.Tensor]:
    """Lay rows end to end, each token once.

    With `share_prefix` the rows form a prefix tree: a token is a child of the one before it, and
    rows that begin alike walk the same path until they part. Under causal attention a token's
    state depends on its path alone, so one copy serves all rows exactly, whatever they share.

    Returns:
        `input_ids` (N,) int64, `targets` (B, T) and perhaps `weights` as in `collate`, and the
        layout that `GPTModel` takes, all int64: `positions` (N,), each token's place in its row;
        `gather` (B, T), where each row's tokens are among the N; `scatter` (N,), one place of each
        of the N in (B, T).
    """
    ids, lengths, spans = _sequences(rows, eos_token_id, max_length, mask_prompt)
    targets = _targets(ids, lengths, spans, ignore_index)
    inputs = ids[:, :-1].copy()  # (B, T)
    # The last token of each row is a target only; that of the longest is cut off already.
    shorter = np.flatnonzero(lengths < ids.shape[1])
    inputs[shorter, lengths[shorter] - 1] = NO_TOKEN
    return targets | _lay_out(inputs, lengths - 1, share_prefix)


def lay_out(rows: Sequence[Sequence[int]], *, share_prefix: bool) -> dict[str, torch.Tensor]:
    """Where each token of these very rows is computed, and where it is found again.

    Returns:
        `input_ids` (N,), `positions` (N,), `gather` (B, T) and `scatter` (N,), as `pack` has them.
    """
    return _lay_out(*side_by_side(rows), share_prefix)


def _lay_out(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], share_prefix: bool
) -> dict[str, torch.Tensor]:
    """`lay_out` of (B, T) ids, of which each row has so many, `NO_TOKEN` behind them."""
    places = np.arange(ids.shape[1])  # (T,)
    shared, donors = find_shared(ids) if share_prefix else (np.zeros_like(lengths), [])
    shared = np.minimum(shared, lengths)
    # What a row does not share with a row above it is computed; the N tokens are numbered row by
    # row, so that a path's tokens come in their order.
    is_new = (places >= shared[:, None]) & (places < lengths[:, None])  # (B, T)
    scatter = np.flatnonzero(is_new)
    gather = np.zeros(ids.shape, np.int64)  # what stays 0 is filling, which has no loss
    gather[is_new] = np.arange(len(scatter))
    for row in np.flatnonzero(shared).tolist():  # a row above is finished when it is copied from
        length = shared[row]
        gather[row, :length] = gather[donors[row], :length]
    return {
        "input_ids": torch.from_numpy(ids[is_new]),
        "positions": torch.from_numpy(np.broadcast_to(places, ids.shape)[is_new]),
        "gather": torch.from_numpy(gather),
        "scatter": torch.from_numpy(scatter),
    }


def _sequences(
    rows: Sequence[Row | Sequence[int]],
    eos_token_id: int,
    max_length: int | None,
    mask_prompt: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[Sequence[Span]]]:
    """Every row with its end-of-text token: (B, T + 1) ids, `NO_TOKEN` behind them, (B,) how many
    they are, and where their loss is."""
    given = [row if isinstance(row, Row) else Row(row) for row in rows]
    # The last input of a cut row still has its target.
    most = max(len(row.ids) for row in given) + 1
    most = most if max_length is None else min(most, max_length + 1)
    ids, lengths = side_by_side([row.ids[:most] for row in given], width=most)
    ends = np.flatnonzero(lengths < most)
    ids[ends, lengths[ends]] = eos_token_id
    lengths[ends] += 1
    # Repeats, which only even out the ranks, have no loss.
    spans = [() if row.index < 0 else row.loss_spans(mask_prompt) for row in given]
    return ids, lengths, spans


def _targets(
    ids: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    spans: Sequence[Sequence[Span]],
    ignore_index: int,
) -> dict[str, torch.Tensor]:
    """`targets` (B, T) and, where a weight is not 1, `weights` (B, T) of `_sequences`."""
    # Figure 7.10: the target of each token is the one behind it. What stays unwritten is padding,
    # which figure 7.12 sets to -100 but for the first end-of-text.
    targets = np.full((len(ids), ids.shape[1] - 1), ignore_index)
    weights = None
    if any(span.weight != 1.0 for part in spans for span in part):
        weights = np.zeros(targets.shape, np.float32)
    for place, (part, length) in enumerate(zip(spans, lengths.tolist(), strict=True)):
        for span in part:
            # A prompt's last token predicts the first of the answer, so it keeps its target; a
            # row's first token is predicted from nothing.
            first, end = max(span.start, 1), min(span.end, length)
            targets[place, first - 1 : max(end, first) - 1] = ids[place, first : max(end, first)]
            if weights is not None:
                weights[place, first - 1 : max(end, first) - 1] = span.weight
    batch = {"targets": torch.from_numpy(targets)}
    return batch if weights is None else batch | {"weights": torch.from_numpy(weights)}


@dataclass(frozen=True)
class BatchMaker:
    """Rows → one training or validation batch, with the settings of a data module.

    A class rather than a closure, so that worker processes can receive it.

    Args:
        max_length, mask_prompt, padding_free, share_prefix: As in `DataConfig`.
        eos_token_id: The tokenizer's end-of-text token; closes each row and pads it.
    """

    max_length: int
    mask_prompt: bool
    padding_free: bool
    share_prefix: bool
    eos_token_id: int = END_OF_TEXT

    def __call__(self, rows: list[Row]) -> Batch:
        settings: dict[str, Any] = {
            "max_length": self.max_length,
            "mask_prompt": self.mask_prompt,
            "eos_token_id": self.eos_token_id,
        }
        if self.padding_free or self.share_prefix:
            batch: Batch = dict(pack(rows, share_prefix=self.share_prefix, **settings))
        else:
            batch = dict(collate(rows, pad_token_id=self.eos_token_id, **settings))
        return batch | {"index": torch.tensor([row.index for row in rows])}


def collate_prompts(rows: list[Row]) -> Batch:
    """Rows → what generation needs: `prompts`, lists of ids, and `index`, the entries' places."""
    return {
        "prompts": [list(map(int, row.ids[: row.prompt_length])) for row in rows],
        "index": [row.index for row in rows],
    }
