"""What twins mean for splits, on graphs of twins made by hand and by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.near_duplicates import Twins
from lightning_sft.data.twin_groups import (
    TEST,
    TRAIN,
    VAL,
    find_duplicates,
    find_groups,
    find_leaking,
    find_nearest,
    regroup,
)


def make_twins(text_of: list[int], pairs: list[tuple[int, int, float]]) -> Twins:
    first, second, similarity = zip(*pairs, strict=True) if pairs else ((), (), ())
    return Twins(
        np.array(text_of, np.int64),
        np.array(first, np.int64),
        np.array(second, np.int64),
        np.array(similarity, np.float64),
    )


# Texts 0 to 5; entries 0 and 2 have one text, and 3 is like 0, 1 and 4.
TEXT_OF = [0, 1, 0, 2, 3, 4, 5]
TWINS = make_twins(TEXT_OF, [(0, 2, 0.95), (1, 2, 0.97), (2, 3, 0.91)])
SPLIT_OF = np.array([TRAIN, TRAIN, TRAIN, TEST, TEST, VAL, VAL])


def test_the_nearest_twin_among_others() -> None:
    nearest = find_nearest(TWINS, SPLIT_OF == TRAIN)
    assert nearest.place.tolist() == [2, -1, 0, 1, -1, -1, -1]  # 1 and 4 know 3 alone
    assert nearest.similarity.tolist() == [1, 0, 1, 0.97, 0, 0, 0]
    nearest = find_nearest(TWINS, SPLIT_OF == TEST)
    assert nearest.place.tolist() == [3, 3, 3, 4, 3, -1, -1]
    assert nearest.similarity.tolist() == [0.95, 0.97, 0.95, 0.91, 0.91, 0, 0]


def test_groups_are_chains() -> None:
    groups = find_groups(TWINS).tolist()
    assert len(set(groups[:5])) == 1
    assert len(set(groups)) == 3


def test_what_is_left_out() -> None:
    assert find_leaking(TWINS, SPLIT_OF).tolist() == [True] * 3 + [False] * 4
    assert np.flatnonzero(find_duplicates(TWINS, SPLIT_OF)).tolist() == [2]
    # A chain, each like the next: 1 goes for 0, and 2 stays since 1 is gone.
    chain = make_twins([0, 1, 2, 3], [(0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.9)])
    left_out = find_duplicates(chain, np.array([TRAIN] * 4))
    assert left_out.tolist() == [False, True, False, True]


def test_a_group_moves_whole_and_others_take_its_places() -> None:
    twins = make_twins([*range(10)], [(0, 7, 0.95), (6, 8, 0.95)])
    split_of = np.array([TRAIN] * 6 + [TEST] * 2 + [VAL] * 2)
    moved = regroup(twins, split_of)
    # 7 goes to its twin 0; 8 to its twin 6 in test, so test is whole; 5 makes up for it in val.
    assert moved.tolist() == [TRAIN] * 5 + [VAL, TEST, TRAIN, TEST, VAL]


def test_without_twins_nothing_moves() -> None:
    split_of = np.array([TRAIN] * 5 + [TEST] * 2 + [VAL])
    assert regroup(make_twins([*range(8)], []), split_of).tolist() == split_of.tolist()


@st.composite
def graphs(draw: Any) -> tuple[Twins, np.ndarray]:
    """Entries, half of them without twins, in three splits one after the other."""
    count = draw(st.integers(6, 40))
    text_of = [*draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))]
    numbers: dict[int, int] = {}
    text_of = [numbers.setdefault(text, len(numbers)) for text in text_of]
    texts = len(numbers)
    place = st.integers(0, texts - 1)
    pairs = {(a, b) for a, b in draw(st.lists(st.tuples(place, place), max_size=12)) if a < b}
    lonely = [texts + n for n in range(count)]
    twins = make_twins(draw(st.permutations([*text_of, *lonely])), [(a, b, 0.95) for a, b in pairs])
    cuts = sorted(draw(st.tuples(st.integers(1, count - 2), st.integers(1, count - 2))))
    train = 2 * count - sum(cuts)
    return twins, np.repeat([TRAIN, TEST, VAL], [train, *cuts])


@given(graphs())
def test_no_group_is_parted(graph: tuple[Twins, np.ndarray]) -> None:
    twins, split_of = graph
    moved = regroup(twins, split_of)
    groups = find_groups(twins)
    assert all(len(set(moved[groups == group].tolist())) == 1 for group in set(groups.tolist()))
    nearest = find_nearest(twins, moved == TRAIN)
    assert (nearest.place[moved != TRAIN] < 0).all()
    alone = np.bincount(groups)[groups] == 1
    sizes, before = np.bincount(moved, minlength=3), np.bincount(split_of, minlength=3)
    # No evaluation split has shrunk while somebody was left who could move up.
    assert (sizes[1:] >= before[1:]).all() or not (alone & (moved == TRAIN)).any()


@given(graphs())
def test_who_is_left_out_has_a_twin_that_stays(graph: tuple[Twins, np.ndarray]) -> None:
    twins, split_of = graph
    left_out = find_duplicates(twins, split_of)
    stays = (split_of == TRAIN) & ~left_out
    nearest = find_nearest(twins, stays)
    assert (nearest.place[left_out] >= 0).all()
    assert (nearest.place[stays] < 0).all()
    leaking = find_leaking(twins, split_of)
    kept = (split_of == TRAIN) & ~leaking
    assert (find_nearest(twins, kept).place[split_of != TRAIN] < 0).all()
