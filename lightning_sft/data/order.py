"""Which rows come when: the seeded order of an epoch, cut into batches and dealt to ranks.

The permutation of epoch `e` equals what `DataLoader(shuffle=True)` yields after
`torch.manual_seed(seed)` when nothing else draws, so seed 123 gives the chapter's printed batch
shapes. It is computed with numpy's copy of the same random number generator. The training loader,
`inspect` and `plan` all take their batches from here, so they cannot disagree.

    >>> epoch_order(5, seed=123, epoch=0)
    [4, 2, 0, 1, 3]
    >>> BatchOrder(lengths, batch_size=8, seed=123).plan(epoch=0)[0]
    [[734, 11, 502, 90, 313, 8, 655, 71]]

Source: the `DataLoader`s of section 7.5 of "Build a Large Language Model (From Scratch)". This
module does not import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_sft.common.errors import InputError

# One micro-batch: for each rank the places of its rows. A negative place `~p` repeats row `p` to
# even out the ranks: the same tokens, no loss.
MicroBatch = list[list[int]]

GROUPED_BATCHES = 50  # batches that `group_by_length` sorts among themselves


class Stretch(NamedTuple):
    """Rows `begin` to `end - 1`, each of which an epoch takes so many times, on average."""

    begin: int
    end: int
    times: float

    @property
    def num_taken(self) -> int:
        """Rows of an epoch that are taken from here."""
        return round(self.times * (self.end - self.begin))


@dataclass(frozen=True)
class BatchOrder:
    """The micro-batches of every epoch, as a function of seed and epoch alone.

    Args:
        lengths: (rows,) tokens of each row; only `group_by_length` looks at them.
        batch_size: Rows a micro-batch on one rank.
        world_size: Ranks. Micro-batch `k` of all ranks together holds the entries
            `[k·R·B, (k+1)·R·B)` of the order; ranks take consecutive slices of it.
        drop_last: Leave out the last micro-batch if it is not full, as the chapter does.
        group_by_length: Rows of like length share a batch.
        stretches: How often an epoch takes which rows; every row once by default.

    Raises:
        InputError: The rows do not fill one micro-batch.
    """

    lengths: npt.NDArray[np.integer]
    batch_size: int
    seed: int
    world_size: int = 1
    drop_last: bool = True
    group_by_length: bool = False
    stretches: tuple[Stretch, ...] = ()

    def __post_init__(self) -> None:
        if not len(self):
            rows, together = self.num_rows, self.batch_size * self.world_size
            raise InputError(
                f"data.batch_size: {self.batch_size} on {self.world_size} device(s) needs at least "
                f"{together} training entries, there are {rows}; give a smaller batch_size or set "
                "data.drop_last to false"
            )

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(s.num_taken for s in self.stretches) if self.stretches else len(self.lengths)

    def __len__(self) -> int:
        """Micro-batches of an epoch; the same number for every rank."""
        together = self.batch_size * self.world_size
        rows = self.num_rows
        return rows // together if self.drop_last else -(-rows // together)

    def plan(self, epoch: int) -> list[MicroBatch]:
        """Places of the rows by micro-batch and rank. Ragged ends are filled with repeats."""
        order = epoch_order(self.num_rows, self.seed, epoch)
        if self.stretches:
            mixed = mix_rows(self.stretches, self.seed, epoch)
            order = [mixed[place] for place in order]
        together = self.batch_size * self.world_size
        batches = [order[k * together : (k + 1) * together] for k in range(len(self))]
        if self.group_by_length:
            batches = self._group(batches, epoch)
        return [deal(places, self.world_size) for places in batches]

    def _group(self, batches: list[list[int]], epoch: int) -> list[list[int]]:
        """Sort rows by length within windows of 50 batches, then shuffle the batches."""
        lengths, grouped = self.lengths.tolist(), []
        size = self.batch_size * self.world_size
        for begin in range(0, len(batches), GROUPED_BATCHES):
            window = itertools.chain.from_iterable(batches[begin : begin + GROUPED_BATCHES])
            rows = sorted(window, key=lengths.__getitem__)
            grouped += [rows[k : k + size] for k in range(0, len(rows), size)]
        # The short batch of an epoch stays last, where its optimizer step expects it.
        short = [batch for batch in grouped if len(batch) < size]
        full = [batch for batch in grouped if len(batch) == size]
        return [full[k] for k in epoch_order(len(full), self.seed + 1, epoch)] + short


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The places 0 to num_rows - 1 as epoch `epoch` takes them.

    A copy of two steps of torch's: each epoch a sampler draws a new seed, from which `randperm`
    exchanges each place with a random one behind it (the shuffle of Fisher and Yates). numpy's
    `RandomState` and torch's CPU generator are the same Mersenne Twister. Two million rows take
    0.3 s.
    """
    # Each iterator over a DataLoader draws two 64-bit seeds, and a 64-bit draw takes two words: of
    # the second seed, the sampler's, the generator uses the lower half.
    draws = _twister(seed, 4 * epoch + 4)
    words = _twister(int(draws[-1]), max(num_rows - 1, 0)).astype(np.int64)
    places = np.arange(max(num_rows - 1, 0))
    return _exchange(num_rows, places + words % (num_rows - places))


