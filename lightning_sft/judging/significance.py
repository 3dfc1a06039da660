"""How sure a number is: bootstrap intervals, the sign test, rank correlation, length control.

All of it is small arithmetic on a few hundred numbers, written out here with numpy alone: scipy
would do the same, but it takes a second to import and 110 MB to install, and `report` has to
answer in under a second. The tests compare every function with scipy or with published figures.

    >>> bootstrap_mean([80, 95, 20, 100]).low
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
# From 10,000 values on fewer resamples are drawn, so that time stays in bounds. Their own noise,
# 4 % of the interval's width at 1,000, is then nothing beside what anyone would read off it.
FEWEST_RESAMPLES, MOST_DRAWS = 1_000, 100_000_000
BLOCK = 1 << 20  # values drawn at a time
SEED = 123


class Interval(NamedTuple):
    """A mean with its 95 % interval. All three are NaN where there is nothing to average."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


class Signs(NamedTuple):
    """Pairs in which the second value is higher, equal or lower; p of the two-sided sign test."""

    higher: int
    equal: int
    lower: int
    p: float


class Correlation(NamedTuple):
    """Rank correlations of two judges, over as many `pairs` of scores as both gave."""

    spearman: float
    kendall: float
    pairs: int


def bootstrap_mean(
    values: Sequence[float], resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Mean of `values` with its percentile bootstrap interval, widened as small samples need.

    Plain percentiles are too narrow for few values, by a factor that is known: sqrt(n/(n-1)),
    because values scatter less around their own mean than around the true one, times Student's
    quantile over the normal one. From about 100 values on, both hardly matter.
    For a paired comparison, give the differences. The same values always give the same interval.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; Hesterberg,
    "What Teachers Should Know About the Bootstrap", 2015, section 5, for the widening.
    """
    sample = np.asarray(values, dtype=np.float64)
    n = sample.size
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(sample.mean())
    if n == 1 or np.ptp(sample) == 0:
        return Interval(mean, mean, mean)
    resamples = min(resamples, max(FEWEST_RESAMPLES, MOST_DRAWS // n))
    deviations = _resample_means(sample, resamples, seed) - mean
    widening = math.sqrt(n / (n - 1)) * _student_over_normal(n - 1)
    low, high = mean + widening * np.quantile(deviations, [0.025, 0.975])
    # A mean cannot leave the range of what it averages.
    return Interval(
        mean, max(float(low), float(sample.min())), min(float(high), float(sample.max()))
    )


def _resample_means(sample: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of as many samples with replacement, drawn in blocks; shape (resamples,)."""
    n, random = sample.size, np.random.default_rng(seed)
    rows = max(1, BLOCK // n)
    means = []
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), n)
        means.append(sample[random.integers(0, n, size=size, dtype=np.int32)].mean(axis=1))
    return np.concatenate(means)


def sign_test(first: Sequence[float], second: Sequence[float]) -> Signs:
    """Count the pairs in which `second` is higher or lower, and how surprising that split is.

    Ties are left out of the test, which asks nothing about the shape or the size of differences.

    Returns:
        The counts and the exact two-sided p, which is 1 when no pair differs.
    """
    higher = sum(b > a for a, b in zip(first, second, strict=True))
    lower = sum(b < a for a, b in zip(first, second, strict=True))
    n = higher + lower
    ways = tail = 1  # of choosing n out of n, then n - 1 out of n, …
    for k in range(n, max(higher, lower), -1):
        ways = ways * k // (n - k + 1)
        tail += ways
    # Integers all the way: 2**n overflows a float from n = 1024 on.
    p = min(1.0, 2 * tail / 2**n) if n else 1.0
    return Signs(higher, len(first) - n, lower, p)


