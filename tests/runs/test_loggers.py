"""The run folder is where it is whatever logs: a user's loggers come beside the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers import CSVLogger, Logger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from lightning_sft import RunFolder
from lightning_sft.training import loggers
from lightning_sft.training.loggers import folder_of
from support.runs import newest_checkpoint, read_metrics, run, write_config

OURS = {"checkpoints", "config.yaml", "gpt2-2M-sft.pth", "metrics.csv", "samples.jsonl"}


class Hub(Logger):
    """Stands for a logger of a service, such as Weights & Biases': it has no folder of its own."""

    logged: list[int | None] = []  # noqa: RUF012 - shared by design: Lightning makes the object
    name = version = None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged.append(step)


CSV = {"class_path": "CSVLogger", "init_args": {"save_dir": "theirs", "name": "csv"}}
HUB = {"class_path": "lightning.pytorch.loggers.Hub"}


@pytest.mark.parametrize(
    ("logger", "options"),
    [
        (None, []),
        (False, []),
        (CSV, []),
        ([HUB, CSV], []),
        (None, ["--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=theirs"]),
        (HUB, []),
    ],
    ids=["ours", "false", "csv", "list", "plus", "hub"],
)
def test_the_run_folder_is_the_same_whatever_logs(
    logger: Any, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_loggers, "Hub", Hub, raising=False)
    monkeypatch.setattr(Hub, "__module__", "lightning.pytorch.loggers")  # a config may name it
    monkeypatch.setattr(Hub, "logged", [])
    monkeypatch.chdir(tmp_path)
    short = {"trainer__max_steps": 2, "loss_curve__every_n_steps": 0}
    config = write_config(tmp_path, trainer__logger=logger, **short)
    assert run("fit", "--config", config, *options) == 0
    folder = tmp_path / "runs/tiny/version_0"
    assert {path.name for path in folder.iterdir()} >= OURS
    assert len(read_metrics(folder, "train_loss")) == 2
    assert bool(list(folder.glob("events.*"))) == (logger is not False)
    theirs = CSV in (logger if isinstance(logger, list) else [logger]) or bool(options)
    assert bool(list(tmp_path.glob("theirs/*/*/metrics.csv"))) == theirs
    assert {path.name for path in tmp_path.iterdir()} <= {
        "data.json",
        "tiny.yaml",
        "runs",
        "theirs",
    }
    assert bool(Hub.logged) == (HUB in (logger if isinstance(logger, list) else [logger]))
    # And what goes on from `last` goes on from this run.
    assert run("predict", "--config", config, *options, "--ckpt_path", "last") == 0
    assert (folder / "instruction-data-with-response.json").exists()


def trainer_with(folder: Path, **settings: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **settings)


def test_a_plain_trainer_means_its_loggers_folder(tmp_path: Path) -> None:
    theirs = CSVLogger(tmp_path, name="mine", version=4)
    expected = tmp_path / "mine" / "version_4"
    assert folder_of(trainer_with(tmp_path, logger=theirs)) == expected
    assert folder_of(trainer_with(tmp_path, logger=[Hub(), theirs])) == expected
    assert folder_of(trainer_with(tmp_path, logger=theirs, fast_dev_run=True)) is None
    chosen = trainer_with(tmp_path, logger=theirs, callbacks=[RunFolder(tmp_path / "here")])
    assert folder_of(chosen) == tmp_path / "here"


@pytest.mark.parametrize("logger", [False, Hub()], ids=["none", "hub"])
def test_a_plain_trainer_without_a_folder_is_told_once(tmp_path: Path, logger: Any) -> None:
    loggers._warn_once.cache_clear()
    trainer = trainer_with(tmp_path, logger=logger)
    with pytest.warns(UserWarning, match=r"no checkpoints, samples, curve or weights are written"):
        assert folder_of(trainer) is None
    assert folder_of(trainer) is None  # and not again: pytest would fail on a second warning


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        trainer__max_epochs=1,
        checkpoints={"every_n_steps": 3, "keep_last": 2},
        loss_curve={"every_n_steps": 2, "num_batches": 1},
    )
    assert run("fit", "--config", config) == 0
    folder = tmp_path / "runs/tiny/version_0"
    assert newest_checkpoint(folder).stem == "step-000008"
    before = read_events(folder)
    newest_checkpoint(folder).unlink()  # the end is done again, as behind a kill
    assert run("fit", "--config", config, "--ckpt_path", "last") == 0
    assert read_events(folder) == before
    assert before["train_loss"] == list(range(8))


def read_events(folder: Path) -> dict[str, list[int]]:
    """Tag → the steps that TensorBoard's own server shows, sample answers included."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [e.step for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


def test_the_terminal_counts_epochs_from_1_and_shows_nothing_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(
        tmp_path, trainer__max_steps=9, trainer__enable_progress_bar=True, samples__indices=[]
    )
    shown = {"--trainer.enable_model_summary=true", "--loss_curve.every_n_steps=0"}
    with caplog.at_level("INFO"):
        assert run("fit", "--config", config, *shown) == 0
    said = "".join(capsys.readouterr()) + caplog.text
    assert "Epoch 1/2: " in said
    assert "Epoch 2/2: " in said
    assert "3,246,016 parameters, 3,246,016 of them trained" in said
    for text in ("Epoch 0", "v_num", "FLOPs", "Flops", "already configured"):
        assert text not in said, text
