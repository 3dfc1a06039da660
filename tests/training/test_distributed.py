"""Two gloo processes through the real command line."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from support.runs import (
    load,
    newest_checkpoint,
    read_metrics,
    run,
    run_apart,
    spawn,
    write_config,
    write_data,
)

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("64-true", 1e-10)])
def test_how_entries_are_cut_into_batches_does_not_matter(
    tmp_path: Path, precision: str, tolerance: float
) -> None:
    """8×1, 4×2, 2×4, 1×8 and two ranks × 2 × 2: the same eight entries a step, the same update.

    36 training entries leave a last window of four, and their lengths differ.
    """
    data = write_data(tmp_path / "data.json", 44)
    states, losses = {}, {}
    cuts = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8), "ranks": (2, 2)}
    for name, (batch_size, accumulate) in cuts.items():
        config = write_config(
            tmp_path,
            data__path=str(data),
            data__batch_size=batch_size,
            data__drop_last=False,
            data__fractions=[0.82, 0.1, 0.08],
            trainer__accumulate_grad_batches=accumulate,
            trainer__limit_val_batches=0,
            loss_curve__every_n_steps=0,
            samples__indices=[],
            trainer__precision=precision,
            trainer__max_epochs=1,
            run__name=name,
        )
        two = TWO if name == "ranks" else []
        # A process of its own for two: ranks that Lightning starts run the same command line.
        code = (
            run_apart("fit", "--config", config, *two, cwd=tmp_path)[0]
            if two
            else run("fit", "--config", config)
        )
        assert code == 0
        folder = tmp_path / "runs" / name / "version_0"
        states[name] = load(newest_checkpoint(folder))["state_dict"]
        # Logged figures are float32, whatever they were computed in.
        losses[name] = read_metrics(folder, "train_loss")
    assert len(losses["8x1"]) == 5  # four whole windows and a short one
    for name in cuts:
        assert losses[name] == pytest.approx(losses["8x1"], abs=1e-5), name
        for key, value in states["8x1"].items():
            assert value.dtype == (torch.float64 if "64" in precision else torch.float32)
            assert torch.allclose(states[name][key], value, rtol=0, atol=tolerance), (name, key)


@pytest.mark.parametrize("count", [7, 1])
def test_predict_answers_each_entry_once_on_two_ranks(tmp_path: Path, count: int) -> None:
    config = write_config(tmp_path, trainer__max_epochs=1)
    assert run("fit", "--config", config) == 0
    checkpoint = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    few = write_data(tmp_path / "few.json", count)
    split = ["--data.test_path", few, "--data.val_path", few, "--generation.batch_size=2"]
    alone = run("predict", "--ckpt_path", checkpoint, *split)
    assert alone == 0
    target = tmp_path / "runs/tiny/version_0/instruction-data-with-response.json"
    expected = json.loads(target.read_text())
    target.unlink()
    code, _, err = run_apart("predict", "--ckpt_path", checkpoint, *split, *TWO, cwd=tmp_path)
    assert code == 0, err
    assert json.loads(target.read_text()) == expected
    assert len(expected) == count


def test_validation_on_two_ranks_counts_no_row_twice(tmp_path: Path) -> None:
    config = write_config(tmp_path, data__fractions=[0.7, 0.1, 0.2], trainer__max_epochs=1)
    assert run("fit", "--config", config) == 0
    checkpoint = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    val_loss = read_metrics(tmp_path / "runs/tiny/version_0", "val_loss")[-1]
    code, out, err = run_apart("validate", "--ckpt_path", checkpoint, *TWO, cwd=tmp_path)
    assert code == 0, err
    shown = float(next(line for line in out.splitlines() if "val_loss" in line).split("│")[2])
    assert shown == pytest.approx(val_loss, abs=1e-5)


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_a_dead_rank_takes_the_run_down_and_leaves_no_orphan(tmp_path: Path, victim: str) -> None:
    config = write_config(tmp_path, data__batch_size=1, trainer__max_epochs=50)
    process = spawn("fit", "--config", config, *TWO, cwd=tmp_path, forked=False)
    assert process.stdout is not None
    for line in process.stdout:
        if "(Step 000005)" in line:
            break
    children = _children(process.pid)
    assert len(children) == 1
    os.kill(children[0] if victim == "child" else process.pid, signal.SIGKILL)
    begun = time.monotonic()
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=60)
    assert process.returncode == (3 if victim == "child" else -signal.SIGKILL), err
    if victim == "child":
        assert "error: fit: another process of this run is gone" in err
    while any(Path(f"/proc/{pid}").exists() and not _is_zombie(pid) for pid in children):
        assert time.monotonic() - begun < 60
        time.sleep(0.2)


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
