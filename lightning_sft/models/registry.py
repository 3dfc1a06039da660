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

from lightning_sft.common import repositories
from lightning_sft.common.errors import InputError
from lightning_sft.data.tokenizer import Tokenizer, gpt2_tokenizer
from lightning_sft.models import gpt2_weights, llama_config, llama_weights
from lightning_sft.models.decoder import Decoder, DecoderConfig, KeptNumbers
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.llama import LlamaModel
from lightning_sft.models.llama_config import LlamaConfig

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One kind of decoder.

    Args:
        name: The key `family` of an architecture that a config spells out.
        model_types: As a Hugging Face config has them, and `general.architecture` of a GGUF.
        config, model: Its classes.
        sizes: The configurations that can be named.
        labels: Parameters of each as their maker counts them, as the book names its files.
        repositories: Where each is on the Hugging Face hub.
        tokenizer: Makes its tokenizer; None where it comes with the weights.
        from_hf: Hugging Face's tensors → a state dict of the model; what has no place stays.
        from_book: The same for the book's.
        to_hf: A state dict → Hugging Face's tensors, one at a time.
        hf_config, from_hf_config: A configuration as `config.json`, and back.
        gguf_names: Number of layers → GGUF's name for each of Hugging Face's.
        book_state_dict: A model → what the book's own code loads.
        is_book_extra: Whether a name in the book's file is of no weight.
        kept: What a block keeps for its backward pass; None where nobody has counted it.
    """

    name: str
    model_types: tuple[str, ...]
    config: type[Any]
    model: Callable[[Any], Decoder]
    sizes: Mapping[str, Any]
    labels: Mapping[str, str]
    repositories: Mapping[str, str]
    tokenizer: Callable[[], Tokenizer] | None
    from_hf: Callable[[Tensors, Any], dict[str, torch.Tensor]]
    from_book: Callable[[Tensors, Any], dict[str, torch.Tensor]]
    to_hf: Callable[[Tensors], Iterator[tuple[str, torch.Tensor]]]
    hf_config: Callable[[Any], dict[str, Any]]
    from_hf_config: Callable[[Mapping[str, Any]], Any]
    gguf_names: Callable[[int], dict[str, str]]
    book_state_dict: Callable[[Any], dict[str, torch.Tensor]]
    is_book_extra: Callable[[str], bool]
    kept: KeptNumbers | None


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
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
    repositories=repositories.GPT2,
    tokenizer=gpt2_tokenizer,
    from_hf=gpt2_weights.from_hf,
    from_book=lambda tensors, _: dict(tensors),
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
LLAMA = Family(
    name="llama",
    model_types=("llama", "qwen2", "qwen3"),
    config=LlamaConfig,
    model=LlamaModel,
    sizes=llama_config.SIZES,
    labels={},
    repositories=repositories.LLAMA,
    tokenizer=None,
    from_hf=llama_weights.from_hf,
    from_book=llama_weights.from_hf,  # the book's Qwen3 has another name for its gains
    to_hf=llama_weights.iterate_hf,
    hf_config=llama_weights.hf_config,
    from_hf_config=llama_weights.from_hf_config,
    gguf_names=llama_weights.gguf_names,
    book_state_dict=llama_weights.book_state_dict,
    is_book_extra=llama_weights.is_rotary_buffer,
    kept=None,
)
FAMILIES = (GPT2, LLAMA)

ARCHITECTURES: dict[str, Any] = {k: v for one in FAMILIES for k, v in one.sizes.items()}
MODEL_SIZES: dict[str, str] = {k: v for one in FAMILIES for k, v in one.labels.items()}
REPOSITORIES: dict[str, str] = repositories.REPOSITORIES


def family_of(config: DecoderConfig) -> Family:
    """The family that a configuration is of."""
    return next(family for family in FAMILIES if isinstance(config, family.config))


def get_config(architecture: str | Mapping[str, object] | DecoderConfig) -> Any:
    """The configuration of a named size, or one made from a mapping of a family's fields.

    A mapping names its family by the key `family`, or by a field that only one has.

    Raises:
        InputError: Unknown name or field, or a field out of range.
    """
    if isinstance(architecture, tuple(family.config for family in FAMILIES)):
        return architecture
    if isinstance(architecture, str):
        if architecture not in ARCHITECTURES:
            shown = [name for name in ARCHITECTURES if not name.endswith("-instruct")]
            raise InputError(
                f"architecture: unknown {architecture!r}; allowed: {', '.join(shown)}, auto, or a "
                "mapping of GPTConfig or LlamaConfig fields"
            )
        return ARCHITECTURES[architecture]
    if not isinstance(architecture, Mapping):
        kind = type(architecture).__name__
        raise InputError(f"architecture: must be a name or a mapping of fields, and is of {kind}")
    family = _family_of_fields(architecture)
    fields = {key: value for key, value in architecture.items() if key != "family"}
    allowed = _fields(family)
    unknown = sorted(str(key) for key in fields if key not in allowed)
    if unknown:
        raise InputError(
            f"architecture: unknown field {unknown[0]!r}; allowed: {', '.join(allowed)}"
        )
    return family.config(**fields)


def _family_of_fields(architecture: Mapping[str, object]) -> Family:
    if "family" in architecture:
        for family in FAMILIES:
            if family.name == architecture["family"]:
                return family
        allowed = ", ".join(family.name for family in FAMILIES)
        raise InputError(
            f"architecture: unknown family {architecture['family']!r}; allowed: {allowed}"
        )
    only_llama = set(_fields(LLAMA)) - set(_fields(GPT2))
    return LLAMA if only_llama & set(architecture) else GPT2


def _fields(family: Family) -> list[str]:
    return [field.name for field in dataclasses.fields(family.config)]


def name_size(config: DecoderConfig) -> str | None:
    """The named size of this depth and width."""
    sizes = family_of(config).sizes.items()
    wanted = (config.emb_dim, config.n_layers)
    return next((name for name, known in sizes if (known.emb_dim, known.n_layers) == wanted), None)


def model_name(config: Any) -> str:
    """The book's name of a size, `gpt2-medium355M`; `gpt2-16M`-like for any other.

    Of the Llama family `smollm2-135m`, or `llama-576x30`-like, which is width by depth.
    """
    if (name := name_size(config)) is not None:
        return name + MODEL_SIZES.get(name, "")
    if not isinstance(config, GPTConfig):
        return f"{family_of(config).name}-{config.emb_dim}x{config.n_layers}"
    block = 12 * config.emb_dim**2
    size = config.n_layers * block + (config.vocab_size + config.context_length) * config.emb_dim
    return f"gpt2-{size / 1e6:.0f}M"
