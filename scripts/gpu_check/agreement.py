"""Whether what should be equal is equal on this device.

Tolerances are of a step's loss, which begins near 11. In float32 kernels only sum in another order;
bfloat16 products have 8 bits, and twenty steps of training carry their rounding on. None of these
limits was tried on a GPU yet: what was found stands beside each of them.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from gpu_check.data import chapter_file, make_data
from gpu_check.notebook import Notebook, SkipError, read_entries
from gpu_check.ours import Fit, fit, make_module
from gpu_check.setting import Setting
from gpu_check.stopwatch import Stopwatch

FLOAT32, BFLOAT16 = 1e-3, 0.05
BATCH_SIZE = 8


def train_briefly(
    setting: Setting,
    *,
    layout: dict[str, Any] | None = None,
    compile: bool = False,
    **trainer: Any,
) -> Fit:
    """Twenty steps of gpt2-small on rows of the chapter's kind, from the same random weights."""
    module = make_module(setting, "gpt2-small", lr=1e-3, compile=compile)
    settings: dict[str, Any] = {"batch_size": setting.pick(BATCH_SIZE, 2), "max_length": 128}
    data = make_data(module, chapter_file(setting), **settings | (layout or {}))
    stopwatch = Stopwatch(setting.device, 0, setting.pick(20, 2), rounds=1)
    return fit(setting, module, data, stopwatch, **trainer)


def compare(
    notebook: Notebook, name: str, one: list[float], two: list[float], limit: float
) -> None:
    """Check the largest difference of two runs' losses, step by step."""
    difference = max(abs(a - b) for a, b in zip(one, two, strict=True))
    # `max` passes over a NaN that is not the first.
    difference = float("nan") if any(x != x for x in (*one, *two)) else difference
    notebook.check(name, difference, limit, first=one[0], last=one[-1])


def check_device(notebook: Notebook) -> None:
    """The device's logits beside the CPU's, for both families."""
    from lightning_sft.training.device_check import TOLERANCE, compare_with_cpu

    for name in ("gpt2-small", "smollm2-135m"):
        with notebook.attempt(name):
            model = make_module(notebook.setting, name).network.to(notebook.setting.device)
            compare_with_cpu(model, torch.arange(64))  # raises where they differ
            notebook.write(f"{name}: logits as the CPU's", passed=True, allowed=TOLERANCE)


def check_precision(notebook: Notebook) -> None:
    """The same losses in float32, compiled, and in bfloat16."""
    setting = notebook.setting
    exact = train_briefly(setting)
    for name, options, limit in (
        ("bf16-mixed", {"precision": "bf16-mixed"}, BFLOAT16),
        ("compiled", {"compile": True}, FLOAT32),
        ("compiled bf16-mixed", {"compile": True, "precision": "bf16-mixed"}, BFLOAT16),
    ):
        with notebook.attempt(name):
            found = train_briefly(setting, **options)
            compare(notebook, f"{name} as fp32", exact.losses, found.losses, limit)


def check_layouts(notebook: Notebook) -> None:
    """The same losses padded, packed, and with prefixes shared."""
    setting = notebook.setting
    padded = train_briefly(setting)
    for name, layout in (
        ("packed", {"padding_free": True}),
        ("shared prefix", {"share_prefix": True}),
    ):
        with notebook.attempt(name):
            found = train_briefly(setting, layout=layout)
            compare(notebook, f"{name} as padded", padded.losses, found.losses, FLOAT32)


def check_repeat(notebook: Notebook) -> None:
    """Two runs with `deterministic` end in the same bits."""
    options: dict[str, Any] = {"deterministic": True, "layout": {"share_prefix": True}}
    for precision in ("32-true", "bf16-mixed"):
        with notebook.attempt(precision):
            states = []
            for _ in range(2):
                found = train_briefly(notebook.setting, precision=precision, **options)
                states.append(copy.deepcopy(found.module.network.cpu().state_dict()))
            one, two = states
            differing = sum(not torch.equal(one[name], two[name]) for name in one)
            notebook.check(f"{precision}: weights that differ", differing, 0)


def check_sharded_one(notebook: Notebook) -> None:
    """One device, whole and sharded: the same losses, which the run on all cards is compared to."""
    whole = train_briefly(notebook.setting)
    notebook.write("whole", losses=whole.losses)
    sharded = train_briefly(notebook.setting, strategy="sharded")
    compare(notebook, "sharded as whole", whole.losses, sharded.losses, FLOAT32)


def check_sharded_all(notebook: Notebook) -> None:
    """All cards, each with its share of the same batches."""
    setting = notebook.setting
    if setting.device != "cuda" or torch.cuda.device_count() < 2:
        raise SkipError("there is one device")
    cards = torch.cuda.device_count()
    if BATCH_SIZE % cards:
        raise SkipError(f"{cards} cards do not divide a batch of {BATCH_SIZE}")
    # Lightning runs this whole part once more for each other rank.
    share = {"batch_size": BATCH_SIZE // cards}
    options: dict[str, Any] = {"strategy": "sharded", "devices": cards, "layout": share}
    found = train_briefly(setting, **options)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    path = notebook.path.with_name("sharded.jsonl")
    known = [entry["losses"] for entry in read_entries(path) if "losses" in entry]
    if known:
        compare(notebook, f"{cards} cards as one", known[-1], found.losses, FLOAT32)
    else:
        notebook.write(f"{cards} cards", skipped="the part `sharded` left no losses to compare")
