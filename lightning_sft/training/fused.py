"""Optimizers in one kernel a step, where that kernel was seen to do its work."""

from __future__ import annotations

import functools
from typing import Any

import torch


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Switch to torch's fused kernel where the optimizer has one and nobody chose otherwise.

    On a CPU it makes a step of AdamW about ten times faster, with the same arithmetic.
    """
    for group in optimizer.param_groups:
        undecided = "fused" in group and group["fused"] is None and not group.get("foreach")
        if undecided and not group.get("capturable") and not group.get("differentiable"):
            kinds = {(parameter.device, parameter.dtype) for parameter in group["params"]}
            group["fused"] = all(_fuses(type(optimizer), *kind) for kind in kinds)  # type: ignore[arg-type]


@functools.cache
def _fuses(kind: type[torch.optim.Optimizer], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one fused step of this optimizer does what one plain step does.

    Tried out, for kernels are added release by release, and torch 2.13's fused SGD leaves 16-bit
    weights on a CPU as they are, without a word.
    """
    if device.type not in ("cpu", "cuda", "mps"):
        return False
    moved = []
    for fused in (True, False):
        weight = torch.ones(64, device=device, dtype=dtype, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        options: dict[str, Any] = {"lr": 0.25, "fused": fused, "foreach": False}
        try:
            kind([weight], **options).step()
        except (RuntimeError, TypeError, ValueError):
            return False
        moved.append(weight.detach())
    return bool((moved[1] != 1).all()) and torch.allclose(moved[0], moved[1], rtol=0.01)
