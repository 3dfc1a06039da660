"""What the rest of the package may ask of a model, whatever its family.

A decoder is a `torch.nn.Module` whose parts carry the book's names. `GPTModel` is one; another
family is a class of its own with these names, and an entry in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn as nn

from lightning_sft.models.cache import CacheShape, KVCache
from lightning_sft.models.layers import PackedLayout


class DecoderConfig(Protocol):
    """Sizes that every family has; a family's own fields stand beside them."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def emb_dim(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def drop_rate(self) -> float: ...
    @property
    def tie_embeddings(self) -> bool: ...
    @property
    def cache_shape(self) -> CacheShape: ...


class Decoder(Protocol):
    """Token ids → hidden states → logits, over a packed layout or a cache that the caller owns."""

    @property
    def config(self) -> Any: ...  # a DecoderConfig; each class names its own
    @property
    def tok_emb(self) -> nn.Embedding: ...
    @property
    def trf_blocks(self) -> nn.ModuleList: ...
    @property
    def out_head(self) -> nn.Module: ...

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        layout: PackedLayout | None = None,
        cache: KVCache | None = None,
        row_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) → (B, T, D), or with a layout (N,) → (N, D): the input of `out_head`."""
        ...

    def materialize(self) -> None:
        """Give a model made on the meta device memory."""
        ...

    def randomize(self, seed: int) -> None:
        """The family's own initialisation, from the seed alone."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Any]: ...
