"""GPT-2 from scratch: token ids → logits, with a key-value cache that the caller owns.

The parameters carry the names of the book's `GPTModel`, so a `.pth` saved by the book's code loads
here and the other way round. Shapes in comments: B rows, T tokens, V vocabulary, H heads, D
embedding, N tokens of a packed batch.

    >>> model = GPTModel(GPTConfig(emb_dim=64, n_heads=4, n_layers=2))
    >>> logits = model(torch.tensor([[15496, 995]]))  # (1, 2, 50257)

Source: chapters 3 and 4 of "Build a Large Language Model (From Scratch)"; Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lightning_sft.common.errors import InputError


@dataclass(frozen=True)
class GPTConfig:
    """The book's configuration fields; the defaults are gpt2-small's.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Most tokens the model can see at once.
        emb_dim: Width of the residual stream, D.
        n_heads: Attention heads, H; divides `emb_dim`.
        n_layers: Transformer blocks.
        drop_rate: Dropout probability in [0, 1).
        qkv_bias: Whether query, key and value projections have a bias (GPT-2's do).
        tie_embeddings: One matrix for token embedding and output head, as GPT-2 was trained; the
            chapter starts from a copy and trains both apart.

    Raises:
        InputError: A field is outside its range.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.0
    qkv_bias: bool = True
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)  # bool is an int to Python, and is none here
            allowed = (float, int) if kind is float else (kind,)
            if type(value) not in allowed:
                raise InputError(
                    f"architecture: {field.name} is {value!r}; it must be of type {kind.__name__}"
                )
            if kind is int and value < 1:
                raise InputError(f"architecture: {field.name} is {value}; it must be >= 1")
        if self.emb_dim % self.n_heads:
            raise InputError(
                f"architecture: emb_dim {self.emb_dim} is not divisible by n_heads {self.n_heads}"
            )
        if not 0.0 <= self.drop_rate < 1.0:
            raise InputError(f"architecture: drop_rate {self.drop_rate} is outside [0, 1)")


ARCHITECTURES = {
    "gpt2-small": GPTConfig(),
    "gpt2-medium": GPTConfig(emb_dim=1024, n_heads=16, n_layers=24),
    "gpt2-large": GPTConfig(emb_dim=1280, n_heads=20, n_layers=36),
    "gpt2-xl": GPTConfig(emb_dim=1600, n_heads=25, n_layers=48),
}
# Parameters as OpenAI counts them, in the names that the book gives its files.
MODEL_SIZES = {
    "gpt2-small": "124M",
    "gpt2-medium": "355M",
    "gpt2-large": "774M",
    "gpt2-xl": "1558M",
}


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
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        head_dim = config.emb_dim // config.n_heads
        shape = (config.n_layers, batch_size, config.n_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._room = (self.keys, self.values)  # all there is, also of rows that left
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # filled, per row
        self.longest = 0  # of `lengths`, known without asking the device

    def select(self, rows: torch.Tensor) -> None:
        """Keep only the rows of these indices, in this order (finished rows leave a batch).

        Only rows that change place are copied, and only what is in use of them.
        """
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
        if self.longest == 0:
            self.keys[layer, :, :, :num_new] = keys
            self.values[layer, :, :, :num_new] = values
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]  # (B, 1)
            places = self.lengths[:, None] + torch.arange(num_new, device=keys.device)  # (B, T)
            self.keys[layer][rows, :, places] = keys.transpose(1, 2).to(self.keys.dtype)
            self.values[layer][rows, :, places] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, num_new: int) -> torch.Tensor | None:
        """(B, 1, T, longest + T) bool, true where a new token may look; None for plain causal."""
        if self.longest == 0:
            return None
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


class LayerNorm(nn.Module):
    """Layer normalisation with the book's names for gain (`scale`) and bias (`shift`)."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class MultiHeadAttention(nn.Module):
    """Causal self-attention through torch's fused `scaled_dot_product_attention`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.W_query = Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_key = Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_value = Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.out_proj = Linear(config.emb_dim, config.emb_dim)

    def forward(
        self,
        x: torch.Tensor,
        layout: PackedLayout | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        projections = [self.W_query(x), self.W_key(x), self.W_value(x)]  # (B, T, D) or (N, D)
        if layout is not None:
            projections = [F.embedding(layout.gather, p) for p in projections]  # (B, T, D)
        query, key, value = (
            p.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, D/H)
            for p in projections
        )
        if cache is not None:
            key, value = cache.append(layer, key, value)
            query = query.to(key.dtype)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.drop_rate if self.training else 0.0,
        )
        context = context.transpose(1, 2).flatten(2)  # (B, T, D)
        if layout is not None:
            context = context.flatten(0, 1).index_select(0, layout.scatter)  # (N, D)
        return self.out_proj(context)


class Linear(nn.Linear):
    """A linear layer that is also quick with the few rows of a decoding step.

    On CPUs `W x^T` takes about half the time of `x W^T` for 2 to 64 rows: the weight, which is all
    there is to read, is then walked through in its own order.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.numel() // self.in_features
        if torch.is_grad_enabled() or x.device.type != "cpu" or not 2 <= num_rows <= 64:
            return F.linear(x, self.weight, self.bias)
        product = self.weight @ x.reshape(num_rows, -1).T  # (out, rows)
        if self.bias is not None:
            product += self.bias[:, None]
        return product.T.contiguous().view(*x.shape[:-1], -1)


class FeedForward(nn.Module):
    """Two linear layers with GPT-2's tanh form of GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Linear(config.emb_dim, 4 * config.emb_dim),
            nn.GELU(approximate="tanh"),
            Linear(4 * config.emb_dim, config.emb_dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added back after."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.att = MultiHeadAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = LayerNorm(config.emb_dim)
        self.norm2 = LayerNorm(config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(
        self,
        x: torch.Tensor,
        layout: PackedLayout | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x), layout, cache, layer, mask))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


