"""A report's figures with and without the entries that training has a near-twin of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.data.entries import Entry
from lightning_sft.judging.significance import bootstrap_mean
from lightning_sft.reporting.report import report
from lightning_sft.reporting.twin_scores import weigh_twins
from lightning_sft.runs.data_quality_file import (
    DATA_QUALITY_NAME,
    FORMAT,
    NearTwins,
    entry_key,
    read_near_twins,
)
from lightning_sft.runs.responses import RESPONSES_NAME, Response

ENTRIES = [Entry(f"Task {n}", "given" * (n % 2), f"wanted {n}") for n in range(12)]
# The model knows by heart what it was trained on: entries 0 to 2.
RESPONSES = [Response(e, e.output if n < 3 else "no idea") for n, e in enumerate(ENTRIES)]
TWINS = dict.fromkeys(range(3), 0.95)


def write_quality(folder: Path, **changes: Any) -> Path:
    records = [
        {"split": "test", "place": n, "key": entry_key(e), "similarity": TWINS.get(n), "twin": None}
        for n, e in enumerate(ENTRIES)
    ]
    found = {"format": FORMAT, "threshold": 0.9, "evaluated": records} | changes
    path = folder / DATA_QUALITY_NAME
    path.write_text(json.dumps(found))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records = [
        {"instruction": r.entry.instruction, "input": r.entry.input, "output": r.entry.output}
        | {"model_response": r.text}
        for r in RESPONSES
    ]
    (tmp_path / RESPONSES_NAME).write_text(json.dumps(records))
    return tmp_path


def test_figures_in_three_parts(run: Path) -> None:
    write_quality(run)
    report(run)
    found = json.loads((run / "report.json").read_text())["near_twins"]
    assert (found["answers"], found["known"], found["twins"]) == (12, 12, 3)
    exact = found["measures"]["exact_match"]
    assert [exact[part]["mean"] for part in ("all", "without", "twins")] == [25, 0, 100]
    assert [exact[part]["count"] for part in ("all", "without", "twins")] == [12, 9, 3]
    interval = bootstrap_mean([100.0] * 3 + [0.0] * 9)
    assert (exact["all"]["low"], exact["all"]["high"]) == (interval.low, interval.high)
    assert "score" not in found["measures"]  # nothing was judged
    page = (run / "report.html").read_text()
    assert "With and without near-twins" in page
    assert "of 3 of 12 entries" in page
    assert "100.00 (100.00 to 100.00; 3)" in page


def test_scores_that_are_missing_are_left_out() -> None:
    twins = NearTwins(0.9, {entry_key(e): TWINS.get(n) for n, e in enumerate(ENTRIES)})
    metrics = dict.fromkeys(("exact_match", "token_f1", "rouge_l", "chrf"), 50.0)
    answers = [{"score": None if n == 4 else 10 * n, "metrics": metrics} for n in range(12)]
    found = weigh_twins(twins, RESPONSES, answers)
    assert found is not None
    score = found["measures"]["score"]
    assert [score[part]["count"] for part in ("all", "without", "twins")] == [11, 8, 3]
    assert score["twins"]["mean"] == 10


def test_no_near_twins_among_them(run: Path) -> None:
    records = [{"key": entry_key(e), "similarity": None} for e in ENTRIES]
    write_quality(run, evaluated=records)
    report(run)
    found = json.loads((run / "report.json").read_text())["near_twins"]
    assert found["twins"] == 0
    assert found["measures"]["chrf"]["twins"] == {
        "count": 0,
        "mean": None,
        "low": None,
        "high": None,
    }


def test_without_the_file_nothing_is_said(run: Path) -> None:
    report(run)
    found = json.loads((run / "report.json").read_text())
    assert (found["near_twins"], found["notes"]) == (None, [])
    assert "near-twins" not in (run / "report.html").read_text()


def test_a_file_of_other_data_is_left_out(run: Path) -> None:
    write_quality(run, evaluated=[{"key": "0" * 16, "similarity": 0.95}])
    report(run)
    found = json.loads((run / "report.json").read_text())
    assert found["near_twins"] is None
    assert found["notes"] == [
        "data-quality.json is left out: it is of other data than these answers"
    ]


def test_answers_that_are_only_partly_known(run: Path) -> None:
    write_quality(run, evaluated=[{"key": entry_key(e), "similarity": None} for e in ENTRIES[:5]])
    report(run)
    assert "of the 5 known ones" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "another"},
        {"threshold": "high"},
        {"threshold": True},
        {"evaluated": {}},
        {"evaluated": [1]},
        {"evaluated": [{"key": 1, "similarity": None}]},
        {"evaluated": [{"key": "a"}]},
        {"evaluated": [{"key": "a", "similarity": "0.9"}]},
    ],
    ids=str,
)
def test_a_damaged_file_is_named_and_left_out(run: Path, changes: dict[str, Any]) -> None:
    path = write_quality(run, **changes)
    with pytest.raises(ValueError, match=DATA_QUALITY_NAME):
        read_near_twins(path)
    report(run)
    notes = json.loads((run / "report.json").read_text())["notes"]
    assert [note.split(" is left out")[0] for note in notes] == [DATA_QUALITY_NAME]


def test_a_key_is_of_the_prompt_alone() -> None:
    first, second = Entry("Add.", "2 and 2", "Four."), Entry("Add.", "2 and 2", "4")
    assert entry_key(first) == entry_key(second)
    assert entry_key(first) != entry_key(Entry("Add.2 and 2", "", "Four."))
