"""What holds on a CPU holds on a GPU: the step never waits, and every way of training is the same.

Run with `pytest -m gpu`; `scripts/gpu_check.py` does so, too. Never run on a GPU by its authors.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sft import InstructionDataModule, SFTModule, generate
from lightning_sft.data.counting import BatchShape
from lightning_sft.planning.footprint import estimate_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.process,  # whole runs are trained
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = {"emb_dim": 128, "n_heads": 4, "n_layers": 4, "context_length": 256}
STEPS = 6


class Losses(L.Callback):
    """The loss of every step, and the shapes of the batches."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.shapes: set[BatchShape] = set()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        self.shapes.add(BatchShape(batch["input_ids"].numel(), *batch["targets"].shape))


@pytest.fixture
def data_path(tmp_path: Path) -> str:
    entries = [
        {
            "instruction": f"Say the number {n}" + " again" * (n % 7),
            "input": "",
            "output": f"It is {n}." + " Indeed." * (n % 5),
        }
        for n in range(80)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return str(path)


def train(
    path: str, layout: dict[str, bool] | None = None, steps: int = STEPS, **options: Any
) -> tuple[SFTModule, Losses, L.Trainer]:
    """A run on the GPU from the same random weights."""
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = SFTModule(options.pop("architecture", SMALL), weights=None, optimizer=optimizer)
    data = InstructionDataModule(path, batch_size=8, max_length=128, **(layout or {}))
    losses, resume = Losses(), options.pop("ckpt_path", None)
    callbacks = [losses, *options.pop("callbacks", [])]
    settings: dict[str, Any] = {"accelerator": "cuda", "devices": 1, "max_steps": steps}
    settings |= {"max_epochs": -1, "limit_val_batches": 0, "logger": False}
    settings |= {"enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "use_distributed_sampler": False}
    trainer = L.Trainer(**settings | options, callbacks=callbacks)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module, losses, trainer


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}, {"share_prefix": True}])
def test_a_step_does_not_wait_for_the_device(data_path: str, layout: dict[str, bool]) -> None:
    class Strict(L.Callback):
        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx >= 2:  # the first ones make the optimizer's state and find kernels
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    try:
        train(data_path, layout, callbacks=[Strict()])
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Sums in another order differ in float32's last bits; bfloat16 has 8 bits, and six steps of a
# rate of 1e-3 carry them on. Losses begin near 11.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"precision": "bf16-mixed"}, 0.05),
        ({"layout": {"padding_free": True}}, 1e-3),
        ({"layout": {"share_prefix": True}}, 1e-3),
    ],
)
def test_losses_are_those_of_padded_float32(
    data_path: str, options: dict[str, Any], tolerance: float
) -> None:
    _, exact, _ = train(data_path)
    _, found, _ = train(data_path, **options)
    for one, two in zip(exact.losses, found.losses, strict=True):
        assert float(two) == pytest.approx(float(one), abs=tolerance)


def test_a_gpu_answers_as_the_cpu_does() -> None:
    # Wide logits, so that no tie is decided by rounding.
    module = SFTModule(SMALL, weights=None)
    model = module.network.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    prompts = [[1, 2, 3], [40, 50, 60, 70, 80], [1, 2, 9]]
    here = generate(model, prompts, max_new_tokens=16, eos_token_id=None)
    there = generate(model.to("cuda"), prompts, max_new_tokens=16, eos_token_id=None)
    assert there == here


def test_a_resumed_run_ends_in_the_same_bits(data_path: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layout": {"share_prefix": True}, "deterministic": True}
    whole, _, _ = train(data_path, **options)
    _, _, trainer = train(data_path, **options, steps=STEPS // 2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    resumed, _, _ = train(data_path, **options, ckpt_path=path)
    ours, theirs = resumed.network.state_dict(), whole.network.state_dict()
    assert [name for name in ours if not torch.equal(ours[name].cpu(), theirs[name].cpu())] == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_forecast_of_memory_holds(data_path: str, precision: str) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # Of a real size: of a toy, what the libraries take for themselves is most of it.
    module, found, _ = train(data_path, architecture="gpt2-small", precision=precision)
    peak = torch.cuda.max_memory_allocated() - before
    forecast = max(estimate_memory(module, shape, precision).total for shape in found.shapes)
    assert peak == pytest.approx(forecast, rel=0.15)
