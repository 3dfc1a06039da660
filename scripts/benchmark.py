"""Training and generation beside the peers, in one run on one machine.

Ours runs through its own command line and Trainer; beside it the chapter's loop around the package
`llms_from_scratch`, transformers in a plain loop, and TRL's SFTTrainer: one architecture, random
weights, the same rows in the chapter's order. GPT-2's head is untied, as the chapter's is. Each
measurement is a process of its own, and the peers take turns, so that a slow minute of the machine
meets all of them. A peer that is not installed is left out. docs/performance.md says what each
figure means.

    pip install -e '.[bench]' && pip install --no-deps llms-from-scratch
    python scripts/benchmark.py --out benchmark              # results.json, .md and .png in there
    python scripts/benchmark.py --architecture smollm2-135m --tokenizer MODEL.gguf --style chatml
    python scripts/benchmark.py --quick --architecture '{"emb_dim": 32, "n_heads": 4}'
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

# Nothing imports torch outside a function: Linux counts a parent's memory into its child's peak, so
# the process that starts the measurements has to stay small.
from benchmark_generation import (
    answer_chapter,
    answer_ours,
    answer_transformers,
    measure_generation,
)
from benchmark_training import (
    SEED,
    measure_training,
    train_chapter,
    train_ours,
    train_transformers,
    train_trl,
)
from lightning_sft.data.entries import BOOK_DATA_URL

# Name → function and options. A name's first word is whose it is; behind × are the rows.
PACKAGES = {"chapter": "llms_from_scratch", "TRL": "trl", "ours": "lightning_sft"}
PEERS: dict[str, dict[str, tuple[Callable[..., Any], dict[str, Any]]]] = {
    "training": {"chapter fp32": (train_chapter, {})},
    "generation": {"chapter fp32 × 1": (answer_chapter, {"rows": 1, "most": 3})},
}
for _name, _bf16 in (("fp32", {"bf16": False}), ("bf16", {"bf16": True})):
    PEERS["training"] |= {
        f"ours {_name}": (train_ours, _bf16 | {"share_prefix": True}),
        f"ours padded {_name}": (train_ours, _bf16 | {"share_prefix": False}),
        f"transformers {_name}": (train_transformers, _bf16),
        f"TRL {_name}": (train_trl, _bf16),
    }
    PEERS["generation"] |= {
        f"ours {_name} × 1": (answer_ours, _bf16 | {"rows": 1, "most": 4}),
        f"transformers {_name} × 1": (answer_transformers, _bf16 | {"rows": 1, "most": 4}),
        f"ours {_name} × 8": (answer_ours, _bf16 | {"rows": 8}),
        f"transformers {_name} × 8": (answer_transformers, _bf16 | {"rows": 8}),
        f"ours {_name} × 32": (answer_ours, _bf16 | {"rows": 32}),
        f"transformers {_name} × 32": (answer_transformers, _bf16 | {"rows": 32}),
        f"ours {_name} × 110": (answer_ours, _bf16 | {"rows": 110}),
    }


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    file = Path("/proc/cpuinfo")
    cpu = file.read_text() if file.exists() else ""
    models = [line.split(": ")[1] for line in cpu.splitlines() if line.startswith("model name")]
    built = torch.__config__.show().splitlines()
    packages = ["lightning-sft", "torch", "lightning", "llms-from-scratch", "transformers", "trl"]
    found = [name for name in packages if importlib.util.find_spec(name.replace("-", "_"))]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": os.cpu_count(),
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": [f for f in ("avx512_bf16", "amx_bf16") if f in cpu],
        "blas": [line.strip(" -") for line in built if "Math Kernel" in line or "DNN v" in line],
        "threads": torch.get_num_threads(),
        "load before": os.getloadavg()[0],
        "versions": {name: version(name) for name in found},
    }


def run_job(part: str, name: str, run: Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(run.threads)
    torch.manual_seed(SEED)
    if part == "machine":
        return describe_machine()
    function, options = PEERS[part][name]
    measure = measure_training if part == "training" else measure_generation
    return measure(function, run, **options)


def start_job(part: str, name: str, run: Namespace) -> dict[str, Any]:
    """One measurement in a process of its own, which prints its result as the last line."""
    job = json.dumps([part, name, vars(run)])
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--job", job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part}, {name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


Results = dict[str, list[dict[str, Any]]]


def measure_in_turn(part: str, repeats: int, run: Namespace, left_out: str) -> Results:
    """Every peer once, then every peer again, but for those whose name holds `left_out`."""
    names = [name for name in PEERS[part] if not left_out or left_out not in name]
    if run.tokenizer:  # of another family than the chapter's model
        names = [name for name in names if not name.startswith("chapter")]
    needed = {name: PACKAGES.get(name.split()[0], "transformers") for name in names}
    results: Results = {name: [] for name in needed if importlib.util.find_spec(needed[name])}
    for name, package in needed.items():
        if name not in results:
            print(f"skipped: {name} ({package} is not installed)")
    for number in range(1, repeats + 1):
        for name, rounds in results.items():
            rounds.append(start_job(part, name, run))
            print(f"{part} {number}/{repeats} {name}: {rounds[-1]['rate']:.1f}", flush=True)
    seen = {str(result.get("supervised")) for rounds in results.values() for result in rounds}
    if len(seen) > 1:
        raise SystemExit(f"the peers did not train on the same targets: {seen}")
    return results


def tabulate(part: str, results: Results) -> str:
    """A Markdown table: medians over the rounds, and how many times as fast ours is."""

    def show(name: str, field: str, form: str) -> str:
        values = [result[field] for result in results.get(name, []) if field in result]
        return format(median(values), form) if values else "–"

    head = [part, "tokens/s", "lowest–highest", "peak GB", "matrix products", "Lightning's own"]
    lines = [[*head, "ours fp32 is", "ours bf16 is"], ["---"] * 8]
    for name, rounds in results.items():
        rates = [result["rate"] for result in rounds]
        cells = [name, f"{median(rates):.1f}", f"{min(rates):.1f}–{max(rates):.1f}"]
        cells += [show(name, "peak_gb", ".2f"), show(name, "products", ".0%")]
        cells += [show(name, "overhead", ".1%")]
        for precision in ("fp32", "bf16"):
            # The same number of rows for one that takes batches, all for the chapter's one by one.
            rows = name.partition(" × ")[2]
            same = f" × {'110' if name.startswith('chapter') else rows}" if rows else ""
            ours = show(f"ours {precision}{same}", "rate", "")
            cells.append("–" if ours == "–" else f"{float(ours) / median(rates):.2f}×")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(results: dict[str, Results], path: Path) -> None:
    """Bars of the median rates, one panel for each part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 5), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        peers = results[part]
        rates = [median(result["rate"] for result in rounds) for rounds in peers.values()]
        colours = ["C0" if name.startswith("ours") else "C7" for name in peers]
        axes.bar_label(axes.barh(list(peers), rates, color=colours), fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(f"{part}, tokens a second")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure training and generation beside peers.")
    book = os.environ.get("LIGHTNING_SFT_BOOK_DATA") or BOOK_DATA_URL
    parser.add_argument("--data", default=book, help="the chapter's instruction-data.json")
    parser.add_argument("--only", choices=list(PEERS))
    parser.add_argument("--architecture", default="gpt2-small", help="or JSON of GPTConfig fields")
    parser.add_argument("--tokenizer", default="", help="folder or GGUF, for another than GPT-2")
    parser.add_argument("--style", default="alpaca", help="prompt style of the rows")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all peers")
    parser.add_argument("--steps", type=int, default=6, help="timed training steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no_bf16", action="store_true", help="for processors that emulate it")
    parser.add_argument("--quick", action="store_true", help="one round, little of everything")
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.job:
        part, name, settings = options.job
        print("\n" + json.dumps(run_job(part, name, Namespace(**settings))))
        return
    repeats, steps, new_tokens, prompts = options.repeats, options.steps, 64, 110
    if options.quick:
        repeats, steps, new_tokens, prompts = 1, 2, 8, 16
    architecture = options.architecture
    if architecture.startswith("{"):
        architecture = json.loads(architecture)
    run = Namespace(data=options.data, architecture=architecture, steps=steps)
    run.tokenizer, run.style = options.tokenizer, options.style
    run.threads, run.new_tokens, run.prompts = options.threads, new_tokens, prompts
    machine = start_job("machine", "", run)
    print(json.dumps(machine, indent=4), flush=True)
    parts = [options.only] if options.only else list(PEERS)
    left_out = "bf16" if options.no_bf16 else ""
    results = {part: measure_in_turn(part, repeats, run, left_out) for part in parts}
    table = "\n".join(tabulate(part, results[part]) for part in parts)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "settings": vars(run) | {"repeats": repeats}} | results
    (options.out / "results.json").write_text(json.dumps(record, indent=4))
    (options.out / "results.md").write_text(table)
    draw(results, options.out / "results.png")
    print("\n" + table)


if __name__ == "__main__":
    main()
