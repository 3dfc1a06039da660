"""What a model is trained for: cross-entropy of the wanted tokens, or preferences.

`model.objective` is null for supervised fine-tuning, or `DPO`: the same module, loaders,
checkpoints and callbacks then see pairs of answers, and a step's loss is the mean over its pairs.

    model:
      objective: {class_path: lightning_sft.DPO, init_args: {beta: 0.1}}

    python -m lightning_sft fit --config gpt2-medium.yaml --config dpo.yaml --model.weights sft.pth
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from lightning_sft.common.errors import InputError
from lightning_sft.training.preference_loss import (
    OF_MEANS,
    WITHOUT_REFERENCE,
    PairLosses,
    PreferenceLoss,
    preference_losses,
)


class DPO:
    """Direct preference optimization and its kin: chosen answers likelier, rejected ones less so.

    Args:
        beta: How closely the model is held to its reference: the smaller, the further it may go.
        loss: sigmoid (DPO), ipo, hinge, or, without a reference, simpo or orpo.
        average: Mean log-probabilities instead of sums and rewards without beta: the book's form.
            ipo, simpo and orpo always take means.
        label_smoothing: The share of pairs taken to be the wrong way round, below 0.5; of sigmoid
            and simpo.
        sft_weight: Adds so many times the chosen answer's mean cross-entropy.
        gamma: Of simpo: the margin that the chosen answer is to have.
        reference: `model`: the weights that training begins with, computed beside each batch (a
            frozen copy; with LoRA the model itself, its adapters switched off). `precomputed`: the
            same numbers, computed once before training and kept in the run's folder.
        reference_weights: Other weights of the same architecture as reference.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss: PreferenceLoss = "sigmoid",
        average: bool = False,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        gamma: float = 0.5,
        reference: Literal["model", "precomputed"] = "model",
        reference_weights: str | None = None,
    ) -> None:
        self.beta, self.loss, self.average = beta, loss, average
        self.label_smoothing, self.sft_weight, self.gamma = label_smoothing, sft_weight, gamma
        self.reference, self.reference_weights = reference, reference_weights

    def check(self) -> None:
        """Called where the values are used; a parser would hide the reason.

        Raises:
            InputError: A value is outside its range, or would be without effect.
        """
        where = "model.objective"
        for name, allowed in (
            ("loss", get_args(PreferenceLoss)), ("reference", ("model", "precomputed"))
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{where}.{name}: unknown {getattr(self, name)!r}; allowed: "
                    f"{', '.join(allowed)}"
                )
        if not 0.0 < self.beta < math.inf:
            raise InputError(
                f"{where}.beta: {self.beta} is not allowed; it must be positive and finite"
            )
        if not 0.0 <= self.label_smoothing < 0.5:
            raise InputError(f"{where}.label_smoothing: {self.label_smoothing} is outside [0, 0.5)")
        if self.label_smoothing and self.loss not in ("sigmoid", "simpo"):
            raise InputError(f"{where}.label_smoothing: {self.loss} has none; leave it at 0")
        for name in ("sft_weight", "gamma"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"{where}.{name}: {getattr(self, name)} is not allowed; it must be >= 0"
                )
        if self.average and self.loss in OF_MEANS:
            raise InputError(f"{where}.average: {self.loss} always takes means; leave it out")
        if self.reference_weights is not None and not self.needs_reference:
            raise InputError(f"{where}.reference_weights: {self.loss} has no reference")

    @classmethod
    def of(cls, settings: DPO | Mapping[str, Any] | None) -> DPO | None:
        """An objective as it is, or made of what a checkpoint's hyperparameters say."""
        return cls(**settings) if isinstance(settings, Mapping) else settings

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with a frozen one."""
        return self.loss not in WITHOUT_REFERENCE

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint keeps them."""
        return dict(vars(self))

    def __call__(
        self, policy: torch.Tensor, reference: torch.Tensor | None, num_tokens: torch.Tensor
    ) -> PairLosses:
        """Losses and metrics of pairs; see `preference_losses`."""
        return preference_losses(
            policy,
            reference,
            num_tokens,
            loss=self.loss,
            beta=self.beta,
            average=self.average,
            label_smoothing=self.label_smoothing,
            sft_weight=self.sft_weight,
            gamma=self.gamma,
        )