def rank(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1; equal values share the mean of the ranks they span. Shape (n,), float64."""
    _, group, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def correlate(first: Sequence[float | None], second: Sequence[float | None]) -> Correlation:
    """Spearman's rho and Kendall's tau-b over the places where both have a score.

    Tau-b corrects for ties, of which judges give many (a third of GPT-4's scores are 0 or 100).
    Both are NaN where one side is constant: a judge that always says 80 correlates with nothing.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return Correlation(math.nan, math.nan, len(pairs))
    x, y = np.array(pairs, dtype=np.float64).T
    return Correlation(_pearson(rank(x), rank(y)), _kendall(x, y), len(pairs))


def correlate_with_gap(
    full: Sequence[float | None], short: Sequence[float | None]
) -> list[Correlation]:
    """Correlations where `short` lacks one score of an unknown entry: one for each candidate.

    A file that silently dropped one score no longer says whose score is whose. Every entry that
    may have been dropped is tried; the true figure is one of these, so their range bounds it.
    """
    if len(full) != len(short) + 1:
        raise ValueError(f"{len(short)} scores are not one fewer than {len(full)}")
    return [correlate([*full[:k], *full[k + 1 :]], short) for k in range(len(full))]


def length_controlled_win_rate(
    preferences: Sequence[float], first_lengths: Sequence[int], second_lengths: Sequence[int]
) -> float:
    """Win rate that the second model would have if its answers were as long as the first's.

    Fits `logit P(second is preferred) = theta + phi · tanh(Δlength / std(Δlength))` and reports
    the prediction at Δlength = 0, which is sigmoid(theta). This is AlpacaEval 2's definition with
    two differences: its term for the difficulty of each instruction is left out, since it comes
    from the answers of many other models to AlpacaEval's own instructions; and its cross-validated
    L1 penalty is a small fixed ridge, one pseudo-observation worth, which keeps the fit finite
    when one model wins everywhere.

    Args:
        preferences: 1 where the second is preferred, 0 where the first is, 0.5 for a tie.
        first_lengths: Length of each answer in characters; as for `second_lengths`.

    Returns:
        A share from 0 to 1; NaN without preferences.

    Source: Dubois et al., "Length-Controlled AlpacaEval", 2024, arXiv:2404.04475, section 3.
    """
    wanted = np.asarray(preferences, dtype=np.float64)
    if wanted.size == 0:
        return math.nan
    difference = np.asarray(second_lengths, dtype=np.float64) - np.asarray(first_lengths)
    spread = difference.std(ddof=1) if difference.size > 1 else 0.0
    longer = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    features = np.stack([np.ones_like(longer), longer], axis=1)  # (n, 2)
    weights = np.zeros(2)
    ridge = np.eye(2)
    for _ in range(100):  # Newton's method; the penalised loss is strictly convex
        predicted = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (predicted - wanted) + ridge @ weights
        curvature = (features.T * (predicted * (1 - predicted))) @ features + ridge
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def _student_over_normal(degrees: int) -> float:
    """Student's 97.5 % quantile over the normal one, by the series in 1/degrees.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5.
    """
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return 1 + (first / degrees + second / degrees**2 + third / degrees**3) / z


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Tau-b: pairs in the same order less those in the other, over the pairs that are not tied.

    Source: Knight, "A Computer Method for Calculating Kendall's Tau", 1966, which needs no table
    of all pairs.
    """
    n = len(x)
    swaps = 0
    seen: list[float] = []  # y values so far, in order
    for value in y[np.lexsort((y, x))].tolist():
        swaps += len(seen) - bisect.bisect_right(seen, value)
        bisect.insort(seen, value)
    pairs = n * (n - 1) // 2
    ties_x, ties_y, ties_both = (_count_ties(v) for v in (x, y, np.stack([x, y], axis=1)))
    untied = math.sqrt(float(pairs - ties_x) * float(pairs - ties_y))
    return (pairs - ties_x - ties_y + ties_both - 2 * swaps) / untied if untied else math.nan


def _count_ties(values: np.ndarray) -> int:
    """Pairs of equal values; equal rows of a matrix."""
    _, counts = np.unique(values, axis=0, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())
