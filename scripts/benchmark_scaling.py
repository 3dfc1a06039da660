"""How `fit` scales: with processes and threads, with the batch, with the number of entries.

    python scripts/benchmark_scaling.py --data instruction-data.json
    python scripts/benchmark_scaling.py --data instruction-data.json --layers 1    # a trial

Each row is a process of its own through the command line: gpt2-small's width with random weights,
rows packed and prefixes shared. Larger sets are the given one repeated, so that only their number
grows. `first step` is from the start of the command until a step is logged; `peak` is the most that
one process held.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gpt2-small.yaml"
WARM_UP = 2  # steps that are not counted


class Measured(NamedTuple):
    tokens_per_second: float
    first_step: float  # seconds
    peak_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--entries", type=int, nargs="*", default=[1_100, 11_000, 52_002])
    options = parser.parse_args()
    architecture = {"emb_dim": 768, "n_heads": 12, "n_layers": options.layers}
    common = {
        "model.architecture": json.dumps(architecture),
        "model.weights": "null",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": options.steps + WARM_UP,
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false",
        "loss_curve.every_n_steps": 0,
        "samples.indices": "[]",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def show(label: str, changes: dict[str, Any], data: Path, threads: int) -> None:
            found = measure(folder, common | changes | {"data.path": data}, threads)
            cells = [
                label,
                f"{found.tokens_per_second:.0f}",
                f"{found.first_step:.1f}",
                f"{found.peak_gb:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)

        print("| | tokens/s | first step, s | peak GB |\n| --- | --- | --- | --- |")
        data = options.data.resolve()
        show("1 process, 1 thread, batch 8", {}, data, 1)
        show("1 process, 2 threads, batch 8", {}, data, 2)
        two = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 4}
        show("2 processes, 1 thread each, batch 4 each", two, data, 1)
        for size in options.batches:
            show(f"2 threads, batch {size}", {"data.batch_size": size}, data, 2)
        for count in options.entries:
            repeated = repeat(data, count, folder / f"{count}.json")
            show(f"2 threads, batch 8, {count:,} entries", {}, repeated, 2)


def repeat(data: Path, count: int, path: Path) -> Path:
    """The data's entries over and over, until there are `count`."""
    entries = json.loads(data.read_text("utf-8"))
    path.write_text(json.dumps((entries * (count // len(entries) + 1))[:count]))
    return path


def measure(folder: Path, options: dict[str, Any], threads: int) -> Measured:
    """Run `fit` and read what it logged."""
    runs = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "lightning_sft", "fit", f"--config={CONFIG}"]
    command += [f"--{key}={value}" for key, value in options.items()] + [f"--run.dir={runs}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "LIGHTNING_SFT_CACHE": str(runs)}
    metrics = runs / "gpt2-small" / "version_0" / "metrics.csv"
    with (runs / "log").open("wb") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        first_step, done = 0.0, 0
        while not done:
            time.sleep(0.02)
            if not first_step and _steps(metrics):
                first_step = time.perf_counter() - begun
            # Not `poll`, which keeps to itself how much memory there was.
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status != 0:
        sys.exit((runs / "log").read_text())
    return Measured(median(_steps(metrics)[WARM_UP:]), first_step, usage.ru_maxrss * 1024 / 1e9)


def _steps(metrics: Path) -> list[float]:
    """Tokens per second of each step so far, over all processes."""
    if not metrics.exists():
        return []
    with metrics.open() as file:
        rows = csv.DictReader(file)
        return [float(value) for row in rows if (value := row["tokens_per_second"])]


if __name__ == "__main__":
    main()
