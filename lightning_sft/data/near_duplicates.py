"""Which entries ask nearly the same: TF-IDF over character n-grams, and the cosine of two texts.

The measure is that of the book's ch07/02: n-grams of 1 to 3 characters, weighed by scikit-learn's
TF-IDF. A cosine of 1 is the same text; above 0.9 two texts differ in a word or a number. The book
compares every pair. Here pairs that cannot reach the threshold are left out before they are
compared, by a bound and not by chance, so that the pairs found are the book's, at any size.

    >>> twins = find_twins([comparison_text(entry) for entry in entries], threshold=0.9)
    >>> len(twins.first)  # pairs of different texts
    217

**The bound.** Deal all n-grams into groups, and let each text's vector be as long in a group as its
n-grams there are together. By the inequality of Cauchy and Schwarz, group by group, two texts'
cosine is at most the product of their vectors of lengths. A few hundred groups make that one dense
matrix product for all pairs, which takes the same time whatever the texts are. The heaviest n-grams
have a group each, so that little is lost, and few pairs but the near ones are left to compare.

scikit-learn is imported when texts are compared and not before. This module does not import torch.

Source: ch07/02_dataset-utilities/find-near-duplicates.py of the book's repository.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_sft.common.errors import InputError
from lightning_sft.common.files import install_command
from lightning_sft.data.conversation import Example

LEAST_THRESHOLD = 0.5  # below it nearly everything is alike, and nothing can be left out
# Of the bound: half as many groups again as a text has different n-grams, so that two of one text
# seldom meet in a group. A quarter of the groups holds one n-gram each.
FEWEST_GROUPS, MOST_GROUPS, OWN_GROUP = 256, 1024, 0.25
FLOAT32 = 1e-4  # more than the rounding of a bound
ROUNDING = 1e-9  # of a cosine; equal texts come out as 0.9999999999
BOUNDS = 25_000_000  # computed at a time; 4 bytes each
COMPARED = 20_000  # pairs whose whole vectors are compared at a time
MOST_PAIRS = 20_000_000

Places = npt.NDArray[np.int64]
Figures = npt.NDArray[np.float64]


class Twins(NamedTuple):
    """Pairs of texts that are alike, each distinct text counted once.

    text_of: For each entry the number of its text; equal but for case is the same. Shape (N,).
    first, second: The two texts of each pair, `first < second`. Shape (P,).
    similarity: Their cosine, from the threshold to 1. Shape (P,).
    """

    text_of: Places
    first: Places
    second: Places
    similarity: Figures


def comparison_text(entry: Example) -> str:
    """What of an entry is compared: all that the user says, and not the answer."""
    return f"{entry.instruction}\n{entry.input}" if entry.input else entry.instruction


def find_twins(texts: Sequence[str], threshold: float) -> Twins:
    """All pairs of texts whose cosine is at least `threshold`.

    Args:
        threshold: From 0.5 to 1.

    Raises:
        InputError: Another threshold, more than 20 million pairs, or scikit-learn is missing.
    """
    if not LEAST_THRESHOLD <= threshold <= 1:
        raise InputError(f"threshold: {threshold} is not from {LEAST_THRESHOLD} to 1")
    vectors = _vectorize(texts)
    numbers: dict[str, int] = {}
    text_of = np.array([numbers.setdefault(text.lower(), len(numbers)) for text in texts], np.int64)
    _, first_places = np.unique(text_of, return_index=True)
    found: list[tuple[Places, Places, Figures]] = []
    for pairs in _search(vectors[first_places], threshold):
        found.append(pairs)
        if sum(len(first) for first, _, _ in found) > MOST_PAIRS:
            raise InputError(
                f"threshold: over {MOST_PAIRS:,} pairs are alike at {threshold:g}; the texts come "
                "from few templates, take a higher one"
            )
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    return Twins(text_of, columns[0], columns[1], columns[2])


def _vectorize(texts: Sequence[str]) -> Any:
    """Unit vectors of the texts, as the book makes them: a CSR matrix of float64 (N, n-grams)."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise InputError(
            f"comparing texts needs scikit-learn: {install_command('prepare')}"
        ) from None
    return TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit_transform(texts)


def _search(vectors: Any, threshold: float) -> Iterator[tuple[Places, Places, Figures]]:
    """The pairs of rows that reach the threshold, in pieces; at least one, which may be empty."""
    from tqdm import tqdm

    lengths = _measure_groups(vectors)
    count = len(lengths)
    rows = max(1, BOUNDS // count)
    # Silent where nobody watches.
    for begin in tqdm(range(0, count, rows), "Comparing", disable=None):
        # Rows before `begin` have met these already.
        bounds = lengths[begin : begin + rows] @ lengths[begin:].T
        # Flat, because numpy looks through one dimension fifty times as fast as through two.
        near = np.flatnonzero(bounds >= threshold - FLOAT32)
        first, second = np.divmod(near, count - begin)
        later = second > first
        yield _compare(vectors, first[later] + begin, second[later] + begin, threshold)


def _measure_groups(vectors: Any) -> npt.NDArray[np.float32]:
    """How long each row is in each group of n-grams. Shape (N, groups)."""
    from scipy.sparse import csr_matrix

    texts, grams = vectors.shape
    groups = min(max(3 * vectors.nnz // (2 * texts), FEWEST_GROUPS), MOST_GROUPS)
    squares = (vectors.data**2).astype(np.float32)
    weights = np.bincount(vectors.indices, weights=squares, minlength=grams)
    rank = np.empty(grams, np.int64)
    rank[np.argsort(-weights, kind="stable")] = np.arange(grams)
    own = int(OWN_GROUP * groups)
    group = np.where(rank < own, rank, own + (rank - own) % (groups - own))
    # Values with the same place are added up.
    sums = csr_matrix((squares, group[vectors.indices], vectors.indptr), shape=(texts, groups))
    return np.sqrt(sums.toarray())


def _compare(
    vectors: Any, first: Places, second: Places, threshold: float
) -> tuple[Places, Places, Figures]:
    """Those of the pairs of rows that reach the threshold, with their cosines."""
    cosines = [np.empty(0)]
    for begin in range(0, len(first), COMPARED):
        piece = slice(begin, begin + COMPARED)
        products = vectors[first[piece]].multiply(vectors[second[piece]])
        cosines.append(np.asarray(products.sum(axis=1)).ravel())
    cosine = np.concatenate(cosines)
    near = cosine >= threshold - ROUNDING
    return first[near], second[near], np.minimum(cosine[near], 1.0)
