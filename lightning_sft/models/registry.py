"""The families of models, and all that is particular to each: the only place that lists them.

>>> get_config("gpt2-medium").n_layers
24

To add a family: a module with its configuration and model (the names of `decoder.py`), a module
with its weights' names beside it, and an entry here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_sft.common.errors import InputError
from lightning_sft.data.tokenizer import Tokenizer, gpt2_tokenizer
from lightning_sft.models import gpt2_weights
from lightning_sft.models.decoder import Decoder, DecoderConfig, KeptNumbers
from lightning_sft.models.gpt2 import GPTConfig, GPTModel

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One kind of decoder.

    Args:
        name: As `model_type` of a Hugging Face config and `general.architecture` of a GGUF.
        config, model: Its classes.
        sizes: The configurations that can be named.
        labels: Parameters of each as their maker counts them, as the book names its files.
        repositories: Where each is on the Hugging Face hub.
        tokenizer: Makes its tokenizer.
        from_hf: Hugging Face's tensors → a state dict of the model; what has no place stays.
        to_hf: A state dict → Hugging Face's tensors, one at a time.
        hf_config, from_hf_config: A configuration as `config.json`, and back.
        gguf_names: Number of layers → GGUF's name for each of Hugging Face's.
        book_state_dict: A model → what the book's own code loads.
        is_book_extra: Whether a name in the book's file is of no weight.
        kept: What a block keeps for its backward pass.
    """

    name: str
    config: type[Any]
    model: Callable[[Any], Decoder]
    sizes: Mapping[str, Any]
    labels: Mapping[str, str]
    repositories: Mapping[str, str]
    tokenizer: Callable[[], Tokenizer]
    from_hf: Callable[[Tensors, Any], dict[str, torch.Tensor]]
    to_hf: Callable[[Tensors], Iterator[tuple[str, torch.Tensor]]]
    hf_config: Callable[[Any], dict[str, Any]]
    from_hf_config: Callable[[Mapping[str, Any]], Any]
    gguf_names: Callable[[int], dict[str, str]]
    book_state_dict: Callable[[Any], dict[str, torch.Tensor]]
    is_book_extra: Callable[[str], bool]
    kept: KeptNumbers


GPT2 = Family(
    name="gpt2",
    config=GPTConfig,
    model=GPTModel,
    sizes={
        "gpt2-small": GPTConfig(),
        "gpt2-medium": GPTConfig(emb_dim=1024, n_heads=16, n_layers=24),
        "gpt2-large": GPTConfig(emb_dim=1280, n_heads=20, n_layers=36),
        "gpt2-xl": GPTConfig(emb_dim=1600, n_heads=25, n_layers=48),
    },
    labels={
        "gpt2-small": "124M",
        "gpt2-medium": "355M",
        "gpt2-large": "774M",
        "gpt2-xl": "1558M",
    },
    repositories={
        "gpt2-small": "openai-community/gpt2",
        "gpt2-medium": "openai-community/gpt2-medium",
        "gpt2-large": "openai-community/gpt2-large",
        "gpt2-xl": "openai-community/gpt2-xl",
    },
    tokenizer=gpt2_tokenizer,
    from_hf=gpt2_weights.from_hf,
    to_hf=gpt2_weights.iterate_hf,
    hf_config=gpt2_weights.hf_config,
    from_hf_config=gpt2_weights.from_hf_config,
    gguf_names=gpt2_weights.gguf_names,
    book_state_dict=gpt2_weights.book_state_dict,
    is_book_extra=gpt2_weights.is_book_mask,
    kept=KeptNumbers(
        residual=2,
        normed=2,
        attention=4,
        feed_forward=8,  # four wide, before and behind GELU
        inputs=(
            (("att.W_query", "att.W_key", "att.W_value"), 1),
            (("ff.layers.0",), 1),
            (("ff.layers.2",), 4),
        ),
    ),
)
FAMILIES = (GPT2,)

ARCHITECTURES: dict[str, GPTConfig] = {k: v for one in FAMILIES for k, v in one.sizes.items()}
MODEL_SIZES: dict[str, str] = {k: v for one in FAMILIES for k, v in one.labels.items()}
REPOSITORIES: dict[str, str] = {k: v for one in FAMILIES for k, v in one.repositories.items()}


def family_of(config: DecoderConfig) -> Family:
    """The family that a configuration is of."""
    return next(family for family in FAMILIES if isinstance(config, family.config))


def get_config(architecture: str | Mapping[str, object] | GPTConfig) -> GPTConfig:
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
    if not isinstance(architecture, Mapping):
        kind = type(architecture).__name__
        raise InputError(f"architecture: must be a name or a mapping of fields, and is of {kind}")
    allowed = [field.name for field in dataclasses.fields(GPTConfig)]
    unknown = sorted(str(key) for key in architecture if key not in allowed)
    if unknown:
        raise InputError(
            f"architecture: unknown field {unknown[0]!r}; allowed: {', '.join(allowed)}"
        )
    return GPTConfig(**architecture)  # type: ignore[arg-type]


def name_size(config: DecoderConfig) -> str | None:
    """The named size of this depth and width."""
    sizes = family_of(config).sizes.items()
    wanted = (config.emb_dim, config.n_layers)
    return next((name for name, known in sizes if (known.emb_dim, known.n_layers) == wanted), None)


def model_name(config: GPTConfig) -> str:
    """The book's name of a size, `gpt2-medium355M`; `gpt2-16M`-like for any other."""
    if (name := name_size(config)) is not None:
        return name + MODEL_SIZES[name]
    block = 12 * config.emb_dim**2
    size = config.n_layers * block + (config.vocab_size + config.context_length) * config.emb_dim
    return f"gpt2-{size / 1e6:.0f}M"