def run_block(
    block: TransformerBlock, x: torch.Tensor, layout: PackedLayout | None
) -> torch.Tensor:
    """A block in training, as one function that is compiled once for all blocks."""
    return block(x, layout)


class GPTModel(nn.Module):
    """GPT-2: embeddings, a stack of blocks, a final norm and a linear head over the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # forget what blocks computed, and compute it again in backward
        self.compiled: Callable[..., torch.Tensor] | None = None  # `run_block`, by torch.compile
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        # The book's `nn.Sequential` and this list name their parameters alike.
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = LayerNorm(config.emb_dim)
        self.out_head = Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.out_head.weight = self.tok_emb.weight
        if not self.tok_emb.weight.is_meta:
            self.initialize()

    @classmethod
    def from_pretrained(cls, source: str) -> GPTModel:
        """GPT-2 of one of the four sizes, with OpenAI's weights.

        Args:
            source: `gpt2-small`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`.

        Raises:
            InputError: Unknown name.
            ServiceError: The weights are neither in the cache nor to be had.
        """
        # Imported here: weights.py builds on this module.
        from lightning_sft.models.loading import load_weights

        if source not in ARCHITECTURES:
            raise InputError(f"weights: unknown {source!r}; allowed: {', '.join(ARCHITECTURES)}")
        with torch.device("meta"):
            model = cls(ARCHITECTURES[source])
        load_weights(model, source)
        return model

    def materialize(self) -> None:
        """Give a model made on the meta device memory, whose content is still arbitrary."""
        self.to_empty(device="cpu")
        if self.config.tie_embeddings:
            self.out_head.weight = self.tok_emb.weight  # to_empty makes two of one

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's initialisation: normal of deviation 0.02, biases zero.

        The two projections of each block that write into the residual stream are scaled down by
        the root of their number, so that the stream's variance does not grow with depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "shift")):
                nn.init.zeros_(parameter)
            elif name.endswith("scale"):
                nn.init.ones_(parameter)
            else:
                writes_residual = name.endswith(("out_proj.weight", "layers.2.weight"))
                depth = 2 * self.config.n_layers if writes_residual else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        layout: PackedLayout | None = None,
        cache: KVCache | None = None,
        row_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The final norm's output, before the head.

        Args:
            input_ids: (B, T) int64, right-padded; (N,) with a layout.
            layout: Places of a packed batch's tokens.
            cache: Filled by this call; the tokens are taken to follow what it holds.
            row_lengths: (B,) how many of the T tokens each row really has, for prompts of unequal
                length going into a cache. All T by default.

        Returns:
            (B, T, D), or (N, D) with a layout.

        Raises:
            InputError: More tokens than the context holds.
        """
        num_tokens = layout.gather.shape[1] if layout is not None else input_ids.shape[1]
        seen = cache.longest if cache is not None else 0
        if seen + num_tokens > self.config.context_length:
            raise InputError(
                f"{seen + num_tokens} tokens do not fit the model's context of "
                f"{self.config.context_length}"
            )
        if layout is not None:
            positions = layout.positions
        else:
            positions = torch.arange(num_tokens, device=input_ids.device)
            if cache is not None:
                positions = cache.lengths[:, None] + positions
        mask = cache.mask(num_tokens) if cache is not None else None
        x = self.drop_emb(self.tok_emb(input_ids) + self.pos_emb(positions))
        for layer, block in enumerate(self.trf_blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, cache, layer, mask, use_reentrant=False)
            elif self.compiled is not None and cache is None:  # a cache changes with each token
                x = self.compiled(block, x, layout)
            else:
                x = block(x, layout, cache, layer, mask)
        if cache is not None:
            cache.advance(num_tokens if row_lengths is None else row_lengths, num_tokens)
        return self.final_norm(x)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        layout: PackedLayout | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Logits of the next token at every position.

        Args:
            input_ids: (B, T) int64, right-padded; (N,) with a layout.

        Returns:
            (B, T, V), or (N, V) with a layout.
        """
        return self.out_head(self.hidden_states(input_ids, layout=layout, cache=cache))


def get_config(architecture: str | dict[str, object] | GPTConfig) -> GPTConfig:
    """The configuration of a named size, or one made from a mapping of `GPTConfig` fields.

    Raises:
        InputError: Unknown name or field, or a field out of range.
    """
    if isinstance(architecture, GPTConfig):
        return architecture
    if isinstance(architecture, str):
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"architecture: unknown {architecture!r}; allowed: {', '.join(ARCHITECTURES)}, or "
                "a mapping of GPTConfig fields"
            )
        return ARCHITECTURES[architecture]
    allowed = [field.name for field in dataclasses.fields(GPTConfig)]
    unknown = sorted(set(architecture) - set(allowed))
    if unknown:
        raise InputError(
            f"architecture: unknown field {unknown[0]!r}; allowed: {', '.join(allowed)}"
        )
    return GPTConfig(**architecture)  # type: ignore[arg-type]
