"""A GGUF file → a configuration, and tensors as Hugging Face names and arranges them.

Quantized matrices become float32, whole tensors at a time, by the package gguf (extra `gguf`):
F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K and whatever else it can undo. Training goes on from
what is left of the weights, which is a worse start than the weights themselves.

    >>> config_from_gguf(read_gguf_header(path)).n_layers
    30

Source: the GGUF format and convert_hf_to_gguf.py, github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.common.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from lightning_sft.models import gpt2_weights, llama_weights
from lightning_sft.models.gpt2 import GPTConfig
from lightning_sft.models.llama import rotation_rates
from lightning_sft.models.llama_config import LlamaConfig, RopeFrequencies
from lightning_sft.runs.run_folder import is_first_process

# GGML's numbers of the types that torch has itself, and which numpy type carries their bytes.
_PLAIN = {
    0: (np.float32, torch.float32),
    1: (np.float16, torch.float16),
    30: (np.int16, torch.bfloat16),
}
# Llama 3's rotations, as factors by which each is slowed down; no tensor of the model.
_ROPE_FACTORS = "rope_freqs.weight"


def config_from_gguf(
    header: GGUFHeader, factors: torch.Tensor | None = None
) -> LlamaConfig | GPTConfig:
    """The configuration that a file's facts describe.

    Args:
        factors: (E/2,) its tensor `rope_freqs.weight`, where it has one.

    Raises:
        InputError: Another architecture, a part of it that is not built here, or a missing fact.
    """
    kind = architecture_of(header)
    facts = _Facts(header.facts, kind)
    n_heads, n_layers = facts.get("attention.head_count"), facts.get("block_count")
    if n_layers not in range(len(header.tensors) + 1):  # a damaged one can be billions
        raise InputError(f"GGUF: {kind}.block_count {n_layers!r} is more than there are tensors")
    sizes = {
        "vocab_size": _place_of(header, "token_embd.weight").shape[0],
        "context_length": facts.get("context_length"),
        "emb_dim": facts.get("embedding_length"),
        "n_heads": n_heads,
        "n_layers": n_layers,
        "tie_embeddings": "output.weight" not in header.tensors,
    }
    if kind == "gpt2":
        facts.refuse("feed_forward_length", 4 * sizes["emb_dim"])
        return GPTConfig(**sizes)
    facts.refuse("expert_count", 0)
    facts.refuse("attention.sliding_window", 0)
    facts.refuse("rope.scaling.type", "none")
    config = LlamaConfig(
        **sizes,
        hidden_dim=facts.get("feed_forward_length"),
        n_kv_groups=facts.get("attention.head_count_kv", n_heads),
        head_dim=facts.get("attention.key_length", 0),
        rope_base=_shortest(facts.get("rope.freq_base", 10_000.0)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        norm_eps=_shortest(facts.get("attention.layer_norm_rms_epsilon")),
    )
    facts.refuse("rope.dimension_count", config.head_dim)
    facts.refuse("attention.value_length", config.head_dim)
    return config if factors is None else _with_scaling(config, factors)


def read_gguf_config(path: Path) -> LlamaConfig | GPTConfig:
    """The configuration of a file, whose tensors are left unread.

    Raises:
        InputError: A damaged file or another architecture.
    """
    header = read_gguf_header(path)
    factors = None
    if (place := header.tensors.get(_ROPE_FACTORS)) is not None:
        content = np.memmap(path, np.uint8, mode="r")
        factors = _read_tensor(content, place, f"{path}: {_ROPE_FACTORS}")
    return config_from_gguf(header, factors)


def read_gguf(path: Path) -> tuple[LlamaConfig | GPTConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a file; the latter under Hugging Face's names.

    F32, F16 and BF16 are memory-mapped, all else becomes float32.

    Raises:
        InputError: A damaged file, another architecture, or a type that cannot be undone.
    """
    header = read_gguf_header(path)
    content = np.memmap(path, np.uint8, mode="c")  # a private copy of whatever is written to
    tensors = {
        name: _read_tensor(content, place, f"{path}: {name}")
        for name, place in header.tensors.items()
    }
    kind = architecture_of(header)
    config = config_from_gguf(header, tensors.pop(_ROPE_FACTORS, None))
    all_names = gpt2_weights.gguf_names if kind == "gpt2" else llama_weights.gguf_names
    names = {gguf: hf for hf, gguf in all_names(config.n_layers).items()}
    return config, {
        names.get(name, name): _rearrange(name, tensor, kind, config)
        for name, tensor in tensors.items()
    }


@functools.cache  # said once
def note_quantized(path: Path) -> None:
    """Say on stderr, on the first rank, that a quantized GGUF is a worse start than its weights."""
    gguf = gguf_package()
    kinds = {place.kind for place in read_gguf_header(path).tensors.values()} - _PLAIN.keys()
    types = [_quantization(kind, str(path)) for kind in sorted(kinds)]
    rounded = [kind.name for kind in types if gguf.GGML_QUANT_SIZES[kind][0] > 1]  # in blocks
    if rounded and is_first_process():
        print(
            f"note: {path.name} is quantized ({', '.join(rounded)}), a worse start for training "
            "than the full-precision weights it was made of",
            file=sys.stderr,
        )


