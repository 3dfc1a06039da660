"""The first batch on the device and on the CPU: a device that computes wrongly is refused.

Kernels of MPS and CUDA have been wrong before, and a model that learns from wrong logits still
seems to learn. One row of the first batch costs a moment; `--check_device false` leaves it out.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn as nn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.data.loader import Batch
from lightning_sft.decoding.generation import evaluating
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.training.module import SFTModule
from lightning_sft.training.sharding import is_sharded

NUM_TOKENS = 64
# Of the logits' standard deviation. TensorFloat-32 differs by some thousandths, a wrong kernel by
# about one.
TOLERANCE = 0.05
PROCESSES_PER_CPU = 8  # a device is a process, on CPUs at least


def check_devices(devices: object, num_nodes: object = 1) -> None:
    """Refuse a number of devices that would fill this machine with processes.

    Args:
        devices, num_nodes: As `trainer.devices` and `trainer.num_nodes` are given: a number, also
            as text, or anything else, which is left to Lightning.

    Raises:
        InputError: More than `PROCESSES_PER_CPU` for each processor, and more than there are GPUs;
            or an absurd number of nodes.
    """
    most = max(PROCESSES_PER_CPU * (os.cpu_count() or 1), torch.cuda.device_count())
    for name, value, limit in (("devices", devices, most), ("num_nodes", num_nodes, 65_536)):
        if isinstance(value, (int, str)) and re.fullmatch(r"\d+", str(value)):
            number = int(str(value)[:20])
            if number > limit:
                raise InputError(f"trainer.{name}: {number} is not allowed; at most {limit} here")


class DeviceCheck(L.Callback):
    """Compares the device's logits with the CPU's once, on the first batch of any command."""

    devices = ("cuda", "mps")

    def __init__(self) -> None:
        self._done = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say so where bfloat16 is emulated: it is slower than float32 then."""
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if on_cpu and "bf16" in str(trainer.precision) and not has_bfloat16():
            rank_zero_info(
                "note: this processor has no bfloat16 instructions (avx512_bf16, amx_bf16 or arm's "
                f"bf16), so trainer.precision {trainer.precision} is likely slower than 32-true"
            )

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, *_: Any) -> None:
        self._check(trainer, module, batch["input_ids"])

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: Any, batch: Batch, *_: Any
    ) -> None:
        self._check(trainer, module, batch["input_ids"])

    def on_test_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, *_: Any) -> None:
        self._check(trainer, module, batch["input_ids"])

    def on_predict_batch_start(
        self, trainer: L.Trainer, module: Any, batch: Batch, *_: Any
    ) -> None:
        self._check(trainer, module, torch.tensor(batch["prompts"][0]))

    def _check(self, trainer: L.Trainer, module: SFTModule, input_ids: torch.Tensor) -> None:
        if self._done or is_sharded(trainer) or module.device.type not in self.devices:
            return
        self._done = True
        # Any tokens will do: of a packed batch this is the beginning of its first rows.
        compare_with_cpu(module.network, input_ids.flatten()[:NUM_TOKENS])


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16; where nothing tells, it is taken to."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").lower()
    except OSError:
        return True
    lines = [line for line in facts.splitlines() if line.startswith(("flags", "features"))]
    names = set(lines[0].split()) if lines else {"bf16"}
    return bool(names & {"avx512_bf16", "amx_bf16", "bf16"})


@torch.no_grad()
def compare_with_cpu(model: GPTModel, tokens: torch.Tensor) -> None:
    """Compute the logits of some tokens where the model is, and again on the CPU.

    Args:
        tokens: (T,) at most the context's length.

    Raises:
        ServiceError: The logits differ by more than rounding explains.
    """
    with evaluating(model):
        there = model(tokens[None].to(model.tok_emb.weight.device)).float().cpu()
        here = _copy_to_cpu(model)(tokens[None].cpu()).float()
    difference = float((there - here).abs().max() / here.std().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        device = model.tok_emb.weight.device
        raise ServiceError(
            f"check_device: logits of {device} differ from the CPU's by {difference:.2g} of their "
            f"spread, {TOLERANCE} are allowed; use --trainer.accelerator cpu, another torch "
            "version, or --check_device false to go on regardless"
        )


def _copy_to_cpu(model: GPTModel) -> GPTModel:
    """A copy whose parameters are on the CPU, without a second one on the device; ties stay."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().cpu(), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
