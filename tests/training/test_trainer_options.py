"""Every option of Lightning's Trainer has its row in docs/trainer-options.md, and its test."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sft.commands.verify_resume import equal
from lightning_sft.training.module import SFTModule
from support.plain import TINY, make_data, make_module, make_trainer
from support.runs import run, write_config

pytestmark = pytest.mark.process  # trains whole runs

ROOT = Path(__file__).parents[2]
ROWS = [
    line.split("|")[1:4]
    for line in (ROOT / "docs/trainer-options.md").read_text().splitlines()
    if line.startswith("| `")
]


def test_the_table_is_complete() -> None:
    named = [name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])]
    options = list(inspect.signature(L.Trainer.__init__).parameters)[1:]
    assert sorted(named) == sorted(options)


def test_each_row_names_tests_that_exist() -> None:
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for option, _, shown in ROWS:
        tests = re.findall(r"`([\w.]+)`", shown)
        assert tests, option
        for test in tests:
            found = list((ROOT / "tests").rglob(test)) if "." in test else f"def {test}(" in source
            assert found, f"{option}: {test}"


def final_weights(folder: Path, **trainer: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    trained = make_trainer(**({"max_epochs": 2, "limit_train_batches": 2} | trainer))
    module = make_module()
    trained.fit(module, datamodule=make_data(folder))
    return module.state_dict()


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return final_weights(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(
    "option",
    [
        {"num_sanity_val_steps": 2},
        {"log_every_n_steps": 50},
        {"limit_test_batches": 1},
        {"enable_progress_bar": True},
        {"enable_model_summary": True},
        {"deterministic": True},
        {"benchmark": True},
        {"inference_mode": False},
        {"use_distributed_sampler": True},
        {"profiler": "simple"},
        {"detect_anomaly": True},
        {"barebones": True, "log_every_n_steps": None, "num_sanity_val_steps": None},
        {"sync_batchnorm": True},
        {"reload_dataloaders_every_n_epochs": 1},
        {"enable_autolog_hparams": False},
        {"enable_checkpointing": True, "default_root_dir": "elsewhere"},
    ],
    ids=str,
)
def test_an_option_without_influence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    usual: dict[str, torch.Tensor],
    option: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        assert equal(final_weights(tmp_path, **option), usual)
    finally:
        torch.use_deterministic_algorithms(False)


def test_clipping_sees_the_whole_step(tmp_path: Path) -> None:
    """One batch of four, or two of two: the same clipped step; unclipped it is another one."""

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    def train(batch_size: int, clip: float | None) -> dict[str, torch.Tensor]:
        module = SFTModule(TINY | {"drop_rate": 0.0}, None, optimizer=sgd)
        make_trainer(
            max_steps=3, gradient_clip_val=clip, accumulate_grad_batches=4 // batch_size
        ).fit(module, datamodule=make_data(tmp_path, batch_size=batch_size))
        return module.state_dict()

    whole, cut, free = train(4, 0.05), train(2, 0.05), train(4, None)
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], atol=1e-5, rtol=1e-5)
    assert max(float((whole[name] - free[name]).abs().max()) for name in whole) > 1e-3


def test_predict_says_what_a_limit_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, generation={"max_new_tokens": 1, "batch_size": 1})
    assert run("predict", "--config", config, "--trainer.limit_predict_batches", "1") == 3
    assert re.search(r"3 answers are missing", capsys.readouterr().err)
    assert not list(tmp_path.rglob("instruction-data-with-response.json"))
