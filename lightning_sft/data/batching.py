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

import torch

from lightning_sft.data.loader import Batch
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
    sequences = _sequences(rows, eos_token_id, max_length, mask_prompt)
    longest = max(len(ids) for ids, _ in sequences) - 1  # the last token is a target only
    # Figure 7.8: every row as long as the longest of its own batch, not of the whole data set.
    input_ids = torch.full((len(rows), longest), pad_token_id)  # (B, T)
    targets = torch.full((len(rows), longest), ignore_index)  # (B, T)
    weights = None
    if any(span.weight != 1.0 for _, spans in sequences for span in spans):
        weights = torch.zeros(targets.shape)  # (B, T)
    for place, (ids, spans) in enumerate(sequences):
        row = torch.as_tensor(ids)
        # Figure 7.10: the target of each token is the one behind it. What stays unwritten in
        # `targets` is padding, which figure 7.12 sets to -100 but for the first end-of-text.
        input_ids[place, : len(ids) - 1] = row[:-1]
        for span in spans:
            # A prompt's last token predicts the first of the answer, so it keeps its target; a
            # row's first token is predicted from nothing.
            first, end = max(span.start, 1), min(span.end, len(ids))
            targets[place, first - 1 : max(end, first) - 1] = row[first:end]
            if weights is not None:
                weights[place, first - 1 : max(end, first) - 1] = span.weight
    batch = {"input_ids": input_ids, "targets": targets}
    return batch if weights is None else batch | {"weights": weights}


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
    padded = collate(
        rows,
        eos_token_id=eos_token_id,
        ignore_index=ignore_index,
        max_length=max_length,
        mask_prompt=mask_prompt,
    )
    inputs = [ids[:-1] for ids, _ in _sequences(rows, eos_token_id, max_length, mask_prompt)]
    del padded["input_ids"]
    return padded | lay_out(inputs, share_prefix=share_prefix)


def lay_out(rows: Sequence[Sequence[int]], *, share_prefix: bool) -> dict[str, torch.Tensor]:
    """Where each token of these very rows is computed, and where it is found again.

    Returns:
        `input_ids` (N,), `positions` (N,), `gather` (B, T) and `scatter` (N,), as `pack` has them.
    """
    width = max(map(len, rows))
    # A node of the tree is a token behind its parent node; equal ones are one node.
    node_of: dict[tuple[int, int], int] = {}
    input_ids: list[int] = []
    positions: list[int] = []
    scatter: list[int] = []
    gather = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, ids in enumerate(rows):
        path: list[int] = []  # the nodes of this row's tokens, from its first to its last
        parent = -1 if share_prefix else -1 - place  # a root for all rows, or one for each
        for position, token in enumerate(ids):
            node = node_of.setdefault((parent, token), len(input_ids))
            if node == len(input_ids):
                input_ids.append(token)
                positions.append(position)  # its depth, which is its place in every row
                scatter.append(place * width + position)
            path.append(node)
            parent = node
        gather[place, : len(path)] = torch.tensor(path)  # the rest, 0, has no loss
    return {
        "input_ids": torch.tensor(input_ids),
        "positions": torch.tensor(positions),
        "gather": gather,
        "scatter": torch.tensor(scatter),
    }


def _sequences(
    rows: Sequence[Row | Sequence[int]],
    eos_token_id: int,
    max_length: int | None,
    mask_prompt: bool,
) -> list[tuple[list[int], Sequence[Span]]]:
    """Ids with end-of-text, and where their loss is, of every row."""
    sequences = []
    for row in rows:
        row = row if isinstance(row, Row) else Row(row)
        ids = [*map(int, row.ids), eos_token_id]
        if max_length is not None:
            ids = ids[: max_length + 1]  # the last input still has its target
        # Repeats, which only even out the ranks, have none.
        sequences.append((ids, () if row.index < 0 else row.loss_spans(mask_prompt)))
    return sequences


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
