"""LoRA: a frozen model and, beside chosen linear layers, a trained product of two thin matrices.

`W x` becomes `W x + s · B A x` with A (rank, in) random and B (out, rank) zero, so training starts
from the base model exactly. A layer keeps the names of its weight and bias; the new parameters are
`lora_a` and `lora_b` beside them. Merging adds `s · B A` to `W` and leaves a plain model.

There are two customs, and they learn at very different speeds for one learning rate:
- the book's appendix E: s = alpha, A begins in ±1/√rank;
- the paper's and PEFT's: s = alpha / rank, A begins in ±1/√in, which is smaller for wide layers.

    >>> model = GPTModel.from_pretrained("gpt2-small")
    >>> add_lora(model, LoRAConfig(rank=16, alpha=16))  # 3.5 of 166.5 million parameters train
    >>> merge_lora(model)

    python -m lightning_sft fit --config gpt2-small.yaml --config lora.yaml  # the book's form

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685);
appendix E and exercise 7.4 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from lightning_sft.common.errors import InputError
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.layers import Linear
from lightning_sft.models.registry import get_config

ADAPTERS = ("lora_a", "lora_b")  # the last part of an adapter's parameter names


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers are adapted, and how.

    Args:
        rank: Rows of A and columns of B.
        alpha: What the product of both is multiplied by, as `scaling` says.
        dropout: Probability in [0, 1) with which A's inputs are dropped in training.
        targets: Patterns of layer names such as `out_head`, `*.W_query` or `trf_blocks.0.*`; by
            default all linear layers, the head included, as in exercise 7.4.
        scaling: `alpha_over_rank` as in the paper and in PEFT, or `alpha` as in the book.
        init: A's uniform distribution: `peft` ends at 1 / √(inputs of the layer), `book` at
            1 / √rank.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("*",)
    # Also what a checkpoint means that was written before there was a choice.
    scaling: Literal["alpha_over_rank", "alpha"] = "alpha_over_rank"
    init: Literal["peft", "book"] = "peft"

    def check(self) -> None:
        """Called where the values are used; a parser would hide the reason.

        Raises:
            InputError: A value is outside its range.
        """
        if self.rank < 1:
            raise InputError(f"model.lora.rank: {self.rank} is not allowed; it must be >= 1")
        if not 0.0 < self.alpha < math.inf:
            raise InputError(
                f"model.lora.alpha: {self.alpha} is not allowed; it must be positive and finite"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.lora.dropout: {self.dropout} is outside [0, 1)")
        if isinstance(self.targets, str) or not self.targets:
            raise InputError(
                f"model.lora.targets: {self.targets!r} is not allowed; give a list of name patterns"
            )
        allowed = {"scaling": ("alpha_over_rank", "alpha"), "init": ("peft", "book")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InputError(
                    f"model.lora.{name}: {getattr(self, name)!r} is not allowed; give "
                    f"{' or '.join(values)}"
                )

    @property
    def scale(self) -> float:
        """The factor before B A."""
        return self.alpha / self.rank if self.scaling == "alpha_over_rank" else self.alpha

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint keeps them; PEFT's form as before there was a choice."""
        values = dataclasses.asdict(self) | {"targets": list(self.targets)}
        for name in ("scaling", "init"):
            if values[name] == getattr(LoRAConfig, name):
                del values[name]
        return values