def mix_rows(stretches: Sequence[Stretch], seed: int, epoch: int) -> list[int]:
    """The rows of an epoch, stretch by stretch, those taken more than once as often as that.

    The rows of a stretch pass in one endless line, shuffled anew each time around. Each epoch takes
    the next ones, so that after a few all have come equally often.
    """
    rows: list[int] = []
    for number, stretch in enumerate(stretches, start=2):  # the seeds 0 and 1 on are batches'
        count, taken = stretch.end - stretch.begin, stretch.num_taken
        line: list[int] = []
        while len(line) < taken:
            around, place = divmod(epoch * taken + len(line), count)
            line += epoch_order(count, seed + number, around)[place : place + taken - len(line)]
        rows += [stretch.begin + row for row in line]
    return rows


def _exchange(num_rows: int, partners: npt.NDArray[np.int64]) -> list[int]:
    """Exchange place 0 with `partners[0]`, then place 1 with `partners[1]`, and so on.

    One exchange depends on an earlier one only where both touch a place, which is rare among many
    rows. numpy makes the exchanges up to the first such clash at once; the few thousand rows at
    the end, where clashes are frequent, are exchanged one by one.
    """
    order = np.arange(num_rows)
    first_touch = np.full(num_rows, num_rows)  # the earliest exchange of a block with that partner
    begin = 0
    while num_rows - begin > 4096:
        # Two of n exchanges out of N rows clash from about n = √N on, as birthdays do.
        here = np.arange(begin, begin + int(1.5 * (num_rows - begin) ** 0.5))
        there = partners[here]
        first_touch[there[::-1]] = here[::-1]  # of equal partners the first one is written last
        clash = (first_touch[there] < here) | (first_touch[here] < here)
        first_touch[there] = num_rows
        count = int(clash.argmax()) if clash.any() else len(here)
        here, there = here[:count], there[:count]
        order[here], order[there] = order[there], order[here]
        begin += count
    exchanged = order.tolist()
    for place, other in enumerate(partners[begin:].tolist(), begin):
        exchanged[place], exchanged[other] = exchanged[other], exchanged[place]
    return exchanged


def _twister(seed: int, count: int) -> npt.NDArray[np.uint32]:
    """The first 32-bit words that torch's CPU generator draws after `manual_seed(seed)`."""
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    return generator.randint(0, 1 << 32, size=count, dtype=np.uint32)


def deal(places: list[int], world_size: int) -> MicroBatch:
    """Cut places into one consecutive, equally long part per rank, filling up with repeats.

    A repeat of place `p` is written `~p`. One process needs no filling.
    """
    size = -(-len(places) // world_size)
    filled = places + [~places[-1]] * (size * world_size - len(places))
    return [filled[rank * size : (rank + 1) * size] for rank in range(world_size)]


def row_places(part: list[int]) -> list[int]:
    """The rows of one rank's share, repeats included: they are computed like any other."""
    return [place if place >= 0 else ~place for place in part]


def sum_batches(counts: npt.NDArray[np.integer], plan: Sequence[MicroBatch]) -> list[int]:
    """Sum a number of each row, such as its targets, over each micro-batch on all ranks.

    Args:
        counts: (rows,) the number of each row. Repeats are not counted again.
    """
    if not plan:
        return []
    sizes = [sum(map(len, parts)) for parts in plan]
    flat = itertools.chain.from_iterable(part for parts in plan for part in parts)
    places = np.fromiter(flat, np.int64, sum(sizes))
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    return np.add.reduceat(np.where(places >= 0, counts[places], 0), starts).tolist()


def sum_steps(batch_counts: Sequence[int], accumulate: int) -> list[int]:
    """For each micro-batch the sum over the optimizer step that it belongs to.

    The last step of an epoch is shorter where `accumulate` does not divide the micro-batches.
    """
    starts = range(0, len(batch_counts), accumulate)
    steps = [sum(batch_counts[k : k + accumulate]) for k in starts]
    return [steps[k // accumulate] for k in range(len(batch_counts))]
