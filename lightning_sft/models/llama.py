"""Llama 3.2, SmolLM2, Qwen2.5 and Qwen3 from scratch: token ids → logits.

One architecture, of which each model uses a part: RMSNorm instead of LayerNorm, rotated queries and
keys instead of learned positions, fewer key than query heads, a gated feed-forward, no dropout.
Parameters carry the names of the book's `Llama3Model` and `Qwen3Model`. Shapes in comments: B rows,
T tokens, V vocabulary, H query heads, G key and value heads (the book's "groups"), D embedding,
E numbers a head, N tokens of a packed batch.

    >>> model = LlamaModel(LlamaConfig(emb_dim=64, n_heads=4, n_kv_groups=2, n_layers=2))
    >>> logits = model(torch.tensor([[504, 905]]))  # (1, 2, 49152)

Source: the bonus chapters "Converting GPT to Llama" and "Qwen3 from scratch" of "Build a Large
Language Model (From Scratch)"; Su et al. 2021, "RoFormer"; Ainslie et al. 2023, "GQA"; Shazeer
2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lightning_sft.common.errors import InputError
from lightning_sft.models.attention import attend
from lightning_sft.models.cache import KVCache
from lightning_sft.models.layers import Embedding, Linear, PackedLayout, allocate, project
from lightning_sft.models.llama_config import LlamaConfig

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosine and sine of every token's angles


class RMSNorm(nn.Module):
    """Division by the root of the mean square, with a gain and no shift."""

    def __init__(self, emb_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(emb_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Under autocast queries and keys come in half precision, in which a sum of squares is poor.
        wide = x.to(self.weight.dtype)
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)


def rotation_rates(config: LlamaConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """(E/2,) float32: how far each pair of a head's numbers turns from a token to the next."""
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    rates = 1.0 / config.rope_base ** (pairs / config.head_dim)  # radians
    if (scaling := config.rope_freq) is None:
        return rates
    turns = scaling.original_context_length / (2 * math.pi / rates)  # in the original context
    width = scaling.high_freq_factor - scaling.low_freq_factor
    fast = ((turns - scaling.low_freq_factor) / width).clamp(0, 1)  # 1: left alone
    return (1 - fast) * rates / scaling.factor + fast * rates


def rotation_of(positions: torch.Tensor, config: LlamaConfig) -> Rotation:
    """Cosine and sine by which the tokens at these positions are rotated.

    Computed anew in every forward pass and nowhere kept, so that no buffer can be lost on the way
    through the meta device or a sharded model, and any set of positions will do.

    Args:
        positions: Of any shape (…).

    Returns:
        Two tensors (…, 1, E), float32, whose second half repeats the first; 1 stands for the heads.
    """
    rates = rotation_rates(config, positions.device)
    angles = positions[..., None, None].float() * rates  # (…, 1, E/2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn each pair (number e, number e + E/2) of every head (…, heads, E) by its angle."""
    cosine, sine = rotation
    first, second = x.chunk(2, -1)
    return (x * cosine + torch.cat([-second, first], -1) * sine).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which H/G query heads share one key and value head."""

    same_input = ("W_query", "W_key", "W_value")

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.n_heads * config.head_dim, config.n_kv_groups * config.head_dim
        self.W_query = Linear(config.emb_dim, queries, bias=config.qkv_bias)
        self.W_key = Linear(config.emb_dim, keys, bias=config.qkv_bias)
        self.W_value = Linear(config.emb_dim, keys, bias=config.qkv_bias)
        self.out_proj = Linear(queries, config.emb_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        layout: PackedLayout | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim))  # (B, T, H or G, E) or (N, H or G, E)
            for projected in project(x, self.W_query, self.W_key, self.W_value)
        )
        # Rotated here, once a token: a key means the same wherever it is gathered or kept.
        query, key = rotate(self.q_norm(query), rotation), rotate(self.k_norm(key), rotation)
        if layout is not None:
            query, key, value = (
                F.embedding(layout.gather, p.flatten(1)).unflatten(-1, (-1, self.head_dim))
                for p in (query, key, value)
            )  # (B, T, H or G, E)
        query, key, value = (p.transpose(1, 2) for p in (query, key, value))  # (B, H or G, T, E)
        if cache is not None:
            key, value = cache.append(layer, key, value)
            query = query.to(key.dtype)
        context = attend(query, key, value, mask)
        context = context.transpose(1, 2).flatten(2)  # (B, T, H·E)
        if layout is not None:
            context = context.flatten(0, 1).index_select(0, layout.scatter)  # (N, H·E)
        return self.out_proj(context)


class FeedForward(nn.Module):
    """SwiGLU: one linear layer's output opens and closes the other's."""

    same_input = ("fc1", "fc2")

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.fc2 = Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.fc3 = Linear(config.hidden_dim, config.emb_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = project(x, self.fc1, self.fc2)  # (…, hidden) each
        return self.fc3(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added back after."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.att = GroupedQueryAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = RMSNorm(config.emb_dim, config.norm_eps)
        self.norm2 = RMSNorm(config.emb_dim, config.norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        layout: PackedLayout | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.att(self.norm1(x), rotation, layout, cache, layer, mask)
        return x + self.ff(self.norm2(x))


class LlamaModel(nn.Module):
    """Embeddings, a stack of blocks, a final norm and a linear head over the vocabulary."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # forget what blocks computed, and compute it again in backward
        self.compiled: Callable[..., torch.Tensor] | None = None  # `run_block`, by torch.compile
        self.tok_emb = Embedding(config.vocab_size, config.emb_dim)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = RMSNorm(config.emb_dim, config.norm_eps)
        self.out_head = Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.out_head.weight = self.tok_emb.weight
        if not self.tok_emb.weight.is_meta:
            self.initialize()

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
        """Normal of deviation 0.02, biases zero, gains one.

        As in GPT-2, what writes into the residual stream is scaled down by the root of the number
        of such layers, so that the stream's variance does not grow with depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                writes_residual = name.endswith(("out_proj.weight", "fc3.weight"))
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
        rotation = rotation_of(positions, self.config)
        mask = cache.mask(num_tokens) if cache is not None else None
        x = self.tok_emb(input_ids)
        for layer, block in enumerate(self.trf_blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, layout, cache, layer, mask, use_reentrant=False)
            elif self.compiled is not None and cache is None:  # a cache changes with each token
                x = self.compiled(block, x, rotation, layout)
            else:
                x = block(x, rotation, layout, cache, layer, mask)
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
