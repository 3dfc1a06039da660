"""Keys and values of rows that are finished, for prompts that begin as these did.

A conversation's next prompt is its last one, the answer and a new question. A token's keys and
values depend on the tokens before it and on its place alone, so whatever a new prompt has in common
with an old row from the first token on need not be read again. Token ids are what is compared:
where an answer's text is encoded to other tokens than the model wrote, the rest is read anew.

>>> kept = KeptRows(most_bytes=500_000_000)
>>> batch = RunningBatch(model, kept=kept)  # looks here for what it is to read
>>> batch.keep(0, ids)  # before the row leaves
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# A prompt that continues an old row is read by itself, others side by side with what they have in
# common read once; every Alpaca prompt begins with the same 24 tokens. Reading alone costs the time
# of about this many tokens.
WORTH_KEEPING = 32


class KeptRow(NamedTuple):
    """What a row has seen: T token ids, and their keys and values (layers, G, T, E)."""

    ids: list[int]
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.keys.nbytes + self.values.nbytes


class KeptRows:
    """Rows of one model; those that were of use longest ago make room for new ones.

    Args:
        most_bytes: Of all keys and values together; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.rows: list[KeptRow] = []  # the last was of use last
        self._weights: tuple[tuple[int, int], ...] = ()

    def add(self, row: KeptRow) -> None:
        """Keep a row, in the place of those that it continues."""
        if len(row.ids) < WORTH_KEEPING or row.num_bytes > self.most_bytes:
            return
        self.rows = [old for old in self.rows if old.ids != row.ids[: len(old.ids)]]
        self.rows.append(row)
        while sum(old.num_bytes for old in self.rows) > self.most_bytes:
            del self.rows[0]

    def find(self, prompt: Sequence[int]) -> tuple[KeptRow, int] | None:
        """The row that a prompt has most in common with, and how many tokens; None if too few.

        At least the prompt's last token is left to be read: what follows it is asked for.
        """
        prompt, best, most = list(prompt[:-1]), None, WORTH_KEEPING - 1
        for row in self.rows:
            # One comparison of slices tells whether it has more in common than the best so far.
            if len(row.ids) > most < len(prompt) and row.ids[: most + 1] == prompt[: most + 1]:
                best, most = row, _common(row.ids, prompt, most + 1)
        if best is None:
            return None
        self.rows = [*(row for row in self.rows if row is not best), best]
        return best, most

    def count(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens need not be read."""
        found = self.find(prompt)
        return 0 if found is None else found[1]

    def clear(self) -> None:
        """Give the memory back."""
        self.rows = []

    def check(self, model: torch.nn.Module) -> None:
        """Forget everything if the model's weights are others than at the last call."""
        weights = tuple(
            # torch counts the changes of a tensor, but not of one that is of inference.
            (part.data_ptr(), 0 if part.is_inference() else part._version)
            for part in model.parameters()
        )
        if weights != self._weights:
            self.clear()
        self._weights = weights


def _common(first: list[int], second: list[int], known: int) -> int:
    """How many ids two lists begin with in common; `known` of them are known to be."""
    low, high = known, min(len(first), len(second))
    while low < high:  # comparing slices is far quicker than a loop over ids
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
