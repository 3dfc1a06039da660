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

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lightning_sft.common.errors import InputError
from lightning_sft.models.attention import attend
from lightning_sft.models.cache import CacheShape, KVCache
from lightning_sft.models.layers import Embedding, Linear, PackedLayout, allocate, project

# Far beyond any model, and little enough that one without memory is made in seconds.
LARGEST = {
    "vocab_size": 2**24,
    "context_length": 2**24,
    "emb_dim": 2**17,
    "n_heads": 2**17,
    "n_layers": 2000,
}


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
            if kind is int and value > LARGEST[field.name]:
                largest = f"{LARGEST[field.name]:,}"
                raise InputError(f"architecture: {field.name} {value} is over {largest}")
        if self.emb_dim % self.n_heads:
            raise InputError(
                f"architecture: emb_dim {self.emb_dim} is not divisible by n_heads {self.n_heads}"
            )
        if not 0.0 <= self.drop_rate < 1.0:
            raise InputError(f"architecture: drop_rate {self.drop_rate} is outside [0, 1)")

    @property
    def cache_shape(self) -> CacheShape:
        """GPT-2 keeps keys and values of every head."""
        return CacheShape(self.n_layers, self.n_heads, self.emb_dim // self.n_heads)


class LayerNorm(nn.Module):
    """Layer normalisation with the book's names for gain (`scale`) and bias (`shift`).

    Source: listing 4.2.
    """

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, D): normalised, scaled and shifted."""
        # Each token's D numbers get mean 0 and variance 1 before gain and bias; no token knows of
        # another here, which is why packed rows need no care.
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class MultiHeadAttention(nn.Module):
    """Causal self-attention: what `attend` computes for heads that are slices of one projection.

    Source: listing 3.5.
    """

    same_input = ("W_query", "W_key", "W_value")

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
        """(B, T, D) → (B, T, D); with a layout (N, D) → (N, D), rows gathered in between."""
        # (B, T, D) or (N, D) each
        projections = project(x, self.W_query, self.W_key, self.W_value)
        if layout is not None:
            projections = [F.embedding(layout.gather, p) for p in projections]  # (B, T, D)
        # The heads are slices of one projection: H small attentions side by side cost one product.
        query, key, value = (
            p.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, D/H)
            for p in projections
        )
        if cache is not None:
            # Keys and values of earlier tokens never change, as no token looks ahead.
            key, value = cache.append(layer, key, value)
            query = query.to(key.dtype)
        context = attend(query, key, value, mask, self.drop_rate if self.training else 0.0)
        context = context.transpose(1, 2).flatten(2)  # the heads beside each other again (B, T, D)
        if layout is not None:
            context = context.flatten(0, 1).index_select(0, layout.scatter)  # (N, D)
        return self.out_proj(context)


class FeedForward(nn.Module):
    """Two linear layers with GPT-2's tanh form of GELU between them.

    Source: listings 4.3 and 4.4. Two thirds of a block's parameters are here.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Linear(config.emb_dim, 4 * config.emb_dim),
            nn.GELU(approximate="tanh"),
            Linear(4 * config.emb_dim, config.emb_dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, 4 D) → (…, D), token by token."""
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added back after.

    Source: listing 4.6 and figure 4.13.
    """

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
        """The residual stream, (B, T, D) or (N, D), with what both parts found added to it."""
        # Shortcuts: each part adds to the stream what it found, and gradients reach early blocks
        # undiminished (listing 4.5).
        x = x + self.drop_shortcut(self.att(self.norm1(x), layout, cache, layer, mask))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2: embeddings, a stack of blocks, a final norm and a linear head over the vocabulary.

    Source: listing 4.7 and figure 4.15.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # forget what blocks computed, and compute it again in backward
        self.compiled: Callable[..., torch.Tensor] | None = None  # `run_block`, by torch.compile
        self.tok_emb = Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = Embedding(config.context_length, config.emb_dim)
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
        # By the package's front door, because loading builds on this module.
        from lightning_sft import load_pretrained

        model = load_pretrained(source)
        assert isinstance(model, cls)
        return model

    def materialize(self) -> None:
        """Give a model made on the meta device memory, whose content is still arbitrary."""
        allocate(self)
        if self.config.tie_embeddings:
            self.out_head.weight = self.tok_emb.weight  # else they are two

    def randomize(self, seed: int) -> None:
        """Random weights that depend on the seed alone; torch's own random state is left as it is.

        Args:
            seed: Of the draws.
        """
        self.materialize()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.initialize()

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
            positions = layout.positions  # (N,)
        else:
            positions = torch.arange(num_tokens, device=input_ids.device)
            if cache is not None:
                positions = cache.lengths[:, None] + positions  # (B, T): each row goes on
        mask = cache.mask(num_tokens) if cache is not None else None
        # What a token is, and where it stands (section 2.8): attention itself knows no order.
        x = self.drop_emb(self.tok_emb(input_ids) + self.pos_emb(positions))  # (B, T, D) or (N, D)
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
