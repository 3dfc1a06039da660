"""`plan`: its estimates against measured memory, its steps against `fit`, and its advice obeyed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_sft import SFTModule
from lightning_sft.planning.footprint import count_parameters, estimate_memory, measure_optimizer
from support.activations import make_batch, measure_activations
from support.runs import read_metrics, run, write_config

ARCHITECTURE = {"emb_dim": 64, "n_heads": 4, "n_layers": 4, "context_length": 256}


def make_module(**changes: Any) -> SFTModule:
    module = SFTModule(ARCHITECTURE | changes, weights=None)
    module.configure_model()
    return module.train()


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("layout", ["padded", "padding_free", "share_prefix"])
def test_activations_are_what_autograd_keeps(layout: str, precision: str, drop_rate: float) -> None:
    module = make_module(drop_rate=drop_rate)
    batch, shape = make_batch(layout)
    measured = measure_activations(module, batch, mixed=precision == "bf16-mixed")
    estimate = estimate_memory(module, shape, precision).activations
    assert estimate == pytest.approx(measured, rel=0.05 if precision == "32-true" else 0.15)


@pytest.mark.parametrize("layout", ["padded", "share_prefix"])
def test_the_sum_covers_the_measured_peak(layout: str) -> None:
    """Allocations of a whole step, the optimizer's state included, against the estimate."""
    module = make_module()
    batch, shape = make_batch(layout)
    module.lr_scheduler = None
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)

    def step() -> None:
        loss, count = module.sum_loss(batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    parameters, _ = count_parameters(module)
    before = 3 * 4 * parameters  # weights and AdamW's two moments were there already
    estimate = estimate_memory(module, shape).total
    assert before + peak <= estimate * 1.05
    assert estimate <= 1.6 * (before + peak)


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [
        (lambda params: torch.optim.AdamW(params, lr=1e-3), 8),
        (lambda params: torch.optim.SGD(params, lr=1e-3), 0),
        (lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9), 4),
    ],
)
def test_optimizer_state_is_measured(optimizer: Any, bytes_each: int) -> None:
    module = SFTModule(ARCHITECTURE, weights=None, optimizer=optimizer)
    assert measure_optimizer(module) == pytest.approx(bytes_each, abs=0.01)


def test_parameters_without_memory() -> None:
    module = SFTModule("gpt2-xl", weights=None)
    # 1,558 M as OpenAI counts them, with one matrix for embedding and head, and a second one here.
    assert count_parameters(module) == (1_557_611_200 + 50257 * 1600,) * 2
    assert module.model is None


def test_plan_of_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, data__batch_size=8)
    before = set(tmp_path.rglob("*"))
    assert run("plan", "--config", config, "--trainer.max_epochs", "3") == 0
    out = capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before
    assert "4 optimizer steps an epoch, 12 in all" in out  # 34 rows, batches of 8, drop_last
    assert re.search(r"longest +8 rows of up to \d+ tokens", out)
    assert re.search(r"a step +\d+\.\d\d s at most on this cpu", out)
    assert re.search(r"time +[\d.]+ s of training", out)


def test_steps_are_those_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {"loss_curve__every_n_steps": 0, "samples__indices": [], "trainer__max_epochs": 2}
    config = write_config(
        tmp_path, trainer__accumulate_grad_batches=3, data__drop_last=False, **quick
    )
    assert run("plan", "--config", config, "--probe_steps", "0") == 0
    promised = int(re.search(r"(\d+) in all", capsys.readouterr().out)[1])  # type: ignore[index]
    assert run("fit", "--config", config) == 0
    folder = tmp_path / "runs/tiny/version_0"
    assert len(read_metrics(folder, "train_loss")) == promised
    # The config that a run saves is planned like the one it came from.
    assert run("plan", "--config", folder / "config.yaml", "--probe_steps", "0") == 0
    assert f"{promised} in all" in capsys.readouterr().out


def test_weights_are_not_wanted(tmp_path: Path) -> None:
    """Neither a missing file nor a model that would have to be downloaded stops a plan."""
    config = write_config(tmp_path, model__weights="/nowhere/model.safetensors")
    assert run("plan", "--config", config, "--probe_steps", "1") == 0