class LoRALinear(Linear):
    """A frozen linear layer with a trained low-rank product beside it.

    Args:
        base: The layer; its weight and bias are shared, not copied, and frozen.
        config: Rank, alpha and dropout.
        generator: For A; nothing is drawn on the meta device.
    """

    is_on = True  # `adapters_off` shows the model without its adapters

    def __init__(
        self, base: nn.Linear, config: LoRAConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias = base.weight, base.bias
        base.requires_grad_(False)  # no gradient, and so no optimizer state: what LoRA saves
        self.scale, self.dropout = config.scale, config.dropout
        self.lora_a = nn.Parameter(base.weight.new_empty(config.rank, base.in_features))
        # Zero, so that B A adds nothing before the first step; A then learns from the second on.
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        if not self.lora_a.is_meta:
            # ±1/√fan. The book writes A as (in, rank), and torch takes its last dimension for the
            # layer's inputs; so the book's fan is the rank.
            fan: Any = "fan_in" if config.init == "peft" else "fan_out"
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5), mode=fan, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_on:
            return super().forward(x)
        wide, (low, lora_b) = super().forward(x), self.factors(x)
        # One kernel: `wide + F.linear(low, lora_b)` would write the product out first.
        return torch.addmm(wide.flatten(0, -2), low.flatten(0, -2), lora_b.T).view_as(wide)

    def factors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two matrices (M, rank) and (out, rank) whose product LoRA adds for inputs (M, in)."""
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return F.linear(dropped, self.lora_a) * self.scale, self.lora_b

    @torch.no_grad()
    def merged(self) -> Linear:
        """A plain layer that computes the same; its weight is a new one."""
        plain = Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        # In float32 at least: a small product would be lost beside a large weight in bfloat16.
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        a, b = self.lora_a.to(exact), self.lora_b.to(exact)
        weight = torch.addmm(self.weight.to(exact), b, a, alpha=self.scale)
        plain.weight, plain.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return plain

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_a.shape[0]}, scale={self.scale:g}"


def add_lora(model: GPTModel, config: LoRAConfig, seed: int = 123) -> GPTModel:
    """Freeze a model and put adapters beside the layers that the config names.

    Args:
        model: With its weights; on the meta device only to be counted. Changed in place.
        seed: Of the adapters; the global random state is left alone.

    Raises:
        InputError: A value is outside its range, a pattern matches no linear layer, or the model
            has adapters already.
    """
    config.check()
    if has_lora(model):
        raise InputError("model.lora: the model has adapters already; merge them first")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = select_layers(list(layers), config.targets)
    model.requires_grad_(False)  # norms and embeddings too
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        model.set_submodule(name, LoRALinear(layers[name], config, generator))
    return model


def select_layers(names: list[str], targets: tuple[str, ...]) -> list[str]:
    """The names that at least one pattern matches.

    Raises:
        InputError: A pattern matches none.
    """
    matched = {pattern: [name for name in names if _matches(name, pattern)] for pattern in targets}
    for pattern, found in matched.items():
        if not found:
            first = [name for name in names if not re.match(r"trf_blocks\.[1-9]", name)]
            raise InputError(
                f"model.lora.targets: {pattern!r} matches no layer; the linear layers are "
                f"{', '.join(first)}, and alike in every block"
            )
    return [name for name in names if any(name in found for found in matched.values())]


def _matches(name: str, pattern: str) -> bool:
    """Whole, or from any dot on: `W_query` and `att.*` need not begin with an asterisk."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def has_lora(model: nn.Module) -> bool:
    """Whether any layer is adapted."""
    return any(isinstance(part, LoRALinear) for part in model.modules())


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before adapters were put beside its layers, to the bit."""
    layers = [part for part in model.modules() if isinstance(part, LoRALinear)]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return name.rpartition(".")[2] in ADAPTERS


def merge_lora(model: GPTModel) -> GPTModel:
    """Make every adapter part of its layer's weight, in place; a plain model stays as it is.

    An adapted head that was tied to the embedding gets a matrix of its own: the embedding has no
    part in the adapter. The model's config then says so.
    """
    if not has_lora(model):
        return model
    model.config = merged_config(model.config, model.out_head)
    adapted = [name for name, part in model.named_modules() if isinstance(part, LoRALinear)]
    for name in adapted:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoRALinear)
        model.set_submodule(name, layer.merged())  # one layer is there twice at a time
    return model.requires_grad_(True)


def merged_copy(model: GPTModel) -> GPTModel:
    """The merged model; `model` stays as it is, and what is not adapted is held once for both."""
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return merge_lora(copy.deepcopy(model, dict(shared)))


def merged_config(config: GPTConfig, head: nn.Module) -> GPTConfig:
    """The configuration of a model once its adapters are merged."""
    untied = isinstance(head, LoRALinear)
    return dataclasses.replace(config, tie_embeddings=False) if untied else config


def final_architecture(model: Mapping[str, Any]) -> GPTConfig:
    """The architecture of a run's final weights, from the `model` of its config.

    Adapters are merged in them, and an adapted head is the embedding no more.
    """
    config = get_config(model["architecture"])
    return dataclasses.replace(config, tie_embeddings=False) if model.get("lora") else config
