"""Llama's weights and configuration under the names of others: Hugging Face's, the book's, GGUF's.

Only names change, and nothing is copied: linear weights are (out, in) everywhere. What this
architecture cannot compute is refused by its name in `config.json`, never computed otherwise.

Source: `load_weights_into_llama` and `load_weights_into_qwen` of the bonus material of "Build a
Large Language Model (From Scratch)"; transformers' `LlamaConfig`, `Qwen2Config`, `Qwen3Config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from lightning_sft.common.errors import InputError
from lightning_sft.models.llama import LlamaModel
from lightning_sft.models.llama_config import LlamaConfig, RopeFrequencies

# Ours → Hugging Face's and GGUF's, outside the blocks and in each of them.
_TOP_NAMES = {
    "tok_emb": ("model.embed_tokens", "token_embd"),
    "final_norm": ("model.norm", "output_norm"),
    "out_head": ("lm_head", "output"),
}
_BLOCK_NAMES = {
    "norm1": ("input_layernorm", "attn_norm"),
    "att.W_query": ("self_attn.q_proj", "attn_q"),
    "att.W_key": ("self_attn.k_proj", "attn_k"),
    "att.W_value": ("self_attn.v_proj", "attn_v"),
    "att.out_proj": ("self_attn.o_proj", "attn_output"),
    "att.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "att.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "norm2": ("post_attention_layernorm", "ffn_norm"),
    "ff.fc1": ("mlp.gate_proj", "ffn_gate"),
    "ff.fc2": ("mlp.up_proj", "ffn_up"),
    "ff.fc3": ("mlp.down_proj", "ffn_down"),
}
_NORM = re.compile(r"(.*\.)?(norm[12]|[qk]_norm|final_norm)\.(weight|scale)")
# transformers' classes, and the name of the GGUF architecture is the key as well.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Keys of config.json that must have one of these values or be absent: all else is another model.
_ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),  # Qwen2's q, k and v have biases without saying so
    "mlp_bias": (False,),
    "quantization_config": (None,),
}

Tensors = Mapping[str, torch.Tensor]


def from_hf(tensors: Tensors, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Rename Hugging Face's tensors, or the book's, into a state dict of `LlamaModel`.

    What has no place in a model of `config.n_layers` keeps its name; nothing is copied.
    """
    names = {theirs.removeprefix("model."): ours for ours, theirs in hf_names(config.n_layers)}
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return {
        names.get(name, _from_qwen3(name)): tensor
        for name, tensor in stripped.items()
        if not is_rotary_buffer(name)
    }


def is_rotary_buffer(name: str) -> bool:
    """Whether a tensor of that name is one that old files carry along, and no weight."""
    return name.endswith("rotary_emb.inv_freq")


def to_hf(state_dict: Tensors) -> dict[str, torch.Tensor]:
    """Rename a state dict of `LlamaModel` into Hugging Face's tensors, ready to be saved.

    `lm_head.weight` is left out where the head is the embedding itself.
    """
    return {name: tensor.contiguous() for name, tensor in iterate_hf(state_dict)}


