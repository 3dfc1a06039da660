"""Micro-batches of a number of tokens instead of a number of rows (`data.max_tokens`).

Long rows get small batches and short rows large ones, so that every step costs about the same and
a device's memory is used whatever the lengths are. How rows of which lengths share a batch is
settled once, from the seed: an epoch then has the same number of batches each time, and batches of
the same sizes. What an epoch shuffles is which rows of a length take its places, and which batch
comes when. The loss is what it is for any cut: a step's sum over its tokens.

    >>> TokenBudgetOrder(lengths, max_tokens=2048, seed=123).plan(epoch=0)[0]
    [[734, 11, 502]]

This module does not import torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_sft.common.errors import InputError
from lightning_sft.data.order import MicroBatch, epoch_order

OPEN_BATCHES = 32  # that a row may still be added to while batches are filled


@dataclass(frozen=True)
class TokenBudgetOrder:
    """The micro-batches of every epoch, as a function of seed and epoch alone.

    Args:
        lengths: (rows,) tokens of each row as it is computed, at most `max_tokens`.
        max_tokens: Most tokens of a micro-batch on one rank.
        world_size: Ranks. Those of one micro-batch get shares of nearly the same size.
        padded: Whether a row costs as much as the longest of its share.
        largest_first: The largest micro-batch opens each epoch, so that a run which does not fit
            the memory fails at once.

    Raises:
        InputError: A row has more tokens than that, or there are fewer rows than ranks.
    """

    lengths: npt.NDArray[np.integer]
    max_tokens: int
    seed: int
    world_size: int = 1
    padded: bool = True
    largest_first: bool = False

    def __post_init__(self) -> None:
        longest = int(self.lengths.max(initial=0))
        if longest > self.max_tokens:
            raise InputError(
                f"data.max_tokens: {self.max_tokens} is less than the {longest} tokens of the "
                f"longest row (row {int(self.lengths.argmax())} of training); raise it, or lower "
                "data.max_length"
            )
        if len(self.lengths) < self.world_size:
            raise InputError(
                f"data.max_tokens: {self.world_size} devices need as many training rows, there "
                f"are {len(self.lengths)}"
            )

    def __len__(self) -> int:
        """Micro-batches of an epoch; the same number for every rank and epoch."""
        return len(self._shares) // self.world_size

    def plan(self, epoch: int) -> list[MicroBatch]:
        """Places of the rows by micro-batch and rank."""
        rows = self._rows_by_slot(epoch)
        size = self.world_size
        shares = [
            [int(rows[slot]) if slot >= 0 else ~int(rows[~slot]) for slot in slots]
            for slots in self._shares
        ]
        batches = [shares[k : k + size] for k in range(0, len(shares), size)]
        order = epoch_order(len(batches), self.seed + 1, epoch)
        if self.largest_first:  # the shares are sorted, so the first batch is the largest
            order.remove(0)
            order.insert(0, 0)
        return [batches[place] for place in order]

    def _rows_by_slot(self, epoch: int) -> npt.NDArray[np.intp]:
        """(rows,) which row takes each slot: one of the slot's own length."""
        shuffled = np.array(epoch_order(len(self.lengths), self.seed, epoch))
        # Sorted by length, rows of a length in the epoch's order; the same for the slots.
        rows = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
        taken = np.empty(len(rows), np.intp)
        taken[np.argsort(self.lengths, kind="stable")] = rows
        return taken

    @functools.cached_property
    def _shares(self) -> list[npt.NDArray[np.intp]]:
        """The slots of each rank's share, the largest shares first: ranks that work together take
        neighbours. A slot stands for the row of that place, or any other of its length."""
        shares = self._fill_padded() if self.padded else self._fill_packed()
        size = self.world_size
        while len(shares) % size:
            most = max(range(len(shares)), key=lambda place: len(shares[place]))
            if len(shares[most]) == 1:  # one row a batch: a repeat, without loss, evens out
                shares.append(~min(shares, key=self._cost))
                continue
            whole = shares.pop(most)
            shares += [whole[0::2], whole[1::2]]
        shares = sorted(shares, key=self._cost, reverse=True)
        groups = [self._even_out(shares[k : k + size]) for k in range(0, len(shares), size)]
        groups.sort(key=lambda group: max(map(self._cost, group)), reverse=True)
        return [share for group in groups for share in group]

    def _even_out(self, group: list[npt.NDArray[np.intp]]) -> list[npt.NDArray[np.intp]]:
        """The shares of one micro-batch, its rows dealt such that none has much more to do."""
        slots = np.concatenate(group)
        if len(group) == 1 or (slots < 0).any():
            return group
        slots = slots[np.argsort(-self.lengths[slots], kind="stable")]
        if self.padded:
            dealt = np.array_split(slots, len(group))
        else:  # each row, the longest first, to whoever has least
            loads, parts = [0] * len(group), [[] for _ in group]  # type: ignore[var-annotated]
            for slot in slots.tolist():
                least = loads.index(min(loads))
                loads[least] += int(self.lengths[slot])
                parts[least].append(slot)
            dealt = [np.array(part, np.intp) for part in parts]
        if not all(map(len, dealt)):
            return group
        return min(dealt, group, key=lambda shares: max(map(self._cost, shares)))

    def _cost(self, slots: npt.NDArray[np.intp]) -> int:
        """Tokens that a share computes."""
        lengths = self.lengths[np.where(slots >= 0, slots, ~slots)]
        return int(lengths.max() * len(lengths) if self.padded else lengths.sum())

    def _fill_padded(self) -> list[npt.NDArray[np.intp]]:
        """Rows of like length share a batch: what is padded is computed, too."""
        slots = np.argsort(-self.lengths, kind="stable")
        shares, begin = [], 0
        while begin < len(slots):
            count = self.max_tokens // max(int(self.lengths[slots[begin]]), 1)
            shares.append(slots[begin : begin + count])
            begin += count
        return shares

    def _fill_packed(self) -> list[npt.NDArray[np.intp]]:
        """Each slot, in a random order, into the first open batch that has room for it."""
        finished: list[list[int]] = []
        opened: list[list[int]] = []
        room: list[int] = []
        for slot in epoch_order(len(self.lengths), self.seed, 0):
            length = int(self.lengths[slot])
            place = next((k for k, tokens in enumerate(room) if tokens >= length), len(room))
            if place == len(room):
                opened.append([])
                room.append(self.max_tokens)
            opened[place].append(slot)
            room[place] -= length
            if len(room) > OPEN_BATCHES:  # the fullest has the least to hope for
                fullest = room.index(min(room))
                room.pop(fullest)
                finished.append(opened.pop(fullest))
        return [np.array(share, np.intp) for share in (*finished, *opened)]
