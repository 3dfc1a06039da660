"""Where a model comes from: what its checkpoint and its run folder say, for a model card.

    >>> read_origin("runs/quickstart/version_0/checkpoints/step-001216.ckpt").losses
    {'train_loss': 0.042, 'val_loss': 0.064}

Only names and figures go on: folders of this machine and whatever looks like a key stay here.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, hide_keys
from lightning_sft.common.hub import find_repository
from lightning_sft.data.entries import KNOWN_SHA256, is_url, local_path
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.models.ready import read_run_config
from lightning_sft.runs.run_folder import run_of

# Of the trainer's many settings, those that the weights depend on.
TRAINER_KEYS = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")


@dataclass(frozen=True)
class Origin:
    """What is known of a model beside its weights; all of it may be missing.

    Args:
        name: Of the run, or of the weights' file.
        run: The run's folder.
        config: The run's config, as it was read.
        step, epoch: Of the checkpoint.
        losses: `train_loss` and `val_loss` of the checkpoint.
        generation: The run's own settings.
        data: File names of the data, with their sha256 where the file is at hand.
    """

    name: str
    run: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    epoch: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str | None] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The part of the config that shapes the weights, fit to be published."""
        model = {key: value for key, value in self.config.get("model", {}).items() if value}
        weights = model.get("weights")
        if isinstance(weights, str) and find_repository(weights) is None:
            model["weights"] = public_name(weights)
        data = {
            key: value
            for key, value in self.config.get("data", {}).items()
            if key not in ("path", "val_path", "test_path", "num_workers") and value is not None
        }
        trainer = {
            key: self.config["trainer"][key]
            for key in TRAINER_KEYS
            if self.config.get("trainer", {}).get(key) not in (None, -1)
        }
        found = {"model": model, "data": data, "trainer": trainer}
        seed = {key: self.config[key] for key in ("seed_everything",) if key in self.config}
        return seed | {key: value for key, value in found.items() if value}


def read_origin(path: str) -> Origin:
    """What the checkpoint or weights at `path`, and the run folder around it, say.

    Raises:
        InputError: The checkpoint or the run's config is no such thing.
    """
    file = Path(path)
    run = run_of(file)
    config: dict[str, Any] = {}
    if run is not None:
        config = read_run_config(run)
    name = run.parent.name if run is not None else file.stem if file.is_file() else file.name
    generation = config.get("generation") or {}
    step, epoch, losses = None, None, {}
    if file.suffix == ".ckpt":
        checkpoint = read_checkpoint(file, mmap=True)  # whoever loads the model checks the rest
        generation = checkpoint["hyper_parameters"].get("generation") or generation
        step, epoch = checkpoint["global_step"], checkpoint["epoch"]
        losses = checkpoint.get("metrics", {})
    return Origin(name, run, config, step, epoch, losses, generation, _data(config))


def public_name(path: str) -> str:
    """A file's name without its folders, or a URL without what may be secret in it."""
    if is_url(path):
        parts = urllib.parse.urlsplit(path)
        host = parts.netloc.rpartition("@")[2]
        return hide_keys(f"{parts.scheme}://{host}{parts.path}")
    return hide_keys(Path(path).name)


def _data(config: dict[str, Any]) -> dict[str, str | None]:
    """Names and digests of the data files; a digest is of the file as it is now."""
    found = {}
    for key in ("path", "val_path", "test_path"):
        if isinstance(source := config.get("data", {}).get(key), str):
            found[public_name(source)] = _digest(source)
    return found


def _digest(source: str) -> str | None:
    if is_url(source):
        return KNOWN_SHA256.get(source)
    for candidate in (source, files.shipped_folder() / source):
        try:
            return files.sha256_of(local_path(candidate))
        except (InputError, OSError):
            continue
    return None