def iterate_hf(state_dict: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """`to_hf` one tensor at a time, for models that should not be in memory twice."""
    for ours, theirs in hf_names(count_layers(state_dict)):
        if ours not in state_dict:
            continue  # biases and norms that only some models have
        is_tied = ours == "out_head.weight" and (
            state_dict[ours].data_ptr() == state_dict["tok_emb.weight"].data_ptr()
        )
        if not is_tied:
            yield theirs, state_dict[ours]


def book_state_dict(model: LlamaModel) -> dict[str, torch.Tensor]:
    """The state dict of the book's `Llama3Model` or, with q/k norms, of its `Qwen3Model`."""
    state = model.state_dict()
    if not model.config.qk_norm:
        return state
    return {
        name.removesuffix("weight") + "scale" if _NORM.fullmatch(name) else name: tensor
        for name, tensor in state.items()
    }


def _from_qwen3(name: str) -> str:
    """Our name of what the book's `Qwen3Model` calls `scale`, the gain of a norm."""
    is_gain = name.endswith(".scale") and _NORM.fullmatch(name)
    return name.removesuffix("scale") + "weight" if is_gain else name


def hf_names(n_layers: int) -> Iterator[tuple[str, str]]:
    """Our name and Hugging Face's of every parameter that a model may have."""
    return ((ours, hf) for ours, hf, _ in _all_names(n_layers))


def gguf_names(n_layers: int) -> dict[str, str]:
    """GGUF's name for each of Hugging Face's."""
    return {hf: gguf for _, hf, gguf in _all_names(n_layers)}


def count_layers(names: Iterable[str]) -> int:
    """How many blocks tensors of these names make, ours or Hugging Face's."""
    found = (re.match(r"(?:(?:model\.)?layers|trf_blocks)\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _all_names(n_layers: int) -> Iterator[tuple[str, str, str]]:
    for ours, (hf, gguf) in _TOP_NAMES.items():
        yield f"{ours}.weight", f"{hf}.weight", f"{gguf}.weight"
    for layer in range(n_layers):
        for ours, (hf, gguf) in _BLOCK_NAMES.items():
            for part in ("weight", "bias") if ours.startswith("att.W_") else ("weight",):
                yield (
                    f"trf_blocks.{layer}.{ours}.{part}",
                    f"model.layers.{layer}.{hf}.{part}",
                    f"blk.{layer}.{gguf}.{part}",
                )


def model_type(config: LlamaConfig) -> str:
    """`qwen3` for a model with q/k norms, `qwen2` for one with biases, else `llama`.

    Raises:
        InputError: It has both, which no published architecture has.
    """
    if config.qk_norm and config.qkv_bias:
        raise InputError("architecture: no known model has both qk_norm and qkv_bias")
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    """`config.json` without the tokenizer's ids, in the form that every transformers reads."""
    kind, scaling = model_type(config), config.rope_freq
    facts: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.emb_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_groups,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": "float32",
    }
    if kind == "qwen2":
        if config.head_dim * config.n_heads != config.emb_dim:
            raise InputError("architecture: qwen2 has no head_dim of its own")
        facts["use_sliding_window"] = False
    else:
        facts |= {"head_dim": config.head_dim, "attention_bias": False}
    if scaling is not None:
        facts["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return facts


def from_hf_config(facts: Mapping[str, Any]) -> LlamaConfig:
    """The configuration that a `config.json` describes, of transformers 4 or 5.

    Raises:
        InputError: Another architecture, a part of it that is not built here, or a missing size.
    """
    kind = facts.get("model_type")
    if kind not in _CLASSES:
        raise InputError(f"config.json: model_type {kind!r} is not one of {', '.join(_CLASSES)}")
    for key, allowed in _ONLY.items():
        if facts.get(key, allowed[0]) not in allowed:
            raise InputError(f"config.json: {key} {facts[key]!r} is not supported")
    _refuse_windows(facts)
    # Version 5 keeps the base and the scaling of rotations together, version 4 apart.
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    try:
        return LlamaConfig(
            vocab_size=facts["vocab_size"],
            context_length=facts["max_position_embeddings"],
            emb_dim=facts["hidden_size"],
            n_heads=facts["num_attention_heads"],
            n_layers=facts["num_hidden_layers"],
            hidden_dim=facts["intermediate_size"],
            n_kv_groups=facts.get("num_key_value_heads") or facts["num_attention_heads"],
            head_dim=facts.get("head_dim") or (128 if kind == "qwen3" else 0),
            rope_base=float(rope.get("rope_theta") or facts.get("rope_theta") or 10_000.0),
            rope_freq=_read_scaling(rope),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            norm_eps=float(facts.get("rms_norm_eps", 1e-6)),
            tie_embeddings=facts.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise InputError(f"config.json: {error.args[0]} is missing") from None


def _read_scaling(rope: Mapping[str, Any]) -> RopeFrequencies | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config.json: partial_rotary_factor is not supported")
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"config.json: rope_type {kind!r} is not supported; allowed: llama3")
    return RopeFrequencies(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context_length=rope["original_max_position_embeddings"],
    )


def _refuse_windows(facts: Mapping[str, Any]) -> None:
    """Qwen's configs all name a sliding window; what counts is whether a layer uses it."""
    layers = facts.get("layer_types")
    if layers is None and facts.get("use_sliding_window") and facts.get("sliding_window"):
        first = facts.get("max_window_layers", 0)
        layers = ["sliding_attention"] * (facts.get("num_hidden_layers", first + 1) - first)
    for kind in layers or []:
        if kind != "full_attention":
            raise InputError(f"config.json: layers of {kind!r} are not supported")
