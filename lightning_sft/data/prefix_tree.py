"""What the rows of a batch have in common: their prefix tree, without a loop over tokens.

In a prefix tree a token is a child of the one before it, and rows that begin alike walk one path
until they part. Each row adds to it what it does not share with any row before it. Among sorted
rows one shares most with its neighbours, so comparing neighbours is enough, and numpy compares
them all at once; Python only goes from row to row.

    >>> find_shared(side_by_side([[1, 2, 3], [7], [1, 2, 9]])[0])[0].tolist()
    [0, 0, 2]

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NO_TOKEN = -1  # fills short rows up; no tokenizer has it

Ids = Sequence[int] | npt.NDArray[np.integer]


def side_by_side(
    rows: Sequence[Ids], width: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of ids as one matrix.

    Args:
        width: Columns; by default as many as the longest row needs.

    Returns:
        (B, T) the ids, `NO_TOKEN` behind each row's end, and (B,) how long each row is.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    matrix = np.full((len(rows), int(lengths.max()) if width is None else width), NO_TOKEN)
    for line, row, length in zip(matrix, rows, lengths.tolist(), strict=True):
        line[:length] = row
    return matrix, lengths


def find_shared(matrix: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """How much of each row stands at the beginning of a row above it.

    Args:
        matrix: (B, T) as `side_by_side` makes it.

    Returns:
        (B,) tokens of the longest such beginning, and for each row the one above that has it; for
        a row that shares nothing, any row or -1. Of a row that is there twice the filling counts
        as shared, too.
    """
    count, width = matrix.shape
    if not width:
        return np.zeros(count, np.int64), [-1] * count
    # Comparing bytes sorts the tokens in an order of its own, which is as good as any.
    keys = [line.tobytes() for line in matrix]
    order = sorted(range(count), key=keys.__getitem__)
    ordered = matrix[order]
    differs = ordered[1:] != ordered[:-1]  # (B - 1, T)
    first = differs.argmax(axis=1)
    common = np.where(differs[np.arange(count - 1), first], first, width).tolist()
    # The sorted rows as a chain, each with what it shares with its neighbours in it.
    left, right = [-1] * count, [-1] * count
    with_left, with_right = [0] * count, [0] * count
    for above, below, length in zip(order[:-1], order[1:], common, strict=True):
        right[above], left[below] = below, above
        with_right[above] = with_left[below] = length
    shared, donors = [0] * count, [-1] * count
    # Taken out of the chain from the last row to the first, a row's neighbours are, at its turn,
    # the nearest among the rows above it.
    for row in range(count - 1, -1, -1):
        before, behind, one, other = left[row], right[row], with_left[row], with_right[row]
        shared[row], donors[row] = (one, before) if one >= other else (other, behind)
        # Two rows share what all neighbours between them share.
        if before >= 0:
            right[before], with_right[before] = behind, min(one, other)
        if behind >= 0:
            left[behind], with_left[behind] = before, min(one, other)
    return np.array(shared, np.int64), donors


def count_tree(rows: Sequence[Ids]) -> int:
    """Tokens of the prefix tree of some rows: each distinct prefix is computed once."""
    matrix, lengths = side_by_side(rows)
    shared, _ = find_shared(matrix)
    return int((lengths - np.minimum(shared, lengths)).sum())
