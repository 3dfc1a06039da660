"""GGUF files: tiny models written by the package gguf as llama.cpp's converter does, and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from lightning_sft.models.gguf_file import read_gguf
from lightning_sft.models.llama import LlamaModel, rotation_rates
from lightning_sft.models.llama_config import LlamaConfig
from lightning_sft.models.llama_weights import from_hf, gguf_names, iterate_hf, model_type

QUANTIZED = ("q8_0", "q4_0", "q4_1")


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """convert_hf_to_gguf.py's `LlamaModel.permute`."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_facts(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_groups)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)


def write_gguf(
    model: LlamaModel, path: Path, kind: str = "f32", **facts: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model; matrices in `kind`, all else in float32.

    Args:
        facts: Numbers and texts to add.

    Returns:
        What a reader should find, as float32 under Hugging Face's names.
    """
    config, architecture = model.config, model_type(model.config)
    writer = gguf.GGUFWriter(path, architecture)
    write_facts(writer, config)
    for key, value in facts.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    names, expected = gguf_names(config.n_layers), {}
    for name, tensor in iterate_hf(model.state_dict()):
        values = tensor.detach().float().numpy()
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_groups}.get(name.split(".")[-2])
        is_permuted = architecture == "llama" and heads is not None
        stored = permute(values, heads) if is_permuted else values
        if values.ndim == 1 or kind == "f32":
            writer.add_tensor(names[name], np.ascontiguousarray(stored))
            expected[name] = values
            continue
        dtype = gguf.GGMLQuantizationType[kind.upper()]
        blocks = gguf.quantize(stored, dtype)
        writer.add_tensor(names[name], blocks, raw_dtype=dtype)
        expected[name] = gguf.dequantize(gguf.quantize(values, dtype), dtype)
    if config.rope_freq is not None:
        plain = LlamaConfig(head_dim=config.head_dim, rope_base=config.rope_base)
        factors = rotation_rates(plain) / rotation_rates(config)
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def load(path: Path) -> LlamaModel:
    """The model of a file; every tensor has its place, and every place its tensor."""
    config, tensors = read_gguf(path)
    assert isinstance(config, LlamaConfig)
    with torch.device("meta"):
        model = LlamaModel(config)
    model.materialize()
    state = from_hf(tensors, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.pop(name))
    assert not state
    return model.eval()
