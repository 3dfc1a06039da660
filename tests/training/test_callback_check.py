"""Lightning's callbacks and counts that would spoil a run: one line, before it begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightning_sft.common.errors import InputError
from lightning_sft.data.loader import EvalLoader
from lightning_sft.training.device_check import check_devices
from support.plain import make_data, make_module, make_trainer
from support.runs import run, write_config

pytestmark = pytest.mark.process  # trains whole runs


@pytest.mark.parametrize(
    "callback",
    [
        StochasticWeightAveraging(1e-3),
        WeightAveraging(),
        EMAWeightAveraging(),
        LearningRateFinder(),
        BatchSizeFinder(),
        BackboneFinetuning(),
        ModelPruning("l1_unstructured"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_callback_that_cannot_do_its_work_is_refused(tmp_path: Path, callback: Callback) -> None:
    name = type(callback).__name__
    with pytest.raises(InputError, match=f"trainer.callbacks: {name}: .*"):
        make_trainer(callback, max_steps=1).fit(make_module(), datamodule=make_data(tmp_path))


def test_refused_in_one_line_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaging = {"class_path": "WeightAveraging"}
    assert run("fit", "--config", write_config(tmp_path, trainer__callbacks=[averaging])) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: trainer.callbacks: WeightAveraging: its averaged weights")


@pytest.mark.parametrize(
    ("monitor", "options", "message"),
    [
        ("val_los", {}, r"monitor: unknown 'val_los'; allowed: train_loss"),
        ("val_loss", {"limit_val_batches": 0}, r"val_loss needs a validation; limit_val"),
    ],
)
def test_early_stopping_on_what_never_comes(
    tmp_path: Path, monitor: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(EarlyStopping(monitor), max_steps=1, **options).fit(
            make_module(), datamodule=make_data(tmp_path)
        )


@pytest.mark.parametrize(
    "options",
    [{"max_steps": 3}, {"max_epochs": 2, "check_val_every_n_epoch": 2}, {"val_check_interval": 3}],
    ids=str,
)
@pytest.mark.parametrize("at_epoch_end", [None, True])
def test_early_stopping_waits_for_a_validation(
    tmp_path: Path, options: dict[str, Any], at_epoch_end: bool | None
) -> None:
    stopping = EarlyStopping("val_loss", check_on_train_epoch_end=at_epoch_end)
    trainer = make_trainer(stopping, **({"max_epochs": 1} | options))
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    assert trainer.global_step in (3, 8, 16)


@pytest.mark.parametrize("value", [10**9, "1000000000", 8 * (os.cpu_count() or 1) + 1])
def test_more_processes_than_the_machine_could_use(value: Any) -> None:
    with pytest.raises(InputError, match=r"trainer.devices: \d+ is not allowed; at most \d+ here"):
        check_devices(value)
    with pytest.raises(InputError, match=r"trainer.num_nodes: 1000000000 is not allowed"):
        check_devices(1, 10**9)


@pytest.mark.parametrize("value", [1, 2, "2", "auto", -1, "-1", "0,1", [0, 1], None])
def test_usual_devices_pass(value: Any) -> None:
    check_devices(value)


def test_more_workers_than_the_machine_could_use(tmp_path: Path) -> None:
    data = make_data(tmp_path, num_workers=10**9)
    for make in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(InputError, match=r"data.num_workers: 1000000000 is not allowed; at m"):
            make()
    with pytest.raises(InputError, match=r"\(8 a processor\)"):
        EvalLoader([], list, batch_size=1, num_workers=8 * (os.cpu_count() or 1) + 1)


@pytest.mark.parametrize("option", ["--trainer.devices", "--data.num_workers"])
def test_absurd_counts_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert run("fit", "--config", write_config(tmp_path), option, "1000000000") == 2
    assert f"{option[2:]}: 1000000000 is not allowed; at most" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