def test_large_models_are_planned_without_making_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model__architecture="gpt2-xl", model__weights="gpt2-xl")
    assert run("plan", "--config", config, "--memory_gb", "1") == 4
    err = capsys.readouterr().err
    assert "one row does not fit either" in err


def test_advice_makes_the_same_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pair that fits is obeyed, and the losses are those of the batch that did not fit."""
    quick = {"loss_curve__every_n_steps": 0, "samples__indices": [], "trainer__max_epochs": 1}
    config = write_config(tmp_path, data__batch_size=8, trainer__limit_val_batches=0, **quick)
    assert run("plan", "--config", config, "--memory_gb", "0.108") == 4
    err = capsys.readouterr().err
    advice = re.search(r"(--data.batch_size 4) (--trainer.accumulate_grad_batches 2)", err)
    assert advice is not None, err
    options = f"{advice[1]} {advice[2]}".split()
    assert (
        run("plan", "--config", config, "--memory_gb", "0.108", "--probe_steps", "0", *options) == 0
    )
    assert run("fit", "--config", config) == 0
    assert run("fit", "--config", config, *options) == 0
    whole, cut = (read_metrics(tmp_path / f"runs/tiny/version_{n}", "train_loss") for n in (0, 1))
    assert cut == pytest.approx(whole, abs=1e-5)
    # The negative control: half the batch without the accumulation is another run.
    assert run("fit", "--config", config, *advice[1].split()) == 0
    other = read_metrics(tmp_path / "runs/tiny/version_2", "train_loss")
    assert other[: len(whole)] != pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_budget_of_tokens_is_planned_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], padding_free: bool
) -> None:
    """What is said, how many steps, and the advice where it does not fit."""
    quick = {"loss_curve__every_n_steps": 0, "samples__indices": [], "trainer__max_epochs": 1}
    tokens = {"data__max_tokens": 600, "data__padding_free": padding_free}
    config = write_config(tmp_path, **tokens, **quick)
    assert run("plan", "--config", config, "--probe_steps", "0") == 0
    out = capsys.readouterr().out
    assert "an epoch of at most 600 tokens on each of 1 device(s)" in out
    promised = int(re.search(r"(\d+) in all", out)[1])  # type: ignore[index]
    computed = int(re.search(r"longest .* (\d+) computed", out)[1])  # type: ignore[index]
    assert 400 < computed <= 600
    together = float(re.search(r"together +([\d.]+)", out)[1])  # type: ignore[index]
    assert run("fit", "--config", config) == 0
    assert len(read_metrics(tmp_path / "runs/tiny/version_0", "train_loss")) == promised
    capsys.readouterr()
    less = ["--probe_steps", "0", "--memory_gb", str(together - 0.001)]
    assert run("plan", "--config", config, *less) == 4
    error = capsys.readouterr().err
    assert "a step of at most 600 tokens takes" in error
    advice = re.search(r"(--data.max_tokens 300) (--trainer.accumulate_grad_batches 2)", error)
    assert advice is not None, error
    assert run("plan", "--config", config, *less, *f"{advice[1]} {advice[2]}".split()) == 0
    assert run("plan", "--config", config, "--memory_gb", "0.001") == 4
    assert "tokens, the longest row, does not fit either" in capsys.readouterr().err


def test_an_absent_accelerator_is_planned_without_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    config = write_config(tmp_path, trainer__accelerator="cuda", trainer__devices=2)
    assert run("plan", "--config", config) == 0
    out = capsys.readouterr().out
    assert "no time estimate" in out
    assert "on each of 2 device(s)" in out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--memory_db", "3"], "memory_gb"),
        (["--probe_steps", "-1"], "probe_steps"),
        (["--memory_gb", "nan"], "memory_gb"),
        (["--trainer.max_epochs", "-1"], "trainer.max_epochs"),
        (["--data.batch_size", "99"], "data.batch_size"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    assert run("plan", "--config", write_config(tmp_path), *options) == 2
    err = capsys.readouterr().err
    assert named in err
    assert "Traceback" not in err
