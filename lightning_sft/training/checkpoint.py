"""Checkpoints that are whole or not there, and the final weights as the book saves them.

`DurableCheckpointIO` writes beside the final name and renames; the sidecar `<name>.json` holds the
file's sha256 and what `last` and `best` are chosen by. `Checkpoints` decides when to save and what
to keep. `find_checkpoint` turns `last`, `best` or a path into a file that is known to be whole.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import IO, Any, cast

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_sft.common import files
from lightning_sft.common.errors import IncompleteError, InputError, ServiceError
from lightning_sft.models.checkpoint_file import (
    _facts,
    check_whole,
    read_checkpoint,
    sidecar,
)
from lightning_sft.models.loading import book_state_dict
from lightning_sft.models.lora import merged_copy
from lightning_sft.models.registry import model_name
from lightning_sft.runs.run_folder import saved_checkpoints, version_numbers
from lightning_sft.training.lightning_internals import batches_done
from lightning_sft.training.loggers import folder_of
from lightning_sft.training.module import SFTModule
from lightning_sft.training.preference_loss import PREFERENCE_METRICS
from lightning_sft.training.sharding import gather_model, is_sharded
from lightning_sft.training.steps import can_resume_behind, count_steps, is_time_up

# What a checkpoint says of its step. Lightning logs a step after the checkpoint callbacks, so that
# a kill in between would lose the step's row if the checkpoint did not have it.
STEP_METRICS = ("train_loss", "lr", "tokens_seen", "tokens_per_second", *PREFERENCE_METRICS)
METRICS = (*STEP_METRICS, "val_loss")


class DurableCheckpointIO(CheckpointIO):
    """Saves through a temporary file in the same folder, and loads nothing but data."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        # A sidecar of an older file of that name must not vouch for the new one.
        sidecar(path).unlink(missing_ok=True)
        with files.atomic_write(path, "wb") as file:
            hashed = _Hashed(file)
            hashed.save(checkpoint)
        metrics = checkpoint.get("metrics", {})
        facts = {"sha256": hashed.digest.hexdigest(), "step": checkpoint.get("global_step", 0)}
        files.write_json(sidecar(path), facts | {"epoch": checkpoint.get("epoch", 0)} | metrics)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        # The sidecar last: a file without one is whole, a sidecar without its file is harmless.
        Path(path).unlink(missing_ok=True)
        sidecar(Path(path)).unlink(missing_ok=True)


