"""Training with a plain `lightning.Trainer`, in this process, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from lightning_sft import InstructionDataModule, SFTModule, WarmupCosine
from lightning_sft.training.checkpoint import (
    Checkpoints,
    DurableCheckpointIO,
    FinalWeights,
    find_checkpoint,
)
from lightning_sft.training.loggers import MetricsFile, rewind
from support.runs import write_data

TINY = {"emb_dim": 8, "n_heads": 2, "n_layers": 1, "context_length": 128, "drop_rate": 0.1}


def make_module(**settings: Any) -> SFTModule:
    """A model of one layer with random weights and dropout, a warm-up and a cosine."""
    given: dict[str, Any] = {
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "lr_scheduler": lambda optimizer: WarmupCosine(optimizer, warmup=0.2),
        "max_length": 128,
    }
    return SFTModule(dict(TINY), None, **(given | settings))


def make_data(folder: Path, **settings: Any) -> InstructionDataModule:
    """40 entries: 34 to train on, in 8 batches of 4."""
    path = folder / "data.json"
    if not path.exists():
        write_data(path)
    return InstructionDataModule(str(path), **({"batch_size": 4, "max_length": 128} | settings))


def make_trainer(*callbacks: L.Callback, logger: Any = False, **settings: Any) -> L.Trainer:
    """A trainer on the CPU that says nothing; `settings` are its own."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(
        logger=logger,
        callbacks=list(callbacks),
        plugins=[DurableCheckpointIO()],
        **(quiet | settings),
    )


def train(
    run: Path,
    *,
    checkpoints: dict[str, Any] | None = None,
    callbacks: Callable[[], list[L.Callback]] = list,
    module: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **trainer: Any,
) -> L.Trainer:
    """Train in `run`, from its newest checkpoint where there is one, as `fit` does."""
    torch.manual_seed(0)
    run.mkdir(parents=True, exist_ok=True)
    newest, log = None, MetricsFile(run)
    if any((run / "checkpoints").glob("step-*.ckpt")):
        newest = find_checkpoint("last", run.parent)
        content = torch.load(newest, weights_only=True)
        step = content["global_step"]
        if not rewind(run, step):
            log.log_metrics(content["metrics"] | {"epoch": content["epoch"]}, step - 1)
    elif (run / "metrics.csv").exists():
        (run / "metrics.csv").unlink()
    trained = make_trainer(
        *callbacks(), FinalWeights(), Checkpoints(**(checkpoints or {})), logger=[log], **trainer
    )
    trained.fit(
        make_module(**(module or {})),
        datamodule=make_data(run.parent, **(data or {})),
        ckpt_path=newest,
    )
    return trained
