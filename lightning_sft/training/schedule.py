"""Learning rates over a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_sft.common.errors import InputError


class WarmupCosine(LambdaLR):
    """Linear warm-up to the optimizer's rate, then half a cosine down to a share of it.

    Args:
        warmup: Steps of warm-up; below 1, a share of all steps.
        final: Rate at the end, as a share of the full one.
        total_steps: Steps of the whole run; `SFTModule` fills it in.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: float = 0.1,
        final: float = 0.0,
        total_steps: int = 1,
    ) -> None:
        if warmup < 0 or not 0.0 <= final <= 1.0:
            raise InputError(
                f"lr_scheduler: warmup {warmup} must be >= 0 and final {final} within [0, 1]"
            )
        self.warmup, self.final, self.total_steps = warmup, final, total_steps
        super().__init__(optimizer, self._factor)

    def set_total_steps(self, total_steps: int) -> None:
        """Tell how long the run is, and set the rates that follow from it.

        torch computes the first rate as it makes the schedule, when nobody knows yet.
        """
        self.total_steps = total_steps
        self._set_rates()

    def _set_rates(self) -> None:
        factor = self._factor(self.last_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _factor(self, step: int) -> float:
        warmup = self.warmup * self.total_steps if self.warmup < 1 else self.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: plain numbers. Its settings are the configuration's."""
        settings = ("optimizer", "lr_lambdas", "warmup", "final", "total_steps")
        return {k: v for k, v in self.__dict__.items() if k not in settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a step, along the curve of this run's own length and settings."""
        settings = ("warmup", "final", "total_steps")  # in checkpoints of older versions
        self.__dict__.update({k: v for k, v in state_dict.items() if k not in settings})
        self._set_rates()