def _rearrange(
    name: str, tensor: torch.Tensor, kind: str, config: LlamaConfig | GPTConfig
) -> torch.Tensor:
    """A tensor as Hugging Face has it: only two architectures are arranged otherwise in GGUF."""
    if kind == "gpt2" and name.startswith("blk.") and tensor.ndim == 2:
        return tensor.T  # (in, out) there
    if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        _, kv_heads, head_dim = config.cache_shape
        heads = kv_heads if name.endswith("attn_k.weight") else config.n_heads
        if tensor.ndim != 2 or tensor.shape[0] != heads * head_dim:
            raise InputError(
                f"GGUF: {name} is {tuple(tensor.shape)}, not {heads} x {head_dim} rows"
            )
        return halves_from_pairs(tensor, heads)
    return tensor


def architecture_of(header: GGUFHeader) -> str:
    """`gpt2`, `llama`, `qwen2` or `qwen3`.

    Raises:
        InputError: Any other.
    """
    kind = header.facts.get("general.architecture")
    if kind not in (allowed := ("gpt2", "llama", "qwen2", "qwen3")):
        raise InputError(f"GGUF: architecture {kind!r} is not one of {', '.join(allowed)}")
    return str(kind)


def halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of Llama's queries and keys, (heads·E, D).

    Its rotation turns neighbours, numbers 2e and 2e + 1 of a head; everyone else's turns numbers e
    and e + E/2. Qwen's rows stay as they are, as llama.cpp rotates those like everyone else.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Llama's queries and keys in llama.cpp's order: `halves_from_pairs` undone."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class _Facts:
    """A file's facts about one architecture, whose name begins their keys."""

    def __init__(self, facts: dict[str, Any], architecture: str) -> None:
        self.facts = facts
        self.architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        value = self.facts.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise InputError(f"GGUF: {self.architecture}.{key} is missing")
        if isinstance(value, list) and len(set(value)) == 1:  # one number for each layer
            return value[0]
        return value

    def refuse(self, key: str, allowed: Any) -> None:
        if (value := self.get(key, allowed)) != allowed:
            raise InputError(f"GGUF: {self.architecture}.{key} {value!r} is not supported")


def _shortest(value: float) -> float:
    """0.00001, which float32 keeps as 0.00000999999974…, as the number that was meant."""
    return float(str(np.float32(value)))


def _place_of(header: GGUFHeader, name: str) -> GGUFTensor:
    if name not in header.tensors:
        raise InputError(f"GGUF: the tensor {name} is missing")
    return header.tensors[name]


def _with_scaling(config: LlamaConfig, factors: torch.Tensor) -> LlamaConfig:
    """Llama 3's four numbers from the factors they lead to; three are the same in all its files."""
    scaling = RopeFrequencies(factor=_shortest(float(factors.max())))
    scaled = dataclasses.replace(config, rope_freq=scaling)
    expected = rotation_rates(config) / rotation_rates(scaled)
    if factors.shape != expected.shape or not torch.allclose(factors.float(), expected, rtol=1e-4):
        raise InputError(f"GGUF: {_ROPE_FACTORS} are not the factors of Llama 3's rotations")
    return scaled


def _read_tensor(content: np.ndarray[Any, Any], place: GGUFTensor, where: str) -> torch.Tensor:
    block, size = 1, 0  # elements of a block, and its bytes
    if place.kind in _PLAIN:
        size = np.dtype(_PLAIN[place.kind][0]).itemsize
    else:
        kind = _quantization(place.kind, where)
        block, size = gguf_package().GGML_QUANT_SIZES[kind]
    if place.shape and place.shape[-1] % block:
        raise InputError(f"{where}: rows of {place.shape[-1]} are no multiple of {block}")
    num_bytes = math.prod(place.shape) // block * size
    flat = content[place.begin : place.begin + num_bytes]
    if len(flat) != num_bytes:
        raise InputError(f"{where}: goes beyond the end of the file")
    if place.kind in _PLAIN:
        numpy_type, dtype = _PLAIN[place.kind]
        # Tensors begin at a multiple of 32, but the file may say otherwise.
        aligned = flat if place.begin % size == 0 else flat.copy()
        return torch.from_numpy(aligned.view(numpy_type).reshape(place.shape)).view(dtype)
    rows = flat.reshape(*place.shape[:-1], -1)
    try:
        return torch.from_numpy(gguf_package().dequantize(rows, kind))
    except NotImplementedError:
        raise InputError(f"{where}: the package gguf cannot undo {kind.name}") from None


def _quantization(kind: int, where: str) -> Any:
    try:
        return gguf_package().GGMLQuantizationType(kind)
    except ValueError:
        raise InputError(f"{where}: unknown type of elements {kind}") from None


def gguf_package() -> Any:
    """The package gguf.

    Raises:
        InputError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            'quantized weights need the package gguf: pip install "lightning-sft[gguf]"'
        ) from None
    return gguf
