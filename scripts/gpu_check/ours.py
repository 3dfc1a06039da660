"""A run of ours, as a user would write it: SFTModule, InstructionDataModule, Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch

from gpu_check.notebook import SkipError
from gpu_check.setting import Setting
from gpu_check.stopwatch import Stopwatch, peak_gb
from lightning_sft import SFTModule
from lightning_sft.data.counting import BatchShape
from lightning_sft.models.registry import get_config
from lightning_sft.planning.footprint import estimate_memory
from lightning_sft.planning.stand_in import PlannedModule


@dataclass
class Fit:
    """What came of a run.

    Args:
        module: Trained.
        losses: Of each step, over all ranks.
        rounds: As `Stopwatch.results` gives them.
        first_step: Seconds from the trainer's start to the end of the first step.
        peak_gb: Most that tensors took on the GPU; None on a CPU.
        forecast_gb: What `plan` would have said of the batches that were run.
    """

    module: SFTModule
    losses: list[float]
    rounds: list[dict[str, float]]
    first_step: float
    peak_gb: float | None
    forecast_gb: float
    shapes: set[BatchShape] = field(default_factory=set)


class Watch(L.Callback):
    """Tells a stopwatch of every step, and keeps losses without waiting for them."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.losses: list[torch.Tensor] = []
        self.shapes: set[BatchShape] = set()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A rank's share of the loss times the ranks: their mean is the loss of the step.
        loss = outputs["loss"].detach().clone()
        self.losses.append(trainer.strategy.reduce(loss, reduce_op="mean"))
        rows, width = batch["targets"].shape
        self.shapes.add(BatchShape(batch["input_ids"].numel(), rows, width))
        self.stopwatch.step(batch["num_tokens"], batch["step_targets"])


def make_module(
    setting: Setting, name: str, *, lr: float = 5e-5, compile: bool = False, **settings: Any
) -> SFTModule:
    """A module with random weights; without the tokenizer of its weights, one that counts alike.

    Args:
        name: Of a size, `gpt2-medium`.
        settings: As `SFTModule` takes them.

    Raises:
        SkipError: torch.compile is wanted of a toy on a CPU, where it outlasts all the rest.
    """
    if compile and setting.quick and setting.device == "cpu":
        raise SkipError("torch.compile takes longer than all the rest of --quick on a CPU")
    architecture = setting.architecture(name)
    is_gpt2 = name.startswith("gpt2")
    kind = SFTModule if is_gpt2 else PlannedModule
    optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.1)
    return kind(
        get_config(architecture), weights=None, optimizer=optimizer, compile=compile, **settings
    )


def fit(
    setting: Setting,
    module: SFTModule,
    data: L.LightningDataModule,
    stopwatch: Stopwatch,
    *,
    precision: str = "32-true",
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> Fit:
    """Train for as many steps as the stopwatch wants.

    Args:
        options: Of the Trainer, over those here.
    """
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(stopwatch)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    settings: dict[str, Any] = {
        "accelerator": setting.device,
        "devices": 1,
        "max_epochs": -1,
        "max_steps": stopwatch.total,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "precision": precision,
        **quiet,
    }
    trainer = L.Trainer(**settings | options, callbacks=[watch, *callbacks])
    trainer.fit(module, datamodule=data)
    sharded = settings | options
    is_sharded = sharded.get("strategy") == "sharded"
    forecast = max(
        estimate_memory(module, shape, precision, trainer.world_size, is_sharded).total
        for shape in watch.shapes
    )
    losses = torch.stack(watch.losses).float().tolist()
    first, peak = stopwatch.first_step, peak_gb(setting.device)
    return Fit(module, losses, stopwatch.results(), first, peak, forecast / 1e9, watch.shapes)
