"""scripts/benchmark.py: that the peers do the same work, and that its sums are right."""

from __future__ import annotations

import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark
from support import runs

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]


@pytest.fixture
def run(tmp_path: Path) -> Namespace:
    """40 entries, 34 of them for training: four batches of 8."""
    return Namespace(
        data=str(runs.write_data(tmp_path / "data.json")),
        architecture=dict(runs.TINY),
        tokenizer="",
        style="alpaca",
        steps=1,
        new_tokens=3,
        prompts=4,
        threads=1,
    )


def test_every_loop_trains_on_the_same_targets(run: Namespace) -> None:
    pytest.importorskip("llms_from_scratch")
    pytest.importorskip("transformers")
    measure = benchmark.measure_training
    results = {
        "ours": measure(benchmark.train_ours, run, bf16=False, share_prefix=True),
        "chapter": measure(benchmark.train_chapter, run),
        "transformers": measure(benchmark.train_transformers, run, bf16=False),
    }
    assert len({result["supervised"] for result in results.values()}) == 1
    assert len(results["ours"]["supervised"]) == run.steps
    assert results["transformers"]["computed"] == results["chapter"]["computed"]
    assert sum(results["ours"]["computed"]) < sum(results["chapter"]["computed"])
    for name, result in results.items():
        tokens = sum(result["supervised"])
        assert result["rate"] == pytest.approx(tokens / (run.steps * result["step_seconds"]))
        assert ("overhead" in result) == (name == "ours")
    # Loss, backward and optimizer have all been seen: without any of them it would be more.
    assert 0 < results["ours"]["overhead"] < 0.9


def test_too_little_data_is_an_error(run: Namespace) -> None:
    pytest.importorskip("transformers")
    run.steps = 5
    with pytest.raises(SystemExit, match="before 5 steps"):
        benchmark.measure_training(benchmark.train_transformers, run, bf16=False)


def test_a_padded_prompt_is_answered_like_one_alone(run: Namespace) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    answer = benchmark.answer_transformers(run, bf16=False)
    assert answer(PROMPTS, 5) == [answer([prompt], 5)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("prepare", ["answer_ours", "answer_chapter", "answer_transformers"])
def test_answers_never_end_early(run: Namespace, prepare: str) -> None:
    package = {"answer_ours": "lightning_sft", "answer_chapter": "llms_from_scratch"}
    pytest.importorskip(package.get(prepare, "transformers"))
    options = {} if prepare == "answer_chapter" else {"bf16": False}
    rows = 1 if prepare == "answer_chapter" else 2
    result = benchmark.measure_generation(getattr(benchmark, prepare), run, rows, **options)
    assert result["prompts"] == 4  # `measure_generation` counts the tokens of every answer
    assert (
        benchmark.measure_generation(getattr(benchmark, prepare), run, rows, most=2, **options)[
            "prompts"
        ]
        == 2
    )


def test_peers_take_turns(run: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start_job(part: str, name: str, run: Namespace) -> dict[str, Any]:
        started.append(name)
        return {"rate": 1.0, "supervised": [3, 4]}

    peers = {"training": dict.fromkeys(["ours fp32", "ours bf16"])}
    monkeypatch.setattr(benchmark, "PEERS", peers)
    monkeypatch.setattr(benchmark, "start_job", start_job)
    results = benchmark.measure_in_turn("training", 2, run, "")
    assert started == ["ours fp32", "ours bf16", "ours fp32", "ours bf16"]
    assert [len(rounds) for rounds in results.values()] == [2, 2]
    counts = itertools.count()
    monkeypatch.setattr(
        benchmark, "start_job", lambda *_: {"rate": 1.0, "supervised": [next(counts)]}
    )
    with pytest.raises(SystemExit, match="same targets"):
        benchmark.measure_in_turn("training", 1, run, "")


def test_a_peer_that_is_not_installed_is_named(
    run: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "PEERS", {"training": {"TRL fp32": None}})
    monkeypatch.setattr(benchmark, "PACKAGES", {"TRL": "no_such_package"})
    assert benchmark.measure_in_turn("training", 1, run, "") == {}
    assert capsys.readouterr().out == "skipped: TRL fp32 (no_such_package is not installed)\n"


def test_the_table_compares_medians() -> None:
    rounds = [{"rate": rate, "peak_gb": 2.0, "overhead": 0.02} for rate in (30.0, 10.0, 20.0)]
    chapter = [{"rate": 5.0, "peak_gb": 3.0, "products": 0.5}]
    table = benchmark.tabulate("training", {"ours fp32": rounds, "chapter fp32": chapter})
    assert table.splitlines()[2:] == [
        "| ours fp32 | 20.0 | 10.0–30.0 | 2.00 | – | 2.0% | 1.00× | – |",
        "| chapter fp32 | 5.0 | 5.0–5.0 | 3.00 | 50% | – | 4.00× | – |",
    ]


def test_generation_is_compared_at_equal_rows() -> None:
    rates = {"ours fp32 × 8": 80.0, "ours fp32 × 110": 200.0}
    rates |= {"transformers fp32 × 8": 40.0, "chapter fp32 × 1": 4.0}
    results = {name: [{"rate": rate}] for name, rate in rates.items()}
    lines = benchmark.tabulate("generation", results).splitlines()
    assert lines[4].endswith("| 2.00× | – |")
    assert lines[5].endswith("| 50.00× | – |")


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    results = {"training": {"ours fp32": [{"rate": 2.0}], "chapter fp32": [{"rate": 1.0}]}}
    benchmark.draw(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
