"""Steps of full fine-tuning and of LoRA, in turn, in one run on one machine.

Both are `lightning_sft fit` with `gpt2-small.yaml` from random weights on the chapter's data, one
of them with `lora.yaml` on top: the same rows in the same order through the same Trainer. Each
measurement is a process of its own, one step to warm up and a few timed ones, full and LoRA
alternating, so that a slow minute of the machine meets both; a ratio is of two neighbours.

    python scripts/benchmark_lora.py --out benchmark-lora       # results.json and results.md
    python scripts/benchmark_lora.py --steps 2 --architecture '{"emb_dim": 32, "n_heads": 4}'
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import describe_machine
from benchmark_training import DoneError, Recorder, train_ours
from lightning_sft.data.entries import BOOK_DATA_URL

KINDS: dict[str, tuple[str, ...]] = {"full": (), "LoRA": ("lora.yaml",)}


def measure(name: str, run: Namespace) -> dict[str, Any]:
    """Seconds of a step and the most memory that the process ever held, in this process."""
    import torch

    torch.set_num_threads(run.threads)
    if name == "machine":
        return describe_machine()
    recorder = Recorder(run.steps)
    options: dict[str, Any] = {"bf16": run.bf16, "share_prefix": True}
    with contextlib.suppress(DoneError):
        train_ours(run, recorder, overlays=KINDS[name], **options)
    if not recorder.peak_gb:
        raise SystemExit(f"training ended before {run.steps} steps were timed")
    seconds = [after - before for before, after in itertools.pairwise(recorder.starts[1:])]
    batches = recorder.batches[1 : run.steps + 1]
    tokens = [int(batch["input_ids"].numel()) for batch in batches]
    return {"seconds": seconds, "peak_gb": recorder.peak_gb, "tokens": tokens}


def start(name: str, run: Namespace) -> dict[str, Any]:
    """`measure` in a process of its own, which prints its result as the last line."""
    command = [sys.executable, __file__, "--job", json.dumps([name, vars(run)])]
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tabulate(results: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds, and LoRA as a share of its neighbour in each round."""
    lines = ["| | seconds a step | lowest–highest round | peak GB |", "|---|---|---|---|"]
    means = {name: [sum(r["seconds"]) / len(r["seconds"]) for r in results[name]] for name in KINDS}
    peaks = {name: [r["peak_gb"] for r in results[name]] for name in KINDS}
    for name in KINDS:
        spread = f"{min(means[name]):.3f}–{max(means[name]):.3f}"
        lines.append(
            f"| {name} | {median(means[name]):.3f} | {spread} | {median(peaks[name]):.2f} |"
        )
    shares = [b / a for a, b in zip(means["full"], means["LoRA"], strict=True)]
    memory = [b / a for a, b in zip(peaks["full"], peaks["LoRA"], strict=True)]
    lines.append(
        f"| LoRA / full | {median(shares):.2f} | {min(shares):.2f}–{max(shares):.2f} "
        f"| {median(memory):.2f} |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure full fine-tuning and LoRA in turn.")
    book = os.environ.get("LIGHTNING_SFT_BOOK_DATA") or BOOK_DATA_URL
    parser.add_argument("--data", default=book, help="the chapter's instruction-data.json")
    parser.add_argument("--architecture", default="gpt2-small", help="or JSON of GPTConfig fields")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of both")
    parser.add_argument("--steps", type=int, default=6, help="timed training steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmark-lora"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name, settings = options.job
        print("\n" + json.dumps(measure(name, Namespace(**settings))))
        return
    architecture = options.architecture
    if architecture.startswith("{"):
        architecture = json.loads(architecture)
    run = Namespace(data=options.data, architecture=architecture, steps=options.steps)
    run.threads, run.bf16 = options.threads, options.bf16
    machine = start("machine", run)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
    for number in range(1, options.repeats + 1):
        for name, rounds in results.items():
            rounds.append(start(name, run))
            seconds, peak = rounds[-1]["seconds"], rounds[-1]["peak_gb"]
            step = sum(seconds) / len(seconds)
            print(
                f"{number}/{options.repeats} {name}: {step:.3f} s a step, {peak:.2f} GB", flush=True
            )
    seen = {str(result["tokens"]) for rounds in results.values() for result in rounds}
    if len(seen) > 1:
        raise SystemExit(f"they did not compute the same tokens: {seen}")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "settings": vars(run) | {"repeats": options.repeats}} | results
    (options.out / "results.json").write_text(json.dumps(record, indent=4))
    (options.out / "results.md").write_text(tabulate(results))
    print("\n" + tabulate(results))


if __name__ == "__main__":
    main()
