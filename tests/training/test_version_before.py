"""Run folders that version 0.1.0 wrote: they go on, answer, report and export here.

`run_of_0_1_0/` holds two of them as that version left them after the first of two epochs, one of
whole weights and one of LoRA adapters, with the metrics and answers that it wrote from there on.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from support.runs import run

OLD = Path(__file__).parent / "run_of_0_1_0"
STEPS = 6  # behind the checkpoint
RESPONSES = "instruction-data-with-response.json"


@pytest.fixture(params=["tiny", "lora"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Path:
    """The run folder as a kill right behind its first epoch left it."""
    folder = tmp_path / "runs" / request.param / "version_0"
    shutil.copytree(OLD / request.param, folder)
    shutil.copy(OLD / "data.json", tmp_path)
    (folder / RESPONSES).unlink()
    monkeypatch.chdir(tmp_path)
    return folder


def read_losses(metrics: Path) -> dict[int, float]:
    with metrics.open() as file:
        return {
            int(r["step"]): float(r["train_loss"]) for r in csv.DictReader(file) if r["train_loss"]
        }


def test_it_goes_on(folder: Path) -> None:
    wanted = read_losses(OLD / folder.parent.name / "metrics.csv")
    config = folder / "config.yaml"
    assert run("fit", "--config", config, "--ckpt_path", "last") == 0
    actual = read_losses(folder / "metrics.csv")
    assert sorted(actual) == sorted(wanted) == list(range(2 * STEPS))
    # Another machine adds in another order; on the one that wrote them they are equal.
    assert actual == pytest.approx(wanted, abs=1e-5)
    assert (folder / "checkpoints" / "step-000012.ckpt").exists()


def test_it_answers(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "step-000006.ckpt"
    assert run("predict", "--ckpt_path", checkpoint) == 0
    wanted = json.loads((OLD / folder.parent.name / RESPONSES).read_text())
    assert json.loads((folder / RESPONSES).read_text()) == wanted


def test_it_is_reported_and_exported(folder: Path, tmp_path: Path) -> None:
    shutil.copy(OLD / folder.parent.name / RESPONSES, folder)
    assert run("report", folder) == 0
    checkpoint = folder / "checkpoints" / "step-000006.ckpt"
    out = tmp_path / "exported"
    assert run("export", "--ckpt_path", checkpoint, "--format", "pth", "--out", out) == 0
    assert any(out.glob("*.pth"))
