"""Near-twins: the pairs of scikit-learn's brute force, whatever is left out before comparing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.common.errors import InputError
from lightning_sft.data import near_duplicates
from lightning_sft.data.entries import Entry, split_entries
from lightning_sft.data.near_duplicates import Twins, comparison_text, find_twins

ENTRIES = [
    "What is the capital of Italy?",
    "What is the capital of Italy",
    "what is the capital of italy?",
    "Name the main verb: the cat sleeps on the couch.",
    "Name the main verb: the cat sleeps on a couch.",
    "Convert 45 kilometers to meters.",
]


def entry_pairs(twins: Twins) -> set[tuple[int, int]]:
    """All pairs of entries that are alike, those of equal texts among them."""
    holders: dict[int, list[int]] = {}
    for place, text in enumerate(twins.text_of.tolist()):
        holders.setdefault(text, []).append(place)
    pairs = {pair for places in holders.values() for pair in combinations(places, 2)}
    for first, second in zip(twins.first.tolist(), twins.second.tolist(), strict=True):
        pairs |= {(min(a, b), max(a, b)) for a in holders[first] for b in holders[second]}
    return pairs


def brute_force(texts: Sequence[str], threshold: float) -> set[tuple[int, int]]:
    """As the book compares them: every text with every other."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit_transform(texts)
    first, second = np.nonzero(np.triu(cosine_similarity(vectors) >= threshold - 1e-9, k=1))
    return set(zip(first.tolist(), second.tolist(), strict=True))


@pytest.mark.parametrize("threshold", [0.7, 0.9, 1.0])
def test_the_books_pairs_on_the_chapters_data(book_entries: list[Entry], threshold: float) -> None:
    texts = [comparison_text(entry) for entry in book_entries]
    twins = find_twins(texts, threshold)
    assert entry_pairs(twins) == brute_force(texts, threshold)
    assert len(twins.first) > 0 or threshold == 1
    assert ((twins.similarity >= threshold - 1e-9) & (twins.similarity <= 1)).all()


def test_entries_of_the_chapter_with_a_twin_in_train(book_entries: list[Entry]) -> None:
    assert [len(part) for part in split_entries(book_entries)] == [935, 110, 55]
    pairs = entry_pairs(find_twins([comparison_text(entry) for entry in book_entries], 0.9))
    leaking = {second for first, second in pairs if first < 935 <= second}
    assert len([place for place in leaking if place < 1045]) == 6
    assert len([place for place in leaking if place >= 1045]) == 7


@given(
    st.lists(st.text("abc 1", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=40),
    st.sampled_from([0.5, 0.6, 0.75, 0.9, 0.97]),
)
def test_nothing_is_missed(texts: list[str], threshold: float) -> None:
    assert entry_pairs(find_twins(texts, threshold)) == brute_force(texts, threshold)


def test_blocks_change_nothing(book_entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [comparison_text(entry) for entry in book_entries]
    whole = find_twins(texts, 0.9)
    monkeypatch.setattr(near_duplicates, "BOUNDS", 5_000)
    monkeypatch.setattr(near_duplicates, "COMPARED", 7)
    pieces = find_twins(texts, 0.9)
    assert entry_pairs(pieces) == entry_pairs(whole)
    assert len(pieces.first) == len(whole.first)  # none of them twice


def test_a_bound_that_is_too_low_misses_pairs(
    book_entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: pairs are found because the bound holds, not because it leaves out none."""
    texts = [comparison_text(entry) for entry in book_entries]
    measure = near_duplicates._measure_groups
    monkeypatch.setattr(near_duplicates, "_measure_groups", lambda v: 0.97 * measure(v))
    assert entry_pairs(find_twins(texts, 0.9)) < brute_force(texts, 0.9)


def test_few_pairs_are_left_to_compare(
    book_entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0
    compare = near_duplicates._compare

    def count(vectors: Any, first: Any, second: Any, threshold: float) -> Any:
        nonlocal compared
        compared += len(first)
        return compare(vectors, first, second, threshold)

    monkeypatch.setattr(near_duplicates, "_compare", count)
    found = len(find_twins([comparison_text(entry) for entry in book_entries], 0.9).first)
    assert found <= compared <= 10 * found  # of 575,128 pairs


def test_equal_but_for_case_is_one_text() -> None:
    twins = find_twins(ENTRIES, 0.9)
    assert twins.text_of.tolist() == [0, 1, 0, 2, 3, 4]
    assert entry_pairs(twins) == {(0, 1), (0, 2), (1, 2), (3, 4)}


def test_only_the_prompt_is_compared() -> None:
    assert comparison_text(Entry("Add.", "2 and 2", "Four.")) == "Add.\n2 and 2"
    assert comparison_text(Entry("Add.", "", "Four.")) == "Add."


@pytest.mark.parametrize("threshold", [0.49, 1.01, -1.0, float("nan")])
def test_thresholds_that_are_none(threshold: float) -> None:
    with pytest.raises(InputError, match=r"threshold: .* is not from 0\.5 to 1"):
        find_twins(ENTRIES, threshold)


def test_far_too_many_pairs_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MOST_PAIRS", 1)
    with pytest.raises(InputError, match=r"over 1 pairs are alike at 0\.6"):
        find_twins([f"Multiply the number {n} by itself, please" for n in range(9)], 0.6)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(InputError, match=r"needs scikit-learn: pip install .*prepare"):
        find_twins(ENTRIES, 0.9)
