"""A run that was stopped and resumed equals one that never was: bit for bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.commands.verify_resume import compare_runs, equal
from lightning_sft.training.checkpoint import Checkpoints
from lightning_sft.training.module import SFTModule
from support.resuming import PulledPlugError, fit, fit_until_done, stop_before
from support.runs import load, newest_checkpoint, read_metrics, run, write_config

SCHEDULE = {"class_path": "lightning_sft.WarmupCosine", "init_args": {"warmup": 0.2}}


def make_config(folder: Path, accumulate: int, workers: int) -> Path:
    return write_config(
        folder,
        model__architecture__drop_rate=0.1,
        model__lr_scheduler=SCHEDULE,
        trainer__accumulate_grad_batches=accumulate,
        data__num_workers=workers,
        checkpoints__every_n_steps=1 if accumulate > 1 else 3,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run folder of a run without workers that was never stopped, by its accumulation."""

    @functools.cache
    def run_once(accumulate: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        fit(make_config(folder, accumulate, workers=0))
        return folder / "runs/tiny/version_0"

    return run_once


@pytest.mark.parametrize(
    ("accumulate", "workers", "stops"),
    [
        (1, 0, (5,)),  # in the first epoch, two steps behind a checkpoint
        (1, 2, (4, 5, 7)),  # three times in one epoch, prefetching workers
        (1, 0, (8,)),  # at the first step of an epoch
        (1, 0, (11, 14)),  # in the second epoch
        (1, 0, (7, 9)),  # behind a resume in its middle, an epoch's end is resumed from
        (4, 0, (3,)),  # a window of four, a short one at the epoch's end
        (4, 2, (1, 3)),
    ],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[int], Path],
    accumulate: int,
    workers: int,
    stops: tuple[int, ...],
) -> None:
    whole = undisturbed(accumulate)
    stop_before(monkeypatch, *stops)
    assert fit_until_done(make_config(tmp_path, accumulate, workers)) == len(stops) + 1

    resumed = tmp_path / "runs/tiny/version_0"
    assert not (tmp_path / "runs/tiny/version_1").exists()  # it went on in its own folder
    expected, got = load(newest_checkpoint(whole)), load(newest_checkpoint(resumed))
    assert got["global_step"] == expected["global_step"] == (4 if accumulate > 1 else 16)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "tokens_seen", "epoch"):
        assert equal(got[key], expected[key]), key
    for column in ("train_loss", "lr", "tokens_seen", "val_loss", "val_eval_loss", "step"):
        assert read_metrics(resumed, column) == read_metrics(whole, column), column
    samples = [(folder / "samples.jsonl").read_text() for folder in (whole, resumed)]
    assert samples[0] == samples[1]
    kept = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (whole, resumed)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("step", [6, 8])
def test_a_kill_right_behind_a_checkpoint_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Lightning logs a step only after its checkpoint, so that the row may not be there yet."""
    config = write_config(tmp_path, checkpoints={"every_n_steps": 3, "keep_last": 9})
    fit(config)
    config.write_text(config.read_text().replace("name: tiny", "name: stopped"))
    original, left = Checkpoints.save, [step]

    def save(self: Checkpoints, trainer: Any) -> Any:
        path = original(self, trainer)
        if trainer.global_step in left:
            left.remove(trainer.global_step)
            raise PulledPlugError
        return path

    monkeypatch.setattr(Checkpoints, "save", save)
    assert fit_until_done(config) == 2
    whole, resumed = tmp_path / "runs/tiny/version_0", tmp_path / "runs/stopped/version_0"
    assert compare_runs(resumed, whole) == []
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (whole, resumed)]
    assert names[0] == names[1]


def test_torn_temporary_files_of_a_kill_are_cleared_away(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_epochs=1)
    fit(config)
    torn = tmp_path / "runs/tiny/version_0/checkpoints/.step-000003.ckpt.ab12cd34.tmp"
    torn.write_bytes(b"half")
    fit(config, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert not torn.exists()


def test_dropout_without_its_seed_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: take the per-step seed away and the comparison must notice."""
    monkeypatch.setattr(SFTModule, "on_train_batch_start", lambda *args: None)
    config = write_config(
        tmp_path, model__architecture__drop_rate=0.1, checkpoints__every_n_steps=3
    )
    fit(config)
    stop_before(monkeypatch, 5)
    config.write_text(config.read_text().replace("name: tiny", "name: stopped"))
    fit_until_done(config)
    states = [
        load(newest_checkpoint(tmp_path / f"runs/{name}/version_0"))["state_dict"]
        for name in ("tiny", "stopped")
    ]
    assert not equal(*states)


def test_last_skips_a_damaged_checkpoint_and_a_named_one_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path, trainer__max_epochs=1, checkpoints={"every_n_steps": 4, "keep_last": 2}
    )
    fit(config)
    newest = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert run("fit", "--config", config, "--ckpt_path", newest) == 2
    assert "is damaged" in capsys.readouterr().err
    fit(config, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert f"skipped: ckpt_path: {newest} is damaged" in capsys.readouterr().out
    resumed = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    assert load(resumed)["global_step"] == 16


def test_last_without_a_checkpoint_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "--config", write_config(tmp_path), "--ckpt_path", "last") == 2
    assert "no whole checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_sidecar_tells_sha_step_and_loss(tmp_path: Path) -> None:
    fit(write_config(tmp_path, trainer__max_epochs=1))
    folder = tmp_path / "runs/tiny/version_0"
    facts = json.loads((folder / "checkpoints/step-000008.ckpt.json").read_text())
    assert facts["step"] == 8
    assert facts["val_loss"] == pytest.approx(read_metrics(folder, "val_loss")[-1])
    assert len(facts["sha256"]) == 64
