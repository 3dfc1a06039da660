"""GPT-2's weights under the names of others: Hugging Face's, the book's own file, GGUF's.

Nothing is copied: names change, linear weights are seen transposed, and the fused query, key and
value projection is taken apart or put together.

Source: `load_weights_into_gpt` of chapter 5 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from lightning_sft.data.tokenizer import END_OF_TEXT
from lightning_sft.models.gpt2 import GPTConfig, GPTModel

# Hugging Face's names and ours, outside the blocks and in each of them.
_TOP_NAMES = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
_BLOCK_NAMES = {
    "ln_1.weight": ("norm1.scale",),
    "ln_1.bias": ("norm1.shift",),
    # One matrix there, (D, 3 D); three here, (D, D) each.
    "attn.c_attn.weight": ("att.W_query.weight", "att.W_key.weight", "att.W_value.weight"),
    "attn.c_attn.bias": ("att.W_query.bias", "att.W_key.bias", "att.W_value.bias"),
    "attn.c_proj.weight": ("att.out_proj.weight",),
    "attn.c_proj.bias": ("att.out_proj.bias",),
    "ln_2.weight": ("norm2.scale",),
    "ln_2.bias": ("norm2.shift",),
    "mlp.c_fc.weight": ("ff.layers.0.weight",),
    "mlp.c_fc.bias": ("ff.layers.0.bias",),
    "mlp.c_proj.weight": ("ff.layers.2.weight",),
    "mlp.c_proj.bias": ("ff.layers.2.bias",),
}
# Causal masks that files carry along; they are no weights.
_HF_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_BOOK_MASK = re.compile(r"trf_blocks\.\d+\.att\.mask")
# GGUF's names for Hugging Face's, outside the blocks and in each of them.
_GGUF_TOP_NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
_GGUF_BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# The book's causal mask has context² numbers: 4 MB for GPT-2's 1,024 tokens, 67 MB for 4,096, and
# 69 GB for 131,072. Beyond this context its code cannot hold the model either.
LONGEST_BOOK_MASK = 4096

Tensors = Mapping[str, torch.Tensor]


def from_hf(tensors: Tensors, config: GPTConfig) -> dict[str, torch.Tensor]:
    """Rename Hugging Face's GPT-2 tensors into a state dict of `GPTModel`; nothing is copied.

    Linear weights are transposed (`Conv1D` keeps them as (in, out)) and the fused query, key and
    value taken apart. What has no place in a model of `config.n_layers` keeps its name.
    """
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    rest = {name: stripped[name] for name in stripped if not _HF_MASK.fullmatch(name)}
    state: dict[str, torch.Tensor] = {}
    for hf_name, names in _name_pairs(config.n_layers):
        if hf_name not in rest or not rest[hf_name].ndim:
            continue
        tensor = rest.pop(hf_name)
        if hf_name.endswith("c_attn.bias") and not config.qkv_bias and not tensor.any():
            continue  # what `to_hf` writes for a model without these biases
        if _is_conv1d(hf_name, tensor):
            tensor = tensor.T
        state.update(zip(names, tensor.chunk(len(names)), strict=False))
    return state | rest


def to_hf(state_dict: Tensors) -> dict[str, torch.Tensor]:
    """Rename a state dict of `GPTModel` into Hugging Face's GPT-2 tensors, ready to be saved.

    `lm_head.weight` is left out where the head is the embedding itself, as with tied weights;
    where it is there, config.json must say `tie_word_embeddings: false`.
    """
    return {name: tensor.contiguous() for name, tensor in iterate_hf(state_dict)}


def iterate_hf(state_dict: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """`to_hf` one tensor at a time, for models that should not be in memory twice."""
    for hf_name, names in _name_pairs(count_layers(state_dict)):
        if hf_name == "lm_head.weight":
            head, embedding = state_dict[names[0]], state_dict["tok_emb.weight"]
            if head.data_ptr() != embedding.data_ptr():
                yield hf_name, head
            continue
        if hf_name.endswith("c_attn.bias") and names[0] not in state_dict:
            # GPT-2 always has these; in a model built without them they are zero.
            tensor = torch.zeros(3 * state_dict["tok_emb.weight"].shape[1])
        elif len(names) == 1:
            tensor = state_dict[names[0]]
        else:
            tensor = torch.cat([state_dict[name] for name in names])
        yield f"transformer.{hf_name}", tensor.T if _is_conv1d(hf_name, tensor) else tensor


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """`config.json`: the names of transformers' `GPT2Config`, and `n_ctx` for llama.cpp."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": None,
        "activation_function": "gelu_new",  # the tanh form
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.drop_rate,
        "attn_pdrop": config.drop_rate,
        "resid_pdrop": config.drop_rate,
        "initializer_range": 0.02,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
        # Where this says true, transformers overwrites a trained head by the embedding.
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": "float32",
    }


def from_hf_config(facts: Mapping[str, Any]) -> GPTConfig:
    """The configuration that a `config.json` of ours describes.

    Raises:
        KeyError: A size is missing.
    """
    return GPTConfig(
        vocab_size=facts["vocab_size"],
        context_length=facts["n_positions"],
        emb_dim=facts["n_embd"],
        n_heads=facts["n_head"],
        n_layers=facts["n_layer"],
        tie_embeddings=facts["tie_word_embeddings"],
    )


def book_state_dict(model: GPTModel) -> dict[str, torch.Tensor]:
    """The model's state dict with the causal masks that the book's `GPTModel` expects.

    All layers share one mask, which `torch.save` writes once. Models of a context beyond
    `LONGEST_BOOK_MASK` get none: with `strict=False` the book's code takes them as well.
    """
    length = model.config.context_length
    if length > LONGEST_BOOK_MASK:
        return model.state_dict()
    mask = torch.triu(torch.ones(length, length), diagonal=1)  # (T, T), True where not to look
    masks = {f"trf_blocks.{n}.att.mask": mask for n in range(model.config.n_layers)}
    return {**model.state_dict(), **masks}


def is_book_mask(name: str) -> bool:
    """Whether a tensor of that name is one of the book's causal masks, and no weight."""
    return _BOOK_MASK.fullmatch(name) is not None


def gguf_names(n_layers: int) -> dict[str, str]:
    """GGUF's name for each of Hugging Face's."""
    names = dict(_GGUF_TOP_NAMES)
    for layer in range(n_layers):
        for hf_name, name in _GGUF_BLOCK_NAMES.items():
            for part in ("weight", "bias"):
                names[f"transformer.h.{layer}.{hf_name}.{part}"] = f"blk.{layer}.{name}.{part}"
    return names


def count_layers(names: Iterable[str]) -> int:
    """How many blocks tensors of these names make, ours or Hugging Face's."""
    found = (re.match(r"(?:h|trf_blocks)\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _name_pairs(n_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of Hugging Face's names with ours: one, or three for the fused projection."""
    for hf_name, name in _TOP_NAMES.items():
        yield hf_name, (name,)
    for layer in range(n_layers):
        for hf_name, names in _BLOCK_NAMES.items():
            yield f"h.{layer}.{hf_name}", tuple(f"trf_blocks.{layer}.{name}" for name in names)


def _is_conv1d(hf_name: str, tensor: torch.Tensor) -> bool:
    return hf_name.startswith("h.") and tensor.ndim == 2
