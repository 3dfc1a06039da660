"""Killed at chosen moments under mixes of Lightning's limits: the resumed run is the whole one.

`scripts/chaos.py` does the same at random moments with real signals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler

from lightning_sft.commands.verify_resume import compare_runs
from lightning_sft.training import module as module_file
from lightning_sft.training.checkpoint import Checkpoints, find_checkpoint
from lightning_sft.training.loggers import MetricsFile
from support.plain import make_data, make_module, make_trainer, train
from support.resuming import killed_behind

pytestmark = pytest.mark.process  # trains whole runs


def schedule() -> list[L.Callback]:
    return [GradientAccumulationScheduler({0: 2, 1: 3})]


def impatience() -> list[L.Callback]:
    """Ends the run at its second validation: nothing is that much better."""
    return [EarlyStopping("val_loss", patience=1, min_delta=9.0, verbose=False)]


EVERY: dict[str, Any] = {"every_n_steps": 1, "keep_last": 2}
PLATEAU = {
    "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, threshold=9.0, factor=0.5
    )
}
BOTH = {"max_epochs": 2, "max_steps": 12}
FAR = {"max_epochs": 2, "max_steps": 99}
# What is trained, and (hook, steps done) of the kills, one after the other.
CASES: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    # An epoch's end with both limits: counted twice, and the rest of the run left out.
    "epoch-end-both": (BOTH, [("save", 8)]),
    "epoch-end-far": (FAR, [("save", 8), ("save", 16)]),
    "steps-alone": ({"max_epochs": -1, "max_steps": 12}, [("save", 8), ("save", 12)]),
    # Behind the last step: no step is left, but the weights are to be written.
    "nothing-left": ({"max_epochs": 2}, [("on_train_end", 16)]),
    # Between a step that is due to be saved and the validation that is due behind it.
    "validation-due": ({**FAR, "val_check_interval": 3, "checkpoints": EVERY}, [
        ("on_validation_start", 3), ("on_validation_epoch_end", 6), ("save", 11),
    ]),
    "validation-over-epochs": (
        {"max_epochs": 2, "val_check_interval": 5, "check_val_every_n_epoch": None,
         "checkpoints": EVERY}, [("on_validation_start", 5), ("save", 8), ("save", 10)],
    ),
    "first-row": ({**BOTH, "checkpoints": EVERY}, [("save", 1)]),
    "window-and-limit": (
        {**FAR, "accumulate_grad_batches": 2, "limit_train_batches": 5, "checkpoints": EVERY},
        [("save", 2), ("save", 3), ("save", 5)],
    ),
    # Lightning sets the schedule's value at an epoch's start, which a resumed run has behind it.
    "schedule": ({"max_epochs": 2, "callbacks": schedule, "checkpoints": EVERY}, [
        ("save", 1), ("save", 5),
    ]),
    "overfit": ({"max_epochs": 3, "overfit_batches": 2, "checkpoints": EVERY}, [("save", 3)]),
    # Lightning steps it behind the epoch's checkpoint, and not again.
    "plateau": ({"max_epochs": 3, "module": PLATEAU}, [("save", 16)]),
    "stopped-early": ({"max_epochs": 4, "callbacks": impatience}, [("save", 16)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def run_once(name: str) -> Path:
        run = tmp_path_factory.mktemp("undisturbed") / "version_0"
        train(run, **CASES[name][0])
        return run

    return run_once


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_equals_whole(
    tmp_path: Path, undisturbed: Callable[[str], Path], name: str
) -> None:
    options, kills = CASES[name]
    run, whole = tmp_path / "run/version_0", undisturbed(name)
    for hook, step in kills:
        with killed_behind(hook, step):
            train(run, **options)
    train(run, **options)
    assert compare_runs(run, whole) == []
    assert files_of(run) == files_of(whole)


def test_without_a_settled_place_an_epoch_is_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[str], Path]
) -> None:
    """The negative control: take the protection away, and the run ends one epoch early."""
    monkeypatch.setattr(module_file, "settle_place", lambda loops: None)
    run = tmp_path / "run/version_0"
    with killed_behind("save", 8):
        train(run, **BOTH)
    with pytest.raises(Exception, match="training ended early: 4 of 12 optimizer steps are miss"):
        train(run, **BOTH)


def test_an_epoch_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    """12 of 16 steps, then all: the rest of the second epoch is not left out."""
    module = {"lr_scheduler": None}
    longer, whole = tmp_path / "longer/version_0", tmp_path / "whole/version_0"
    train(longer, max_steps=12, max_epochs=2, module=module)
    train(longer, max_epochs=2, module=module)
    train(whole, max_epochs=2, module=module)
    assert compare_runs(longer, whole) == []


def test_a_copy_beside_the_checkpoints_is_the_users(tmp_path: Path) -> None:
    """It ends neither a run nor `last`, and is never deleted."""
    run = tmp_path / "run/version_0"
    names = ["step-000005-keep.ckpt", "step-best.ckpt", "step-000999 copy.ckpt", "step-7.ckpt"]
    for name in names:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / name).write_bytes(b"kept")
    saving = Checkpoints(every_n_steps=1)
    trainer = make_trainer(saving, logger=[MetricsFile(run)], max_steps=3)
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    assert find_checkpoint("last", run.parent).name == "step-000003.ckpt"
    assert all((run / "checkpoints" / name).read_bytes() == b"kept" for name in names)
