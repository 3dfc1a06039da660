"""A device whose logits are wrong is refused; here the CPU plays it, wrong on its first call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft.common.errors import ServiceError
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.llama import LlamaModel
from lightning_sft.training import device_check
from lightning_sft.training.device_check import DeviceCheck, compare_with_cpu
from support.runs import run, write_config
from support.tiny_run import make_tiny, write_hf

TOKENS = torch.arange(20)


def spoil_first_call(monkeypatch: pytest.MonkeyPatch, model: type[Any] = GPTModel) -> None:
    """The logits of the first forward pass, which is the device's, are one token off."""
    original, calls = model.forward, [0]

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = original(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == 1:
            logits = logits.roll(1, -1)
        return logits

    monkeypatch.setattr(model, "forward", forward)


def test_a_right_device_passes(tiny_model: GPTModel) -> None:
    tiny_model.train()
    compare_with_cpu(tiny_model, TOKENS)
    assert tiny_model.training


def test_rounding_passes_and_a_wrong_logit_does_not(
    tiny_model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GPTModel.forward
    for error, refused in ((1e-3, False), (0.5, True)):
        places = iter([error, 0.0])  # the device's, the CPU's

        def forward(
            self: GPTModel, ids: torch.Tensor, places: Any = places, **kwargs: Any
        ) -> torch.Tensor:
            logits = original(self, ids, **kwargs)
            logits[0, 3, 5] += next(places) * logits.std()
            return logits

        monkeypatch.setattr(GPTModel, "forward", forward)
        if refused:
            with pytest.raises(ServiceError, match="logits of cpu differ from the CPU's by"):
                compare_with_cpu(tiny_model, TOKENS)
        else:
            compare_with_cpu(tiny_model, TOKENS)


def test_not_a_number_is_refused(tiny_model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTModel, "forward", lambda self, ids: torch.full((1, 20, 61), torch.nan))
    with pytest.raises(ServiceError):
        compare_with_cpu(tiny_model, TOKENS)


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_the_commands_check_unless_told_not_to(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    config = write_config(tmp_path, trainer__max_epochs=1, trainer__limit_train_batches=2)
    monkeypatch.setattr(DeviceCheck, "devices", ("cpu",))
    spoil_first_call(monkeypatch)
    assert run(command, "--config", config) == 3
    err = capsys.readouterr().err
    assert "error: check_device: logits of cpu differ" in err
    assert run(command, "--config", config, "--check_device", "false") == 0


def test_a_llama_is_checked_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny()
    compare_with_cpu(model, TOKENS)
    copy = device_check._copy_to_cpu(model)
    assert copy.out_head.weight is copy.tok_emb.weight is not model.tok_emb.weight
    weights = str(write_hf(tmp_path / "hf"))
    settings = {"model__architecture": "auto", "model__weights": weights}
    settings |= {"trainer__max_steps": 1, "data__prompt_style": "chatml"}
    config = write_config(tmp_path, **settings)
    monkeypatch.setattr(DeviceCheck, "devices", ("cpu",))
    spoil_first_call(monkeypatch, LlamaModel)
    assert run("fit", "--config", config) == 3
    assert "error: check_device: logits of cpu differ" in capsys.readouterr().err
    assert run("fit", "--config", config) == 0  # the second call is right


def test_a_processor_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_first_call(monkeypatch)
    config = write_config(tmp_path, trainer__max_epochs=1, trainer__limit_train_batches=2)
    assert run("fit", "--config", config) == 0


@pytest.mark.parametrize("here", [True, False])
def test_emulated_bfloat16_is_announced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    here: bool,
) -> None:
    monkeypatch.setattr(device_check, "has_bfloat16", lambda: here)
    config = write_config(tmp_path, trainer__max_epochs=1, trainer__limit_train_batches=1)
    with caplog.at_level("INFO"):
        assert run("fit", "--config", config, "--trainer.precision", "bf16-mixed") == 0
    assert ("no bfloat16 instructions" in caplog.text) is not here
