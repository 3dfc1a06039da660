"""Running the real command line in a test: a tiny model, a small data file, and what it left."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_sft.__main__ import main
from support import fork_server

TINY = {"emb_dim": 32, "n_heads": 4, "n_layers": 2, "context_length": 128, "drop_rate": 0.0}


def write_data(path: Path, count: int = 40) -> Path:
    """Entries of unequal length, a third of them with an input."""
    entries = [
        {
            "instruction": f"Say the number {n}" + " again" * (n % 5),
            "input": f"in words {n}" if n % 3 == 0 else "",
            "output": f"It is {n}." + " Indeed." * (n % 4),
        }
        for n in range(count)
    ]
    path.write_text(json.dumps(entries))
    return path


def write_config(folder: Path, **changes: Any) -> Path:
    """A config of a run that takes seconds; `changes` are dotted keys with `__` for the dots."""
    if "data__path" not in changes:
        changes["data__path"] = str(write_data(folder / "data.json"))
    config: dict[str, Any] = {
        "model": {
            "architecture": dict(TINY),
            "weights": None,
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 1e-3, "weight_decay": 0.1},
            },
        },
        "data": {"max_length": 128, "batch_size": 4},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "loss_curve": {"num_batches": 1},
        "generation": {"max_new_tokens": 8},
        "run": {"dir": str(folder / "runs"), "name": "tiny"},
    }
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(*arguments: Any) -> int:
    """Run a command in this process; its exit code."""
    return main([str(argument) for argument in arguments])


def command_popen() -> type[subprocess.Popen[str]]:
    """What starts commands quickly here: `subprocess.Popen`, or one like it."""
    if not fork_server.IS_POSSIBLE:
        return subprocess.Popen
    popen = fork_server.ForkedPopen
    if not hasattr(popen, "server"):
        popen.server = fork_server.ForkServer.launch()
    return popen


def spawn(
    *arguments: Any, cwd: Path, forked: bool = True, **environment: str
) -> subprocess.Popen[str]:
    """Start a command in a process of its own, on one thread.

    Args:
        arguments: Of the command line.
        cwd: Its folder.
        forked: From a process that has imported everything, where that is possible; else a new
            Python. See `fork_server` for the difference.
        environment: Variables on top of this process's own.
    """
    popen = command_popen() if forked else subprocess.Popen
    return popen(
        [sys.executable, "-m", "lightning_sft", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_apart(*arguments: Any, cwd: Path, **options: Any) -> tuple[int, str, str]:
    """Run a command in a process of its own: exit code, stdout, stderr."""
    process = spawn(*arguments, cwd=cwd, **options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def read_metrics(run_folder: Path, column: str) -> list[float]:
    """The values of a column of metrics.csv, where there are any."""
    with (run_folder / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def newest_checkpoint(run_folder: Path) -> Path:
    """The checkpoint of the most steps."""
    return max((run_folder / "checkpoints").glob("step-*.ckpt"))


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, as plain data."""
    return torch.load(path, weights_only=True)


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read stdout until a line holds `text`."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    error = process.stderr.read() if process.stderr else ""
    raise AssertionError(f"ended without {text!r}: {seen} {error}")
