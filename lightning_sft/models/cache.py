"""Keys and values of the tokens seen so far, for any decoder.

>>> cache = KVCache(model.config, batch_size=2, max_length=64)
>>> model(torch.tensor([[15496, 995], [15496, 11]]), cache=cache)  # `cache.lengths` is now 2, 2
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class CacheShape(NamedTuple):
    """What a decoder keeps of every token: keys and values of `kv_heads` heads in each layer."""

    layers: int
    kv_heads: int
    head_dim: int


class HasCacheShape(Protocol):
    """A decoder's configuration, as far as a cache asks for it."""

    @property
    def cache_shape(self) -> CacheShape: ...


class KVCache:
    """Keys and values of the tokens seen so far, for rows of unequal length.

    The caller makes it, hands it to `GPTModel.forward` and reads `lengths`; the model keeps no
    state of its own.

    Args:
        config: The model's.
        batch_size: Rows, B.
        max_length: Most tokens a row will ever hold; memory is taken once, here.
        device, dtype: Of keys and values; dtype float32 unless the model computes in another.
    """

    def __init__(
        self,
        config: HasCacheShape,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        layers, kv_heads, head_dim = config.cache_shape
        shape = (layers, batch_size, kv_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._room = (self.keys, self.values)  # all there is, also of rows that left
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # filled, per row
        self.longest = 0  # of `lengths`, known without asking the device

    def select(self, rows: torch.Tensor) -> None:
        """Keep only the rows of these indices, in this order (finished rows leave a batch).

        Only rows that change place are copied, and only what is in use of them.
        """
        # The tokens of a row stay where they are; only whole rows change place.
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().flatten()
        longest = int(self.lengths[rows].max())
        for stored in (self.keys, self.values):
            stored[:, moved, :, :longest] = stored[:, rows[moved], :, :longest]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.lengths, self.longest = self.lengths[rows], longest

    @property
    def room(self) -> tuple[int, int]:
        """How many rows of how many tokens fit without taking more memory."""
        return self._room[0].shape[1], self._room[0].shape[3]

    def resize(self, batch_size: int, max_length: int) -> None:
        """Take memory for this many rows of this many tokens, and keep what is held."""
        rows, moved = len(self.lengths), []
        for old in (self.keys, self.values):
            layers, _, heads, _, head_dim = old.shape
            new = old.new_zeros(layers, batch_size, heads, max_length, head_dim)
            new[:, :rows, :, : self.longest] = old[:, :, :, : self.longest]
            moved.append(new)
        self._room = (moved[0], moved[1])
        self.keys, self.values = moved[0][:, :rows], moved[1][:, :rows]

    def join(self, other: KVCache) -> None:
        """Copy another cache's rows behind these; there must be room for them."""
        first = len(self.lengths)
        rows = first + len(other.lengths)
        for place, theirs in zip(self._room, (other.keys, other.values), strict=True):
            place[:, first:rows, :, : other.longest] = theirs[:, :, :, : other.longest]
        self.keys, self.values = (place[:, :rows] for place in self._room)
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.longest = max(self.longest, other.longest)

    def copy_row(self, row: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a row's first T tokens, (layers, H, T, D/H) each, copied."""
        keys, values = (stored[:, row, :, :num_tokens] for stored in (self.keys, self.values))
        return keys.clone(), values.clone()

    def load_row(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill an empty cache of one row with what `copy_row` gave, (layers, H, T, D/H) each."""
        num_tokens = keys.shape[2]
        self.keys[:, 0, :, :num_tokens] = keys
        self.values[:, 0, :, :num_tokens] = values
        self.advance(num_tokens, num_tokens)

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one layer's new keys and values (B, H, T, D/H) behind each row's filled part.

        Returns:
            All keys and values up to the longest row's end, (B, H, longest + T, D/H).
        """
        num_new = keys.shape[2]
        end = self.longest + num_new
        if end > self.keys.shape[3]:
            raise ValueError(f"KVCache of {self.keys.shape[3]} tokens a row cannot hold {end}")
        if self.longest == 0:  # a first prompt: one block for all rows, without an index
            self.keys[layer, :, :, :num_new] = keys
            self.values[layer, :, :, :num_new] = values
        else:
            # Rows end at different places, so each new token has a place of its own.
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]  # (B, 1)
            places = self.lengths[:, None] + torch.arange(num_new, device=keys.device)  # (B, T)
            self.keys[layer][rows, :, places] = keys.transpose(1, 2).to(self.keys.dtype)
            self.values[layer][rows, :, places] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, num_new: int) -> torch.Tensor | None:
        """(B, 1, T, longest + T) bool, true where a new token may look; None for plain causal."""
        if self.longest == 0:
            return None
        # Behind a short row's end lies what is left of longer ones: the mask hides it.
        seen = torch.arange(self.longest + num_new, device=self.lengths.device)
        last = self.lengths[:, None] + torch.arange(num_new, device=self.lengths.device)
        return (seen <= last[:, :, None])[:, None]

    def advance(self, num_new: torch.Tensor | int, longest: int) -> None:
        """Count the tokens of one forward pass, after its last layer.

        Args:
            num_new: Tokens added to every row, or (B,) to each (right-padded prompts).
            longest: The largest of them.
        """
        self.lengths = self.lengths + num_new
        self.longest += longest
