"""Whole runs on conversations with weights, mixtures and token budgets: cut, killed, answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft import InstructionDataModule
from lightning_sft.commands.verify_resume import compare_runs
from support.plain import make_trainer, train
from support.resuming import killed_behind
from support.runs import load, newest_checkpoint, run, run_apart, write_config, write_data
from support.talks import write_talks

pytestmark = pytest.mark.process  # trains whole runs
WIDE = {"emb_dim": 8, "n_heads": 2, "n_layers": 1, "context_length": 256, "drop_rate": 0.1}
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def config_for(folder: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "model__architecture": dict(WIDE),
        "data__path": str(write_talks(folder / "talks.json", 30)),
        "data__prompt_style": "chatml",
        "data__mask_prompt": True,
        "data__max_length": 256,
        "data__fractions": [0.8, 0.1, 0.1],
        "loss_curve__every_n_steps": 0,
        "samples__indices": [],
        "trainer__max_epochs": 1,
    }
    return write_config(folder, **(settings | changes))


def test_two_ranks_make_the_steps_of_one(tmp_path: Path) -> None:
    """24 conversations with weights, in steps of four; in float64."""
    states = {}
    for name, size, two in (("one", 4, []), ("two", 2, TWO)):
        config = config_for(
            tmp_path, data__batch_size=size, run__name=name, trainer__precision="64-true",
            model__architecture=WIDE | {"drop_rate": 0.0},
        )  # fmt: skip
        fit = run_apart("fit", "--config", config, *two, cwd=tmp_path) if two else (
            run("fit", "--config", config), "", ""
        )  # fmt: skip
        assert fit[0] == 0, fit[2]
        checkpoint = newest_checkpoint(tmp_path / "runs" / name / "version_0")
        states[name] = load(checkpoint)["state_dict"]
    for key, value in states["one"].items():
        assert torch.allclose(states["two"][key], value, rtol=0, atol=1e-10), key


SETTINGS: dict[str, dict[str, Any]] = {
    "weights": {"prompt_style": "chatml", "mask_prompt": True},
    "turns": {"mask_prompt": True},
    "tokens": {"max_tokens": 300, "padding_free": True, "largest_first": True},
}


@pytest.mark.parametrize("name", [*SETTINGS, "mixture"])
def test_killed_and_resumed_equals_whole(name: str, tmp_path: Path) -> None:
    data = {"max_length": 256, "fractions": (0.8, 0.1, 0.1), **SETTINGS.get(name, {})}
    module: dict[str, Any] = {"max_length": 256, "prompt_style": data.get("prompt_style", "alpaca")}
    write_talks(tmp_path / "data.json", 30)
    if name == "mixture":
        one = write_data(tmp_path / "entries.json", 20)
        talks = tmp_path / "data.json"
        data["mixture"] = [{"path": str(one), "weight": 1.5}, {"path": str(talks), "weight": 0.4}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.plain.TINY", WIDE)
        options: dict[str, Any] = {
            "max_epochs": 2,
            "data": data,
            "module": module,
            "checkpoints": {"every_n_steps": 1, "keep_last": 2},
        }
        broken, whole = tmp_path / "broken/version_0", tmp_path / "whole/version_0"
        for folder in (broken, whole):
            folder.parent.mkdir()
            (folder.parent / "data.json").write_bytes((tmp_path / "data.json").read_bytes())
        train(whole, **options)
        with killed_behind("save", 2):
            train(broken, **options)
        train(broken, **options)
    assert compare_runs(broken, whole) == []


def test_a_run_that_does_not_fit_would_fail_at_once(tmp_path: Path) -> None:
    """The first batch of each epoch is the largest, and each has all rows once."""
    data = InstructionDataModule(
        str(write_talks(tmp_path / "talks.json", 30)),
        max_tokens=400,
        largest_first=True,
        fractions=(0.8, 0.1, 0.1),
    )
    make_trainer()  # of no consequence for a loader on its own
    sizes = [batch["input_ids"].numel() for batch in data.train_dataloader()]
    assert sizes[0] == max(sizes) <= 400
    assert len(set(sizes)) > 1


def test_conversations_are_answered_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, samples__indices=[0])
    assert run("fit", "--config", config) == 0
    out = capsys.readouterr().out
    assert "talks.json: JSON, 30 records in the format messages" in out
    assert "asked:  system: Rule" in out
    folder = tmp_path / "runs/tiny/version_0"
    assert run("predict", "--ckpt_path", newest_checkpoint(folder)) == 0
    answers = json.loads((folder / "instruction-data-with-response.json").read_text())
    assert len(answers) == 3
    assert answers[0]["instruction"].startswith("system: Rule ")
    assert answers[0]["output"].startswith("Answer ")
    assert run("report", folder) == 0
