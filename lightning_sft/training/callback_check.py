"""Callbacks of Lightning that would spoil a run without a word, refused before it begins."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightning_sft.common.errors import InputError

# What `SFTModule` and `Throughput` log for callbacks to watch.
MONITORED = ("train_loss", "lr", "tokens_seen", "tokens_per_second", "val_loss", "val_perplexity")

_AVERAGING = (
    "its averaged weights would be in no checkpoint and no .pth, and a resumed run would start the "
    "average anew; train without it"
)
_FREEZING = "it changes what is trained behind the optimizer's back; give model.lora instead"
# Callback → why not. A class stands for those that inherit from it.
REFUSED: dict[type[Callback], str] = {
    StochasticWeightAveraging: _AVERAGING,
    WeightAveraging: _AVERAGING,
    LearningRateFinder: "it looks for an attribute `lr`; the rate is the optimizer's here: set "
    "model.optimizer.init_args.lr and compare short runs (--trainer.max_steps 50)",
    BatchSizeFinder: "its trial runs are counted as training; use `plan`, which says what fits",
    BackboneFinetuning: _FREEZING,
    BaseFinetuning: _FREEZING,
    ModelPruning: "its masks replace the weights' names, which no checkpoint here would load",
}


def check_callbacks(trainer: L.Trainer) -> None:
    """Refuse callbacks that cannot do here what they promise.

    Early stopping on what a validation finds waits for the first one; by itself Lightning fails
    where an epoch is cut short before it.

    Raises:
        InputError: Names the callback, and says what to do instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for refused, reason in REFUSED.items():
            if isinstance(callback, refused):
                raise InputError(f"trainer.callbacks: {type(callback).__name__}: {reason}")
        if isinstance(callback, EarlyStopping):
            _check_monitor(trainer, callback)


def _check_monitor(trainer: L.Trainer, callback: EarlyStopping) -> None:
    where, monitor = "trainer.callbacks: EarlyStopping: monitor", callback.monitor
    if monitor not in MONITORED:
        raise InputError(f"{where}: unknown {monitor!r}; allowed: {', '.join(MONITORED)}")
    if monitor.startswith("val_"):
        if trainer.limit_val_batches == 0:
            raise InputError(f"{where}: {monitor} needs a validation; limit_val_batches is 0")
        callback.strict = False
