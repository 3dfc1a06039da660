"""What the decoders share: where the tokens of a packed batch belong, and linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F


class Prepacked(Protocol):
    """Weights of linear layers on one input, in a layout that is quick to read."""

    sizes: list[int]  # outputs of each layer
    dtype: torch.dtype

    def fit(self, x: torch.Tensor) -> bool: ...
    def are_current(self) -> bool: ...
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class PackedLayout(NamedTuple):
    """Where the tokens of a packed batch belong: no padding, and no prefix computed twice.

    A packed batch is one flat list of N tokens. Everything but attention works on tokens one by
    one and never needs to know of rows; attention gathers its rows, and takes one copy back.

    positions: (N,) each token's place in its row.
    gather: (B, T) the flat index of every row's tokens; padded on the right with any index.
    scatter: (N,) for each flat token one place in the B·T gathered ones that holds it.
    """

    positions: torch.Tensor
    gather: torch.Tensor
    scatter: torch.Tensor


class Embedding(nn.Embedding):
    """torch's, which is made on the meta device at once, as `Linear` is."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """A linear layer that is also quick with the few rows of a decoding step.

    On CPUs `W x^T` takes about half the time of `x W^T` for 2 to 64 rows: the weight, which is all
    there is to read, is then walked through in its own order. Quicker still are the weights
    that a model is given `prepacked` while it answers.
    """

    # Set by `prepacked.py`: this layer's weight alone, or with its neighbours' on one input.
    prepacked: Prepacked | None = None
    prepacked_together: Prepacked | None = None

    def reset_parameters(self) -> None:
        # Nothing to fill on the meta device, where torch would import sympy for it: a second.
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.prepacked
        if weights is not None and not torch.is_grad_enabled() and weights.fit(x):
            return weights(x)
        num_rows = x.numel() // self.in_features
        if torch.is_grad_enabled() or x.device.type != "cpu" or not 2 <= num_rows <= 64:
            return F.linear(x, self.weight, self.bias)
        product = self.weight @ x.reshape(num_rows, -1).T  # (out, rows)
        if self.bias is not None:  # one number for each output, alike for all rows
            product += self.bias[:, None]
        return product.T.contiguous().view(*x.shape[:-1], -1)


def project(x: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
    """The outputs of several layers for one input (…, in), by one product if they are prepacked.

    Returns:
        One tensor (…, out) a layer.
    """
    together = getattr(layers[0], "prepacked_together", None)
    if together is not None and not torch.is_grad_enabled() and together.fit(x):
        return together(x).split(together.sizes, -1)
    return [layer(x) for layer in layers]


def run_block(block: nn.Module, *inputs: Any) -> torch.Tensor:
    """A block in training, as one function that is compiled once for all blocks."""
    return block(*inputs)


def allocate(model: nn.Module) -> None:
    """Give a model that was made on the meta device memory on the CPU, its content arbitrary.

    `to_empty` does the same; reading a meta tensor's kind that way makes torch import sympy.
    """
    shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    model.load_state_dict(empty, assign=True)
