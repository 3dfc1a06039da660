"""What a model of the Llama family is made of: its configuration, and the published sizes.

    >>> SIZES["qwen3-0.6b"].head_dim
    128

Source: the `config.json` files of the models' repositories.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lightning_sft.common.errors import InputError
from lightning_sft.models.cache import CacheShape


@dataclass(frozen=True)
class RopeFrequencies:
    """How Llama 3 slows down its rotations for a context longer than it was first trained on.

    Args:
        factor: How many times slower the slow ones become.
        low_freq_factor: Fewer turns than this in the original context: slow, divided by `factor`.
        high_freq_factor: More turns than this: fast, left alone. Between the two it is blended.
        original_context_length: Tokens of the first training.
    """

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of the book's configurations; the defaults are SmolLM2-135M's.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Most tokens the model can see at once.
        emb_dim: Width of the residual stream, D.
        n_heads: Query heads, H.
        n_layers: Transformer blocks.
        hidden_dim: Width between the feed-forward's matrices.
        n_kv_groups: Key and value heads, G; divides `n_heads`.
        head_dim: Numbers a head, E, even; 0 stands for `emb_dim / n_heads`, and becomes it.
        rope_base: Base of the rotations' wavelengths.
        rope_freq: Llama 3's scaling of them (its four fields), or none.
        qkv_bias: Whether query, key and value projections have a bias (Qwen2.5).
        qk_norm: Whether queries and keys are normalised head by head (Qwen3).
        norm_eps: Added to the mean square under the root.
        tie_embeddings: One matrix for token embedding and output head.

    Raises:
        InputError: A field is outside its range.
    """

    vocab_size: int = 49152
    context_length: int = 8192
    emb_dim: int = 576
    n_heads: int = 9
    n_layers: int = 30
    hidden_dim: int = 1536
    n_kv_groups: int = 3
    head_dim: int = 0
    rope_base: float = 100_000.0
    rope_freq: RopeFrequencies | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.rope_freq, dict):  # from a config file
            try:
                object.__setattr__(self, "rope_freq", RopeFrequencies(**self.rope_freq))
            except TypeError:
                allowed = ", ".join(field.name for field in dataclasses.fields(RopeFrequencies))
                raise InputError(
                    f"architecture: rope_freq has other fields than {allowed}"
                ) from None
        _check_fields(self, "architecture: ")
        if (scaling := self.rope_freq) is not None:
            _check_fields(scaling, where := "architecture: rope_freq: ")
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                raise InputError(
                    f"{where}high_freq_factor {scaling.high_freq_factor} must be more than "
                    f"low_freq_factor {scaling.low_freq_factor}"
                )
        if not self.head_dim:
            _check_divides(self, "n_heads", "emb_dim")
            object.__setattr__(self, "head_dim", self.emb_dim // self.n_heads)
        _check_divides(self, "n_kv_groups", "n_heads")
        if self.head_dim % 2:
            raise InputError(f"architecture: head_dim {self.head_dim} is odd; rotations need pairs")

    @property
    def drop_rate(self) -> float:
        """None of these models was trained with dropout."""
        return 0.0

    @property
    def cache_shape(self) -> CacheShape:
        """Keys and values of the groups alone, which is what grouping saves."""
        return CacheShape(self.n_layers, self.n_kv_groups, self.head_dim)


def _check_fields(config: LlamaConfig | RopeFrequencies, where: str) -> None:
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        if field.name == "rope_freq":
            if not isinstance(value, RopeFrequencies | None):
                raise InputError(f"{where}rope_freq is {value!r}; it must be a mapping or null")
        elif type(value) not in ((float, int) if kind is float else (kind,)):
            raise InputError(
                f"{where}{field.name} is {value!r}; it must be of type {kind.__name__}"
            )
        elif kind is not bool and not (0 < value < math.inf or value == field.default == 0):
            raise InputError(f"{where}{field.name} is {value}; it must be > 0")


def _check_divides(config: LlamaConfig, divisor: str, dividend: str) -> None:
    by, of = getattr(config, divisor), getattr(config, dividend)
    if of % by:
        raise InputError(f"architecture: {dividend} {of} is not divisible by {divisor} {by}")


_LONG = RopeFrequencies()
# V, context, D, H, blocks, hidden, G, E, base of rotation, its scaling, bias, norm of q and k, eps
SIZES = {
    "smollm2-135m": LlamaConfig(49152, 8192, 576, 9, 30, 1536, 3, 64, 1e5),
    "smollm2-360m": LlamaConfig(49152, 8192, 960, 15, 32, 2560, 5, 64, 1e5),
    "smollm2-1.7b": LlamaConfig(49152, 8192, 2048, 32, 24, 8192, 32, 64, 1.3e5),
    "llama3.2-1b": LlamaConfig(128256, 131072, 2048, 32, 16, 8192, 8, 64, 5e5, _LONG),
    "llama3.2-3b": LlamaConfig(128256, 131072, 3072, 24, 28, 8192, 8, 128, 5e5, _LONG),
    "qwen2.5-0.5b": LlamaConfig(
        151936, 32768, 896, 14, 24, 4864, 2, 64, 1e6, None, True, False, 1e-6
    ),
    "qwen3-0.6b": LlamaConfig(
        151936, 40960, 1024, 16, 28, 3072, 8, 128, 1e6, None, False, True, 1e-6
    ),
    "qwen3-1.7b": LlamaConfig(
        151936, 40960, 2048, 16, 28, 6144, 8, 128, 1e6, None, False, True, 1e-6
    ),
}
# What was tuned to follow instructions is built like what it was tuned from. (Qwen3's base models
# saw 32,768 tokens at once; the number is a limit here and changes nothing that is computed.)
SIZES |= {f"{name}-instruct": config for name, config in SIZES.items()}
