"""What the package uses of Lightning's loops is there and means what it meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_sft.training import lightning_internals as internals
from lightning_sft.training.checkpoint import Checkpoints
from support.plain import make_data, make_module, make_trainer
from support.runs import load

pytestmark = pytest.mark.process  # trains whole runs


class Ask(L.Callback):
    """Asks at every micro-batch, and notes when a validation really came."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.foretold: list[int] = []
        self.validated: list[int] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.done.append(internals.batches_done(trainer))
        self.steps.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
        if internals.validation_follows(trainer):
            self.foretold.append(trainer.fit_loop.total_batch_idx)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.validated.append(trainer.fit_loop.total_batch_idx)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 3},
        {"val_check_interval": 0.5},
        {"val_check_interval": 5, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2},
        {"limit_val_batches": 0},
    ],
    ids=str,
)
def test_validations_and_batches_are_foretold(tmp_path: Path, options: dict[str, Any]) -> None:
    ask = Ask()
    make_trainer(ask, max_epochs=2, **options).fit(make_module(), datamodule=make_data(tmp_path))
    assert ask.foretold == ask.validated
    assert ask.done == [*range(1, 9)] * 2
    assert ask.steps == [*range(16)]  # `set_logged_step`, before each micro-batch


def test_stops_now_heeds_the_least_number_of_steps(tmp_path: Path) -> None:
    seen = []

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = True
            seen.append(internals.stops_now(trainer))

    trainer = make_trainer(Stop(), max_epochs=1, min_epochs=0, min_steps=3)
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    assert seen == [False, False, True]


@pytest.mark.parametrize("limit", [None, 3, 0.5, 99])
def test_limits_are_known_ahead(tmp_path: Path, limit: Any) -> None:
    trainer = make_trainer(max_epochs=1, limit_train_batches=limit)
    data = make_data(tmp_path)
    ahead = internals.limit_batches(trainer, len(data.train_dataloader()))
    trainer.fit(make_module(lr_scheduler=None), datamodule=data)
    assert ahead == trainer.num_training_batches


def test_the_given_loader_is_found(tmp_path: Path) -> None:
    loader, found = make_data(tmp_path).train_dataloader(), []

    class Look(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            found.append(internals.given_train_loader(trainer))

    make_trainer(Look(), max_steps=1).fit(make_module(), loader)
    assert found == [loader]


def test_a_saved_place_has_the_names_that_are_settled(tmp_path: Path) -> None:
    """At an epoch's end, saved from its hook: every counter says that it is over."""
    path = tmp_path / "end.ckpt"

    class Save(Checkpoints):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(path)

    make_trainer(Save(), max_epochs=1).fit(make_module(), datamodule=make_data(tmp_path))
    loops = load(path)["loops"]
    epochs = loops["fit_loop"]["epoch_progress"]
    assert epochs["current"] == {"ready": 1, "started": 1, "processed": 1, "completed": 0}
    internals.settle_place(loops)
    assert set(epochs["current"].values()) == set(epochs["total"].values()) == {1}
    batches = loops["fit_loop"]["epoch_loop.batch_progress"]
    assert set(batches["current"].values()) == {0}
    assert set(batches["total"].values()) == {8}
    assert not batches["is_last_batch"]
