"""The order of an epoch's rows, and what rows share: numbers alone.

The permutation of epoch `e` equals what `DataLoader(shuffle=True)` yields after
`torch.manual_seed(seed)` when nothing else draws, so seed 123 gives the chapter's printed batch
shapes. It is computed with numpy's copy of the same random number generator, for the training
loader and for the commands that must not import torch alike.

    >>> epoch_order(5, seed=123, epoch=0)
    [4, 2, 0, 1, 3]

This module does not import torch.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """`loader.epoch_order` without torch, whose CPU generator is the same Mersenne Twister."""
    draws = _twister(seed, 4 * epoch + 4)  # each of the 2·epoch + 2 draws takes two words
    order_seed = int(draws[-1])  # of a 64-bit seed the generator takes the lower half
    order = list(range(num_rows))
    for place, word in enumerate(_twister(order_seed, max(num_rows - 1, 0)).tolist()):
        other = place + word % (num_rows - place)
        order[place], order[other] = order[other], order[place]
    return order


def _twister(seed: int, count: int) -> npt.NDArray[np.uint32]:
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    return generator.randint(0, 1 << 32, size=count, dtype=np.uint32)


def count_tree(sequences: list[list[int]]) -> int:
    """Tokens of the prefix tree of some rows: each distinct prefix is computed once."""
    ordered = sorted(sequences)
    shared = sum(_common(left, right) for left, right in itertools.pairwise(ordered))
    return sum(map(len, ordered)) - shared


def _common(left: list[int], right: list[int]) -> int:
    """Length of the prefix that two rows share."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))
