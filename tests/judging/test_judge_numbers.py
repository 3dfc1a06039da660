"""Intervals, tests, correlations and metrics, held to other people's implementations."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest

from lightning_sft.judging import metrics, significance
from lightning_sft.judging.metrics import METRICS, chrf, exact_match, measure, rouge_l, token_f1
from lightning_sft.judging.significance import (
    bootstrap_mean,
    correlate,
    correlate_with_gap,
    length_controlled_win_rate,
    rank,
    sign_test,
)


def books_answers() -> list[tuple[str, str]]:
    data = os.environ.get("LIGHTNING_SFT_BOOK_DATA")
    if not data:
        pytest.skip("LIGHTNING_SFT_BOOK_DATA does not name the book's data")
    path = Path(data).with_name("instruction-data-with-response.json")
    return [(row["model_response"], row["output"]) for row in json.loads(path.read_text())]


def test_bootstrap_is_exact_where_nothing_varies():
    assert bootstrap_mean([3.0, 3.0, 3.0]) == (3, 3, 3)
    assert bootstrap_mean([7.0]) == (7, 7, 7)
    assert math.isnan(bootstrap_mean([]).mean)


def test_bootstrap_agrees_with_the_t_interval_on_normal_values():
    """Where the textbook's interval is right, both are the same but for resampling noise."""
    values = np.random.default_rng(1).normal(10, 2, size=200)
    found = bootstrap_mean(values)
    half = 1.9720 * values.std(ddof=1) / math.sqrt(200)  # Student's 97.5 % quantile, 199 degrees
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap_mean(values) == found  # the same values, the same interval


@pytest.mark.parametrize("n", [2, 110, 999, 3000])
def test_bootstrap_in_blocks_is_the_same_to_the_bit(n, monkeypatch):
    values = np.random.default_rng(n).normal(50, 20, n).round(2)
    picks = np.random.default_rng(significance.SEED).integers(0, n, (10_000, n), dtype=np.int32)
    at_once = values[picks].mean(axis=1)
    for block in (1, 70_000, significance.BLOCK):
        monkeypatch.setattr(significance, "BLOCK", block)
        blocks = significance._resample_means(values, 10_000, significance.SEED)
        assert np.array_equal(blocks, at_once)


def test_bootstrap_of_many_values_draws_a_bounded_number(monkeypatch):
    drawn = []
    means = significance._resample_means
    monkeypatch.setattr(
        significance, "_resample_means", lambda v, n, seed: (drawn.append(n), means(v, n, seed))[1]
    )
    values = np.random.default_rng(1).normal(10, 2, 20_000)
    found = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(20_000)
    assert found.low == pytest.approx(values.mean() - half, abs=half / 10)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 10)
    bootstrap_mean(values[:110])
    monkeypatch.setattr(significance, "MOST_DRAWS", 1_000_000)
    bootstrap_mean(values)
    assert drawn == [5_000, 10_000, 1_000]


@pytest.mark.parametrize(("n", "runs", "width"), [(110, 800, 0.022), (30, 800, 0.022)])
def test_interval_covers_at_the_nominal_rate(n, runs, width):
    """Paired differences like real ones: mostly ties, some large, not symmetric."""
    rng = np.random.default_rng(0)
    population = np.concatenate(
        [np.zeros(400), rng.normal(-15, 20, 300), rng.normal(60, 30, 150), np.full(150, -50)]
    )
    hits = 0
    for run in range(runs):
        found = bootstrap_mean(rng.choice(population, n), resamples=600, seed=run)
        hits += found.low <= population.mean() <= found.high
    # Three standard errors of a share of 0.95 over 800 runs are 0.023.
    assert hits / runs == pytest.approx(0.95, abs=width)


def test_negative_control_half_the_interval_does_not_cover():
    rng = np.random.default_rng(0)
    hits = 0
    for run in range(200):
        found = bootstrap_mean(rng.normal(size=50), resamples=300, seed=run)
        hits += abs(found.mean) <= (found.high - found.low) / 4
    assert hits / 200 < 0.85


def test_sign_test_by_hand():
    # 8 up, 2 down, 1 tie: 2 · (C(10,8) + C(10,9) + C(10,10)) / 2^10 = 112/1024
    first = [0] * 11
    second = [1] * 8 + [-1] * 2 + [0]
    assert sign_test(first, second) == (8, 1, 2, 112 / 1024)
    assert sign_test([1, 2], [1, 2]) == (0, 2, 0, 1.0)
    assert sign_test([0] * 3000, [1] * 3000).p == 0.0  # and no overflow


def test_ranks_and_correlations_by_hand():
    assert rank([10, 20, 20, 5]).tolist() == [2, 3.5, 3.5, 1]
    assert correlate([1, 2, 3], [10, 20, 30])[:2] == pytest.approx((1, 1))
    assert correlate([1, 2, 3], [3, 2, 1])[:2] == pytest.approx((-1, -1))
    assert correlate([1, None, 3, 4], [1, 2, None, 9]).pairs == 2
    assert math.isnan(correlate([1, 2, 3], [80, 80, 80]).spearman)
    assert math.isnan(correlate([1], [1]).kendall)


def test_correlations_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    for _ in range(20):
        x, y = rng.integers(0, 6, size=(2, 40))  # many ties, as judges give
        found = correlate(x.tolist(), y.tolist())
        assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0])
        assert found.kendall == pytest.approx(stats.kendalltau(x, y)[0])
        signs = sign_test(x.tolist(), y.tolist())
        if signs.higher + signs.lower:
            expected = stats.binomtest(signs.higher, signs.higher + signs.lower).pvalue
            assert signs.p == pytest.approx(expected)


