"""SIGTERM and SIGINT: finish the optimizer step, save, say how to go on, and exit with the code.

Lightning ends a run on SIGTERM with exit code 0, and cuts one off on Ctrl-C without saving. Here
the first signal lets the step that is under way finish on all ranks and saves; a second Ctrl-C
stops at once. `predict` has nothing to finish: its answers are on disk already.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning as L

from lightning_sft.common.errors import StoppedError
from lightning_sft.training.checkpoint import Checkpoints
from lightning_sft.training.lightning_internals import batches_done
from lightning_sft.training.steps import can_resume_behind


class StopOnSignal(L.Callback):
    """Turns a signal into an orderly end of `fit`, or into an immediate one of anything else.

    Args:
        checkpoints: Asked to save before a `fit` ends.
    """

    def __init__(self, checkpoints: Checkpoints | None = None) -> None:
        self.checkpoints = checkpoints
        self.received = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not earlier: Lightning sets its own handlers on the way, and puts the old ones
        # back at the end.
        self._listen(self._note)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(self._stop_now)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if can_resume_behind(trainer, batch_idx):  # else behind a validation or the epoch's end
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if can_resume_behind(trainer, batches_done(trainer) - 1, validated=True):
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        stop = bool(self.received)
        if trainer.world_size > 1:  # a scheduler may signal one rank only; all must stop together
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            path = self.checkpoints.save(trainer) if self.checkpoints is not None else None
            self._end(f"stopped after step {trainer.global_step}", path)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            _leave(signum, "stopped at once; what came behind the last checkpoint is lost")
        self.received = signum
        # Not print: the signal may have come in the middle of another one.
        os.write(1, b"\nfinishing this step and saving; Ctrl-C again stops at once\n")

    def _stop_now(self, signum: int, frame: FrameType | None) -> None:
        _leave(signum, "stopped; the answers so far are kept, the same command goes on")

    def _end(self, message: str, checkpoint: Any = None) -> None:
        if checkpoint is not None:
            message += f"; go on with: python -m lightning_sft fit --ckpt_path {checkpoint}"
        raise StoppedError(self.received or signal.SIGTERM, message)  # or another rank was asked

    @staticmethod
    def _listen(handler: Any) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, handler)


def _leave(signum: int, message: str) -> None:
    """End the process here and now.

    An exception could not be relied on: raised wherever the program happens to be, it may be taken
    for a failure of that place, and swallowed or renamed. All that counts is on disk already.
    """
    with contextlib.suppress(RuntimeError):  # the signal came while it was being written to
        sys.stdout.flush()
    os.write(2, f"\n{message}\n".encode())
    os._exit(128 + signum)


def die_with(launcher: int) -> None:
    """End this process soon after the one that started it: no rank outlives a killed rank 0.

    While ranks talk to each other they notice a death by themselves; one that still waits for the
    others to appear would wait for half an hour.

    Args:
        launcher: The id of that process. Not asked for here: it may have died meanwhile, and its
            child have been given to another.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os._exit(3)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
