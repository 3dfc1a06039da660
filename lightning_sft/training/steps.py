"""Where optimizer steps end, and how many a run has: one place for all who ask.

A step ends after `accumulate_grad_batches` micro-batches and at the end of each epoch. What
Lightning's options change about either (limits, `overfit_batches`, `fast_dev_run`, a schedule of
accumulation) is read from the trainer at the moment, never kept.
"""

from __future__ import annotations

import math
from collections.abc import Sized

import lightning as L
from lightning.pytorch.callbacks import Timer

from lightning_sft.data.counting import count_run_steps
from lightning_sft.data.loader import accumulation_plan
from lightning_sft.training.lightning_internals import (
    given_train_loader,
    limit_batches,
    stops_now,
    validation_follows,
)


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this micro-batch of the epoch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or ends_epoch(trainer, batch_idx)


def ends_epoch(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the epoch's last."""
    return batch_idx + 1 == trainer.num_training_batches


def can_resume_behind(trainer: L.Trainer, batch_idx: int, *, validated: bool = False) -> bool:
    """Whether a checkpoint behind this micro-batch of an epoch would hold all that has happened.

    Between optimizer steps there are accumulated gradients, which are not saved. A run that goes on
    from before a validation would leave it out: Lightning takes it for done. The last step of an
    epoch or of the run is saved at the epoch's end, behind everything else that belongs to it.

    Args:
        validated: The validation that was due here is over.
    """
    if not ends_step(trainer, batch_idx) or ends_epoch(trainer, batch_idx):
        return False
    if 0 <= trainer.max_steps <= trainer.global_step or stops_now(trainer):
        return False
    return validated or not validation_follows(trainer)


def count_steps(trainer: L.Trainer, num_batches: float) -> int | None:
    """Optimizer steps of a whole run; None where only a clock or a callback ends it.

    Args:
        num_batches: Micro-batches of an epoch, limits applied; infinite if nobody knows.
    """
    if not math.isfinite(num_batches):
        return trainer.max_steps if trainer.max_steps >= 0 else None
    return count_run_steps(
        int(num_batches), accumulation_plan(trainer), trainer.max_epochs, trainer.max_steps
    )


def count_steps_ahead(trainer: L.Trainer) -> int | None:
    """`count_steps` before the loop has its loader, as a schedule of learning rates needs it."""
    datamodule = getattr(trainer, "datamodule", None)
    loader = datamodule.train_dataloader() if datamodule else given_train_loader(trainer)
    if not isinstance(loader, Sized):
        return int(trainer.estimated_stepping_batches)
    return count_steps(trainer, limit_batches(trainer, len(loader)))


def is_time_up(trainer: L.Trainer) -> bool:
    """Whether `max_time` is over."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return any((timer.time_remaining() or 0.0) <= 0.0 for timer in timers if _has_limit(timer))


def _has_limit(timer: Timer) -> bool:
    return timer.time_remaining() is not None
