"""A row as it is shown to people: runs of tokens that are context, supervised or cut.

>>> [run.text for run in view_row(row, config, tokenizer) if run.kind == "supervised"]

This module does not import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

from lightning_sft.data.config import DataConfig
from lightning_sft.data.encoding import special_tokens
from lightning_sft.data.rows import Row
from lightning_sft.data.tokenizer import Tokenizer

Kind = Literal["context", "supervised", "cut"]


class Run(NamedTuple):
    """Neighbouring tokens of one kind.

    ids: Their ids.
    text: Their text, control characters spelled out.
    kind: Whether they are only read, carry loss, or are cut off by `max_length`.
    weight: What each of them counts in the loss; 1 where they carry none.
    is_special: Whether they are special tokens, which no user's text ever becomes.
    """

    ids: list[int]
    text: str
    kind: Kind
    weight: float
    is_special: bool


def view_row(row: Row, config: DataConfig, tokenizer: Tokenizer) -> list[Run]:
    """The whole row, its end-of-text token included, in order."""
    ids = [*map(int, row.ids), tokenizer.eos_token_id]
    special = set(special_tokens(tokenizer).values())
    kinds: list[tuple[Kind, float]] = [("context", 1.0)] * len(ids)
    for span in row.loss_spans(config.mask_prompt):
        # A row's first token is predicted from nothing, so it is never a target.
        for place in range(max(span.start, 1), min(span.end, len(ids))):
            kinds[place] = ("supervised", span.weight)
    for place in range(config.max_length + 1, len(ids)):
        kinds[place] = ("cut", 1.0)
    marked = [(token, *kind, token in special) for token, kind in zip(ids, kinds, strict=True)]
    runs = []
    for (kind, weight, is_special), group in itertools.groupby(marked, key=lambda one: one[1:]):
        tokens = [one[0] for one in group]
        runs.append(Run(tokens, printable(tokenizer.decode(tokens)), kind, weight, is_special))
    return runs


def view_tokens(run: Run, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Each token of a run with its own text; bytes that are no whole character as U+FFFD."""
    for token in run.ids:
        yield token, printable(tokenizer.decode([token]))


def printable(text: str) -> str:
    """Control characters spelled out: data must not steer the terminal it is shown on."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
