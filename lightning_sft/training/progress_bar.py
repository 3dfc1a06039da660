"""What `fit` shows of itself: a progress bar that counts epochs from 1, and the model's size."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelSummary, TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's tqdm bar with epochs from 1, and without a version number in its metrics.

    In a file or a pipe it is drawn every 20 batches. (The bar that Lightning takes where rich is
    installed prints nothing at all there.)
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 20)

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        bar = self.train_progress_bar
        hidden, bar.disable = bar.disable, True  # not to show Lightning's own count first
        super().on_train_epoch_start(trainer, *args)
        bar.disable = hidden
        last = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        bar.set_description(f"Epoch {trainer.current_epoch + 1}{last}", refresh=False)
        bar.reset()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


class Summary(ModelSummary):
    """The model in one line, instead of a table with one row and a count of operations of 0."""

    @staticmethod
    def summarize(
        summary_data: Any,
        total_parameters: int,
        trainable_parameters: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        print(f"{total_parameters:,} parameters, {trainable_parameters:,} of them trained")
