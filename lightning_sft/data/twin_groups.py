"""What twins mean for the splits: who has one where, what to leave out, and splits without leaks.

An evaluation entry with a twin in train is a near-leak: the model was trained on almost the same
question. Entries are numbered through all three splits, train first, then test, then validation.

    >>> places = np.concatenate([np.full(len(part), n) for n, part in enumerate(splits)])
    >>> nearest = find_nearest(twins, places == TRAIN)
    >>> int((nearest.place[places == TEST] >= 0).sum())  # test entries with a twin in train
    6

This module does not import torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_sft.data.near_duplicates import Figures, Places, Twins

TRAIN, TEST, VAL = range(3)  # as in `Splits`

Mask = npt.NDArray[np.bool_]


class Nearest(NamedTuple):
    """For each entry its most similar twin among some others.

    place: Of the twin; -1 where there is none. Shape (N,).
    similarity: Their cosine; 0 where there is none. Shape (N,).
    """

    place: Places
    similarity: Figures


def find_nearest(twins: Twins, members: Mask) -> Nearest:
    """For each entry its most similar twin among the `members`, itself left out. Shapes (N,)."""
    own = _first_two(twins.text_of, members)
    first, second = own[:, twins.text_of]
    numbers = np.arange(len(members))
    place = np.where(first == numbers, second, first)  # another entry with the same text
    similarity = (place >= 0).astype(np.float64)
    texts, others, cosines = _both_ways(twins)
    held = own[0, others] >= 0
    order = np.lexsort((cosines[held], texts[held]))
    best = np.full((2, own.shape[1]), -1.0)  # of each text: the other text, and the cosine
    # Of several values for one place numpy keeps the last, which is the most similar.
    best[0, texts[held][order]] = others[held][order]
    best[1, texts[held][order]] = cosines[held][order]
    other, cosine = best[:, twins.text_of]
    lacking = (place < 0) & (other >= 0)
    place[lacking] = own[0, other[lacking].astype(np.int64)]
    similarity[lacking] = cosine[lacking]
    return Nearest(place, similarity)


def find_groups(twins: Twins) -> Places:
    """The number of each entry's group: all that a chain of twins connects. Shape (N,)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    texts = int(twins.text_of.max()) + 1
    links = np.ones(len(twins.first), np.int8)
    graph = coo_matrix((links, (twins.first, twins.second)), shape=(texts, texts))
    _, labels = connected_components(graph, directed=False)
    return labels[twins.text_of].astype(np.int64)


def find_duplicates(twins: Twins, split_of: Places) -> Mask:
    """The training entries with an earlier twin in train that stays. Shape (N,).

    In file order, and against entries that stay only: of a chain in which each entry is like the
    next, every second one stays, so that whatever is left out has a twin that is not.
    """
    alike: dict[int, list[int]] = {}
    texts, others, _ = _both_ways(twins)
    for text, other in zip(texts.tolist(), others.tolist(), strict=True):
        alike.setdefault(text, []).append(other)
    stays: set[int] = set()
    left_out = np.zeros(len(split_of), np.bool_)
    for place in np.flatnonzero(split_of == TRAIN).tolist():
        text = int(twins.text_of[place])
        if text in stays or not stays.isdisjoint(alike.get(text, ())):
            left_out[place] = True
        else:
            stays.add(text)
    return left_out


def find_leaking(twins: Twins, split_of: Places) -> Mask:
    """The training entries with a twin in test or validation. Shape (N,)."""
    nearest = find_nearest(twins, split_of != TRAIN)
    return (split_of == TRAIN) & (nearest.place >= 0)


def regroup(twins: Twins, split_of: Places) -> Places:
    """Splits of the same sizes that part no group of twins: the split of each entry, shape (N,).

    Little is moved, and nothing by chance. A group that lies in several splits goes to the first of
    train, test and validation that it is in; for the places that this leaves open, the last
    training entries without any twin move up. Where those are too few, the sizes differ.
    """
    groups = find_groups(twins)
    sizes = np.bincount(split_of, minlength=3)
    goes_to = np.full(int(groups.max()) + 1, VAL, np.int64)
    np.minimum.at(goes_to, groups, split_of)
    moved = goes_to[groups]
    is_alone = np.bincount(groups)[groups] == 1
    # Test may have won groups from validation, which entries of its own make up for; or lost some.
    surplus = int(np.sum(moved == TEST) - sizes[TEST])
    _move_last(moved, TEST, VAL, surplus, is_alone)
    _move_last(moved, TRAIN, TEST, -surplus, is_alone)
    _move_last(moved, TRAIN, VAL, int(sizes[VAL] - np.sum(moved == VAL)), is_alone)
    return moved


def _move_last(moved: Places, source: int, target: int, count: int, is_alone: Mask) -> None:
    """Move the last `count` entries without a twin from one split to another, in place."""
    if count > 0:
        moved[np.flatnonzero((moved == source) & is_alone)[-count:]] = target


def _both_ways(twins: Twins) -> tuple[Places, Places, Figures]:
    """Every pair twice, from either side: texts, the texts they are like, and the cosines."""
    return (
        np.concatenate([twins.first, twins.second]),
        np.concatenate([twins.second, twins.first]),
        np.concatenate([twins.similarity, twins.similarity]),
    )


def _first_two(text_of: Places, members: Mask) -> Places:
    """The first and the second member with each text, -1 where there is none. Shape (2, texts)."""
    found = np.full((2, int(text_of.max()) + 1), -1, np.int64)
    places = np.flatnonzero(members)[::-1]  # the last value that numpy writes is then the first
    found[0, text_of[places]] = places
    rest = places[found[0, text_of[places]] != places]
    found[1, text_of[rest]] = rest
    return found
