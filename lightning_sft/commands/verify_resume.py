"""`verify-resume`: the proof, on a user's own configuration, that a killed run loses nothing.

A short run is trained twice, through the command line and in a folder of its own: once without
disturbance, and once killed three times and resumed with `--ckpt_path last`. Weights, optimizer
state, schedule, losses and what was logged must then be the same, bit for bit. Two short epochs are
trained, so that a kill comes in the middle of one, right at its end, and in the next. The folder is
deleted at the end.

    python -m lightning_sft verify-resume --config gpt2-small.yaml --data.num_workers 2
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lightning_sft.common import files
from lightning_sft.common.arguments import find_option, read_layers
from lightning_sft.common.config_files import merge
from lightning_sft.common.errors import IncompleteError, InputError, ServiceError
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.runs.run_folder import saved_checkpoints

EPOCH = 4  # optimizer steps of the shortened epochs
STEPS = 2 * EPOCH
CHECKPOINT_EVERY = 2
KILLS = (3, 5, 7)  # steps done; each but the last checkpoint's own is behind a checkpoint
# What a checkpoint must agree in. Its other entries describe the program, not the training.
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "tokens_seen", "global_step")
COLUMNS = (
    "step",
    "train_loss",
    "lr",
    "tokens_seen",
    "train_eval_loss",
    "val_eval_loss",
    "val_loss",
    "reward_margin",
    "train_eval_reward_margin",
    "val_reward_margin",
)


def verify_resume(arguments: list[str]) -> int:
    """Train a configuration twice for eight steps, killed thrice and not at all, and compare.

    Args:
        arguments: The command line behind `verify-resume`: `fit`'s own options.

    Returns:
        0 when both runs are the same.

    Raises:
        IncompleteError: They differ; names in what.
        InputError: `fit` refuses the configuration.
        ServiceError: A run failed.
    """
    if find_option(arguments, "--ckpt_path") is not None:
        raise InputError("verify-resume: ckpt_path is not allowed; give a configuration alone")
    config = _read_config(arguments)
    place = Path(config.get("run", {}).get("dir", "runs"))
    was_there = place.is_dir()
    place.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=place) as folder:
            _verify(arguments, Path(folder), config)
    finally:
        if not was_there:
            with contextlib.suppress(OSError):
                place.rmdir()
    return 0


def _verify(arguments: list[str], folder: Path, config: dict[str, Any]) -> None:
    begun = time.monotonic()
    whole = TrainingRun("undisturbed", arguments, folder, config)
    whole.finish()
    print(f"undisturbed: {STEPS} steps, {time.monotonic() - begun:.0f} s", flush=True)
    disturbed = TrainingRun("disturbed", arguments, folder, config)
    for steps in KILLS:
        disturbed.kill_after(steps)
        print(f"killed after step {steps}; going on from {disturbed.newest()}", flush=True)
    disturbed.finish()
    differing = compare_runs(disturbed.path, whole.path)
    if differing:
        raise IncompleteError(
            f"verify-resume: the resumed run differs in {'; '.join(differing)}. Runs of this "
            "configuration cannot be told to go on exactly"
        )
    print(
        f"the same after {len(KILLS)} kills: weights, optimizer, schedule, losses and logs, bit "
        f"for bit ({time.monotonic() - begun:.0f} s)"
    )


class TrainingRun:
    """One of the two runs, in a process group of its own."""

    def __init__(
        self, name: str, arguments: list[str], folder: Path, config: dict[str, Any]
    ) -> None:
        accumulate = int(config.get("trainer", {}).get("accumulate_grad_batches") or 1)
        shortened = {
            "run.dir": folder,
            "run.name": name,
            "trainer.max_epochs": 1000,
            "trainer.max_steps": STEPS,
            "trainer.limit_train_batches": EPOCH * accumulate,
            "trainer.limit_val_batches": 2,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_progress_bar": "false",
            "checkpoints.every_n_steps": CHECKPOINT_EVERY,
            "checkpoints.keep_last": 1,
            "checkpoints.keep_best": "false",
            "loss_curve.every_n_steps": 2,
            "loss_curve.num_batches": 1,
            "samples.indices": "[]",
        }
        options = [f"--{key}={value}" for key, value in shortened.items()]
        self.command = [sys.executable, "-m", "lightning_sft", "fit", *arguments, *options]
        self.path = folder / name / "version_0"
        self.log = folder / f"{name}.log"

    def finish(self) -> None:
        """Run to the end."""
        process = self._start()
        try:
            if process.wait() != 0:
                self._fail(process.returncode)
        finally:
            _kill(process)

    def kill_after(self, steps: int) -> None:
        """Run on, and SIGKILL all its processes when so many steps are logged."""
        process = self._start()
        try:
            while process.poll() is None:
                if sum(bool(row) for row in _read_column(self.path, "train_loss")) >= steps:
                    return
                time.sleep(0.005)
        finally:
            _kill(process)
        self._fail(process.returncode)

    def newest(self) -> str:
        """Where the next start goes on."""
        names = [path.stem for path in saved_checkpoints(self.path)]
        return names[-1] if names else "the start"

    def _start(self) -> subprocess.Popen[bytes]:
        resume = ["--ckpt_path=last"]
        if not saved_checkpoints(self.path):
            resume = []
            shutil.rmtree(self.path, ignore_errors=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self.command, *resume], stdout=log, stderr=log, start_new_session=True
            )

    def _fail(self, code: int) -> None:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        reason = errors[-1].removeprefix("error: ") if errors else (lines or ["no output"])[-1]
        if code == InputError.exit_code:
            raise InputError(f"verify-resume: {reason}")
        raise ServiceError(f"verify-resume: fit ended early with exit code {code}: {reason}")


def compare_runs(run: Path, other: Path) -> list[str]:
    """What two runs differ in: their newest checkpoints, and what they logged.

    Returns:
        Names of parts of the checkpoints and columns of metrics.csv; empty when all is the same.
    """
    left, right = (
        read_checkpoint(saved_checkpoints(folder)[-1], mmap=True) for folder in (run, other)
    )
    differing = [key for key in COMPARED if not equal(left.get(key), right.get(key))]
    return differing + [c for c in COLUMNS if _read_column(run, c) != _read_column(other, c)]


def equal(left: Any, right: Any) -> bool:
    """Bitwise equality of nested containers of tensors and plain values."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def _read_column(run: Path, column: str) -> list[str]:
    try:
        lines = files.read_text(run / "metrics.csv").splitlines()
    except FileNotFoundError:
        return []
    return [row.get(column) or "" for row in csv.DictReader(lines)]


def _read_config(arguments: list[str]) -> dict[str, Any]:
    """The few settings that are needed here: of files, then of options in their two spellings."""
    config, rest = read_layers(arguments)
    for name in ("run.dir", "trainer.accumulate_grad_batches"):
        if (value := find_option(rest, f"--{name}")) is not None:
            section, key = name.split(".")
            config = merge([config, {section: {key: value}}])
    return config


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the whole group, so that no rank and no worker is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