@pytest.mark.timeout(60)
def test_a_hundred_thousand_pairs_take_no_table_of_all_pairs():
    scores = np.random.default_rng(1).integers(0, 100, 100_000)
    assert correlate(scores, scores).kendall == 1.0
    assert correlate(scores, -scores).kendall == -1.0
    assert sign_test([0] * 100_000, [1] * 50_500 + [-1] * 49_500).p == pytest.approx(
        0.0015824, 1e-4
    )


def test_longest_common_subsequence_agrees_with_the_table():
    rng = random.Random(1)
    for _ in range(200):
        first, second = (rng.choices("abcd", k=rng.randrange(90)) for _ in range(2))
        row = [0] * (len(second) + 1)
        for word in first:
            before = row
            row = [0]
            for j, other in enumerate(second):
                row.append(before[j] + 1 if word == other else max(row[j], before[j + 1]))
        assert metrics._longest_common_subsequence(first, second) == row[-1]


def test_gap_is_tried_everywhere():
    found = correlate_with_gap([1, 2, 3, 4, 99], [1, 2, 3, 4])
    assert found[4].spearman == 1.0
    assert len(found) == 5
    with pytest.raises(ValueError, match="not one fewer"):
        correlate_with_gap([1, 2], [1, 2])


def test_length_control_takes_the_length_out():
    """Planted: longer answers are preferred, and nothing else. Controlled, that is a draw."""
    rng = np.random.default_rng(5)
    first = rng.integers(50, 150, 600)
    second = first + rng.integers(-20, 120, 600)  # longer most of the time
    longer = 1 / (1 + np.exp(-(second - first) / 20))
    preferred = (rng.random(600) < longer).astype(float)
    raw = preferred.mean()
    controlled = length_controlled_win_rate(preferred, first, second)
    assert raw > 0.75
    assert controlled == pytest.approx(0.5, abs=0.1)


def test_length_control_leaves_quality_alone():
    rng = np.random.default_rng(6)
    preferred = (rng.random(600) < 0.7).astype(float)
    lengths = rng.integers(50, 150, (2, 600))
    controlled = length_controlled_win_rate(preferred, *lengths)
    assert controlled == pytest.approx(preferred.mean(), abs=0.02)


def test_length_control_agrees_with_a_general_optimizer():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(7)
    preferred = rng.choice([0, 0.5, 1], 80)
    first, second = rng.integers(5, 200, (2, 80))
    delta = second - first
    x = np.tanh(delta / delta.std(ddof=1))

    def loss(w):
        z = w[0] + w[1] * x
        return (np.logaddexp(0, z) - preferred * z).sum() + (w**2).sum() / 2

    theta = optimize.minimize(loss, np.zeros(2), method="BFGS").x[0]
    expected = 1 / (1 + math.exp(-theta))
    assert length_controlled_win_rate(preferred, first, second) == pytest.approx(expected, abs=1e-5)


def test_length_control_at_the_edges():
    assert length_controlled_win_rate([0.5] * 9, [3] * 9, [3] * 9) == 0.5
    assert 0.8 < length_controlled_win_rate([1] * 20, [3] * 20, [9] * 20) < 1  # finite when all win
    assert math.isnan(length_controlled_win_rate([], [], []))
    assert length_controlled_win_rate([1], [3], [9]) > 0.5


def test_metrics_by_hand():
    # Wanted 4 words, given 3 ("the" does not count), 2 shared: P 2/3, R 2/4, F1 4/7.
    assert token_f1("the red fox ran", "red fox sat down") == pytest.approx(100 * 4 / 7)
    assert exact_match("The fox.", "fox") == 100
    assert exact_match("fox", "foxes") == 0
    # Longest common subsequence "a c d" of 4 and 4 words.
    assert rouge_l("a b c d", "a c x d") == pytest.approx(75)
    assert chrf("same", "same") == pytest.approx(100)
    for metric in METRICS.values():
        assert metric("", "something") == 0
        assert metric("wanted", "wanted") == pytest.approx(100)
    assert token_f1("...", "!!!") == 100  # both say nothing
    assert rouge_l("мир", "мир") == 0  # rouge-score's words are Latin; chrF is there for the rest
    assert chrf("мир", "мир") == pytest.approx(100)


def test_chrf_by_hand():
    # Of "abc" in "abd": 2 of 3 letters, 1 of 2 pairs, 0 of 1 triple; as long as each other, so
    # precision = recall = F = (2/3 + 1/2 + 0) / 3.
    assert chrf("abc", "abd") == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)
    # Recall weighs four times in beta = 2: P 1 and R 1/2 of single letters.
    assert chrf("a", "ab") == pytest.approx(100 * 5 * 1 * 0.5 / (4 * 1 + 0.5))


def test_rouge_agrees_with_torchmetrics_on_the_books_answers():
    text = pytest.importorskip("torchmetrics.functional.text")
    for response, wanted in books_answers():
        theirs = text.rouge_score(response, wanted, rouge_keys="rougeL")["rougeL_fmeasure"]
        assert rouge_l(response, wanted) == pytest.approx(100 * theirs.item(), abs=1e-4)


def test_rouge_agrees_with_rouge_score_on_the_books_answers():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for response, wanted in books_answers():
        expected = 100 * scorer.score(wanted, response)["rougeL"].fmeasure
        assert rouge_l(response, wanted) == pytest.approx(expected)


def test_measure_keeps_the_order():
    found = measure([("a", "a"), ("b", "c")])
    assert found["rouge_l"] == [100.0, 0.0]
    assert list(found) == list(METRICS)