class _Hashed:
    """A file that digests what is written to it, so that the sidecar costs no second reading."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: BaseException | None = None

    def save(self, value: Any) -> None:
        """`torch.save`, with a full disk reported as what it is."""
        try:
            torch.save(value, cast("IO[bytes]", self))
        except RuntimeError:
            raise self.error or ServiceError("a checkpoint could not be written") from None

    def write(self, data: Any) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except BaseException as error:  # a full disk, or a second Ctrl-C
            self.error = error  # torch turns it into a RuntimeError without a reason
            raise

    def flush(self) -> None:
        self.file.flush()


class Checkpoints(Checkpoint):
    """Saves after every epoch (behind its validation) and, if wanted, every few steps.

    Kept are the newest `keep_last` and the one with the lowest `val_loss`.

    Args:
        every_n_steps: Also save each time that many optimizer steps are done.
        keep_last: How many of the newest stay.
        keep_best: Whether the one with the lowest `val_loss` stays.
    """

    def __init__(
        self, every_n_steps: int | None = None, keep_last: int = 1, keep_best: bool = True
    ) -> None:
        if keep_last < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise InputError("checkpoints: keep_last and every_n_steps must be >= 1")
        self.every_n_steps, self.keep_last, self.keep_best = every_n_steps, keep_last, keep_best
        self._validated_step = -1  # the step of the newest `val_loss`

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out now, not after an epoch, that the folder cannot take a checkpoint."""
        run = folder_of(trainer)
        if run is not None and trainer.is_global_zero:
            folder = run / "checkpoints"
            for torn in folder.glob(".step-*.tmp"):  # of a kill; this process is the only writer
                torn.unlink()
            with files.atomic_write(folder / ".probe") as file:
                file.write("can be written")
            (folder / ".probe").unlink()
            # What is trained and AdamW's two moments; one more is written before an old one goes.
            # At the end come the weights as the book saves them.
            sizes = {p: p.numel() * p.element_size() for p in pl_module.parameters()}
            one = 3 * sum(size for p, size in sizes.items() if p.requires_grad)
            final = sum(sizes.values())
            needed = one * (self.keep_last + self.keep_best + 1) + final
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise ServiceError(
                    f"{folder}: checkpoints will need about {needed / 1e9:.1f} GB, "
                    f"{free / 1e9:.1f} GB are free; free some or set run.dir"
                )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._save_if_due(trainer, can_resume_behind(trainer, batch_idx))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated_step = trainer.global_step
            batch_idx = batches_done(trainer) - 1
            self._save_if_due(trainer, can_resume_behind(trainer, batch_idx, validated=True))

    def _save_if_due(self, trainer: L.Trainer, possible: bool) -> None:
        if self.every_n_steps and possible and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> Path | None:
        """Save, then delete what is no longer to be kept; where the checkpoint is."""
        run = folder_of(trainer)
        if run is None:
            return None
        folder = run / "checkpoints"
        path = folder / f"step-{trainer.global_step:06d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            self._prune(trainer, run)
        return path

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # An older validation's loss would be another step's.
        validated = self._validated_step == trainer.global_step
        names = METRICS if validated else STEP_METRICS
        metrics = trainer.callback_metrics
        checkpoint["metrics"] = {name: float(metrics[name]) for name in names if name in metrics}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Demand that the run has done its steps.

        Raises:
            IncompleteError: Some are missing; says how many.
        """
        done, wanted = trainer.global_step, count_steps(trainer, trainer.num_training_batches)
        if wanted is None or done >= wanted:
            return
        missing = f"{wanted - done} of {wanted} optimizer steps"
        if trainer.should_stop and not is_time_up(trainer):
            rank_zero_info(f"stopped early by a callback, {missing} before the end")
            return
        reason = "trainer.max_time is over" if is_time_up(trainer) else "training ended early"
        raise IncompleteError(
            f"fit: {reason}: {missing} are missing; go on with --ckpt_path last"
            + (" and a longer trainer.max_time" if is_time_up(trainer) else "")
        )

    def _prune(self, trainer: L.Trainer, run: Path) -> None:
        saved = saved_checkpoints(run)
        keep = set(saved[-self.keep_last :])
        if self.keep_best:
            keep |= {best} if (best := _best(saved)) else set()
        for path in saved:
            if path not in keep:
                trainer.strategy.remove_checkpoint(path)


def _best(paths: list[Path]) -> Path | None:
    scored = [(_facts(path)["val_loss"], path) for path in paths if "val_loss" in _facts(path)]
    return min(scored)[1] if scored else None


def find_checkpoint(wanted: str, run: Path) -> Path:
    """The checkpoint that `--ckpt_path` means.

    Args:
        wanted: A path; `last`, the newest whole checkpoint of the run; or `best`, the one of the
            lowest `val_loss`.
        run: `runs/<name>`, whose newest version with checkpoints counts.

    Raises:
        InputError: There is none, it is missing, or it is a URL.
    """
    if wanted not in ("last", "best"):
        if "://" in wanted:
            raise InputError("ckpt_path: a URL is not allowed; download the file and give its path")
        path = Path(wanted).expanduser()
        if not path.is_file():
            raise InputError(f"ckpt_path: {path} is not a file; give a path, last or best")
        return path
    for number in reversed(version_numbers(run)):
        version = run / f"version_{number}"
        saved = saved_checkpoints(version)
        if wanted == "best" and (best := _best(saved)):
            return best
        for path in reversed(saved):
            try:
                check_whole(path)
                read_checkpoint(path, mmap=True)  # the tensors were digested; torch checks none
            except InputError as error:
                print(f"skipped: {error}")
                continue
            return path
    raise InputError(f"ckpt_path: {wanted}: there is no whole checkpoint under {run}")


class FinalWeights(L.Callback):
    """Saves the fine-tuned weights as `<model>-sft.pth`, which the book's own code loads.

    Adapters are merged into them.
    """

    def __init__(self) -> None:
        self._written = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that was killed behind its last step has nothing to train, but still to write."""
        if not self._written:
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._written = True
        run = folder_of(trainer)
        assert isinstance(pl_module, SFTModule)
        sharded = is_sharded(trainer)
        model = gather_model(trainer, pl_module.config) if sharded else pl_module.network
        if run is not None and trainer.is_global_zero and model is not None:
            path = run / f"{model_name(pl_module.config)}-sft.pth"
            with files.atomic_write(path, "wb") as file:
                _Hashed(file).save(book_state_dict(merged_copy(model)))
            print(f"model saved as {path}")
