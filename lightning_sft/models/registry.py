"""The models that can be named, and what a model is called.

>>> get_config("gpt2-medium").n_layers
24
"""

from __future__ import annotations

import dataclasses

from lightning_sft.common.errors import InputError
from lightning_sft.models.gpt2 import GPTConfig

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


def model_name(config: GPTConfig) -> str:
    """The book's name of a size, `gpt2-medium355M`; `gpt2-16M`-like for any other."""
    for name, known in ARCHITECTURES.items():
        if (known.emb_dim, known.n_layers) == (config.emb_dim, config.n_layers):
            return name + MODEL_SIZES[name]
    block = 12 * config.emb_dim**2
    size = config.n_layers * block + (config.vocab_size + config.context_length) * config.emb_dim
    return f"gpt2-{size / 1e6:.0f}M"
