"""What a step is divided by, where it ends, and how many a run has, under Lightning's options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from torch.utils.data import DataLoader

from lightning_sft.common.errors import IncompleteError, InputError
from lightning_sft.data.batching import IGNORE_INDEX
from lightning_sft.training.checkpoint import Checkpoints
from lightning_sft.training.module import SFTModule
from support.plain import make_data, make_module, make_trainer, train
from support.runs import read_metrics

pytestmark = pytest.mark.process  # trains whole runs


class Watch(L.Callback):
    """Counts for itself what each optimizer step holds, from the batches that really come."""

    def __init__(self) -> None:
        self.micro: list[tuple[int, int, list[int]]] = []  # said, supervised, entries
        self.steps: list[list[tuple[int, int]]] = [[]]

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        supervised = int((batch["targets"] != IGNORE_INDEX).sum())
        self.steps[-1].append((int(batch["step_targets"]), supervised))
        self.micro.append((trainer.current_epoch, batch_idx, batch["index"].tolist()))
        if trainer.global_step == len(self.steps):
            self.steps.append([])

    def check(self) -> None:
        """Each micro-batch was divided by the tokens of its own step, all of which came."""
        steps = [step for step in self.steps if step]
        for step in steps:
            assert {said for said, _ in step} == {sum(count for _, count in step)}


def run_plain(folder: Path, *callbacks: L.Callback, **trainer: Any) -> Watch:
    watch = Watch()
    trained = make_trainer(watch, *callbacks, **({"max_epochs": 2} | trainer))
    trained.fit(make_module(), datamodule=make_data(folder))
    watch.check()
    return watch


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"accumulate_grad_batches": 3}, [3, 3, 2] * 2),
        ({"accumulate_grad_batches": 2, "limit_train_batches": 3}, [2, 1] * 2),
        ({"accumulate_grad_batches": 4, "limit_train_batches": 5}, [4, 1] * 2),
        ({"accumulate_grad_batches": 2, "limit_train_batches": 0.4}, [2, 1] * 2),
        ({"accumulate_grad_batches": 2, "overfit_batches": 3}, [2, 1] * 2),
        ({"accumulate_grad_batches": 2, "fast_dev_run": 3}, [2, 1]),
        ({"accumulate_grad_batches": 4, "max_steps": 3}, [4, 4, 4]),
        ({"schedule": {0: 3, 1: 5}}, [3, 3, 2, 5, 3]),
        ({"schedule": {1: 2}, "limit_train_batches": 3}, [1, 1, 1, 2, 1]),
    ],
    ids=str,
)
def test_a_step_is_divided_by_the_tokens_that_really_come(
    tmp_path: Path, options: dict[str, Any], sizes: list[int]
) -> None:
    schedule = options.pop("schedule", None)
    callbacks = [GradientAccumulationScheduler(schedule)] if schedule else []
    watch = run_plain(tmp_path, *callbacks, **options)
    assert [len(step) for step in watch.steps if step] == sizes


def test_overfitting_takes_the_same_batches_each_epoch(tmp_path: Path) -> None:
    seen = run_plain(tmp_path, overfit_batches=2).micro
    assert [entries for epoch, _, entries in seen if epoch == 0] == [
        entries for epoch, _, entries in seen if epoch == 1
    ]
    assert len(seen) == 4
    other = run_plain(tmp_path, limit_train_batches=2).micro  # the control: another order
    assert other[0][2] != other[2][2]


def test_a_loader_given_on_its_own_follows_the_trainer(tmp_path: Path) -> None:
    """Accumulation, limits and the order of each epoch, as with the DataModule."""
    data, watch, options = make_data(tmp_path), Watch(), {"accumulate_grad_batches": 2}
    trainer = make_trainer(watch, max_epochs=2, limit_train_batches=5, **options)
    trainer.fit(make_module(), data.train_dataloader(), data.val_dataloader())
    watch.check()
    assert watch.micro == run_plain(tmp_path, limit_train_batches=5, **options).micro


def test_torchs_own_loader(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    rows = data.rows("train")
    loader = DataLoader(rows, batch_size=4, collate_fn=data.make_batch)  # type: ignore[arg-type]
    watch, module = Watch(), make_module()
    make_trainer(watch, max_epochs=1).fit(module, loader)
    watch.check()
    assert module.tokens_seen > 0
    with pytest.raises(InputError, match=r"accumulate_grad_batches.*InstructionDataModule"):
        make_trainer(max_epochs=1, accumulate_grad_batches=2).fit(make_module(), loader)


# --- A run that ends has done its steps, or says how many are missing ---


def test_a_clock_stops_between_steps_and_the_missing_are_counted(tmp_path: Path) -> None:
    """The clock runs out in the middle of a window of three, and the rest comes with more time."""

    class OutOfTime(Timer):
        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 3:
                self._duration = 0.0
            super().on_train_batch_end(trainer, *args, **kwargs)

    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 3}
    run = tmp_path / "stopped/version_0"
    with pytest.raises(IncompleteError, match=r"max_time is over: 4 of 6 optimizer steps are miss"):
        train(run, callbacks=lambda: [OutOfTime({"hours": 1})], **options)
    assert sorted(p.name for p in run.glob("checkpoints/*.ckpt")) == ["step-000002.ckpt"]
    train(run, callbacks=lambda: [Timer({"hours": 1})], **options)
    whole = tmp_path / "whole/version_0"
    train(whole, **options)
    assert read_metrics(run, "train_loss") == read_metrics(whole, "train_loss")


def test_an_unexplained_end_is_no_end(tmp_path: Path) -> None:
    class Cut(L.Callback):
        """Ends the run behind its first epoch in a way that no option explains."""

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step

        def on_train_end(self, trainer: Any, module: Any) -> None:
            trainer.fit_loop.epoch_loop.max_steps = -1

    with pytest.raises(IncompleteError, match="training ended early: 16 of 24 optimizer steps"):
        make_trainer(Cut(), Checkpoints(), max_epochs=3).fit(
            make_module(), datamodule=make_data(tmp_path)
        )


def test_a_callback_may_end_a_run_and_it_stays_ended(tmp_path: Path) -> None:
    class Enough(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.fit_loop.total_batch_idx == 3  # said once

    run = tmp_path / "run/version_0"
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 3}
    assert train(run, callbacks=lambda: [Enough()], **options).global_step == 2
    assert train(run, **options).global_step == 2


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"max_epochs": 3}, 24),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": 1, "max_steps": 50}, 8),
        ({"max_epochs": -1, "max_steps": 50}, 50),
        ({"max_epochs": 2, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 8),
        ({"max_epochs": 3, "overfit_batches": 2}, 6),
        ({"max_epochs": 3, "schedule": {1: 4}}, 12),
    ],
    ids=str,
)
def test_logged_rates_are_the_formula_at_every_step(
    tmp_path: Path, options: dict[str, Any], wanted: int
) -> None:
    """Linear to the full rate over a fifth of the run, then half a cosine down to nothing."""
    schedule = options.pop("schedule", None)
    callbacks = [GradientAccumulationScheduler(schedule)] if schedule else []
    run, options = tmp_path / "run/version_0", {"limit_val_batches": 0} | options
    train(run, callbacks=lambda: callbacks, **options)
    warmup = 0.2 * wanted

    def rate(step: int) -> float:
        if step < warmup:
            return 1e-2 * (step + 1) / (warmup + 1)
        return 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (wanted - warmup)))

    assert read_metrics(run, "lr") == pytest.approx([rate(s) for s in range(wanted)], rel=1e-5)


def test_a_longer_run_goes_on_along_its_own_curve(tmp_path: Path) -> None:
    """From the checkpoint of a run of one epoch: the rates are those of the run of three."""
    longer, whole = tmp_path / "longer/version_0", tmp_path / "whole/version_0"
    train(longer, max_epochs=1)
    train(longer, max_epochs=3)
    train(whole, max_epochs=3)
    assert read_metrics(longer, "lr")[8:] == read_metrics(whole, "lr")[8:]


def test_a_schedule_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        make_trainer(max_epochs=-1).fit(make_module(), datamodule=make_data(tmp_path))


# --- Fused kernels ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_an_optimizer_moves_weights_of_every_type(dtype: torch.dtype, name: str) -> None:
    module: Any = make_module(optimizer=lambda p: getattr(torch.optim, name)(p, lr=0.5))
    module.lr_scheduler = None
    module.configure_model()
    module.to(dtype)
    optimizer = SFTModule.configure_optimizers(module)
    before = [p.clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # type: ignore[union-attr]
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
