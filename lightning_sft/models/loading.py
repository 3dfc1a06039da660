"""GPT-2's weights in the model's own names, and how they get into a `GPTModel`.

All names and shapes are checked before the model is touched. Tensors are read one by one from a
memory-mapped file into parameters that own their memory, so loading takes about one copy of the
model. Where files come from is `weight_files.py`'s business.

    >>> load_weights(model, "gpt2-medium")

Source: `load_weights_into_gpt` of chapter 5 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from lightning_sft.common.errors import InputError
from lightning_sft.models.files import find_weights, read_tensors
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.registry import ARCHITECTURES, MODEL_SIZES

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

Tensors = Mapping[str, torch.Tensor]


def load_weights(model: GPTModel, source: str | None) -> Path | None:
    """Fill a model with pretrained or fine-tuned weights.

    Args:
        model: On the meta device (its parameters become real ones on the CPU) or any other.
        source: A name of `REPOSITORIES`, a folder or a file; None leaves the model as it is.

    Returns:
        Where the weights were read from.

    Raises:
        InputError: No such source, a damaged file, or tensors that do not fit this model.
        ServiceError: A named model is neither in the cache nor to be had.
    """
    if source is None:
        return None
    path = find_weights(source)
    state = _fit(read_tensors(path), model, path)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.materialize()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head is not named again
            parameter.copy_(state[name])
            if not all(torch.isfinite(bound) for bound in parameter.aminmax()):
                raise InputError(f"{path}: {name} holds NaN or infinity")
    return path


def load_pretrained(name: str) -> GPTModel:
    """A named model with its published weights.

    Args:
        name: `gpt2-small`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`.

    Raises:
        InputError: Unknown name.
        ServiceError: The weights are neither in the cache nor to be had.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"weights: unknown {name!r}; allowed: {', '.join(ARCHITECTURES)}")
    with torch.device("meta"):
        model = GPTModel(ARCHITECTURES[name])
    load_weights(model, name)
    return model


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
    for hf_name, names in _name_pairs(_count_layers(state_dict)):
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


def book_state_dict(model: GPTModel) -> dict[str, torch.Tensor]:
    """The model's state dict with the causal masks that the book's `GPTModel` expects.

    All layers share one mask, which `torch.save` writes once.
    """
    length = model.config.context_length
    mask = torch.triu(torch.ones(length, length), diagonal=1)
    masks = {f"trf_blocks.{n}.att.mask": mask for n in range(model.config.n_layers)}
    return {**model.state_dict(), **masks}


def _fit(tensors: Tensors, model: GPTModel, path: Path) -> dict[str, torch.Tensor]:
    """Tensors by the model's names, after checking that each is there and of the right shape."""
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    state = {name: stripped[name] for name in stripped if not _BOOK_MASK.fullmatch(name)}
    if "tok_emb.weight" not in state and any(name.endswith("lora_a") for name in state):
        raise InputError(
            f"{path}: holds LoRA adapters and not the weights they belong to; give the merged "
            "weights, the .pth in the folder of their run"
        )
    if "tok_emb.weight" not in state:
        state = from_hf(state, model.config)
    head = state.pop("out_head.weight", state.get("tok_emb.weight"))  # without one: the embedding
    if head is not None and not model.config.tie_embeddings:
        state["out_head.weight"] = head
    _check_names_and_shapes(state, model, path)
    embedding = state["tok_emb.weight"]
    if model.config.tie_embeddings and head is not None and head is not embedding:
        same_kind = _describe(head) == _describe(embedding)
        if not (same_kind and torch.equal(head.to(embedding.dtype), embedding)):
            raise InputError(
                f"{path}: its output head differs from its embedding and would be lost in a model "
                "that ties them; set tie_embeddings: false"
            )
    return state


def _check_names_and_shapes(state: Tensors, model: GPTModel, path: Path) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [f"{name} is missing" for name in wanted if name not in state]
    extra = [f"{name} has no place" for name in state if name not in wanted]
    other = [
        f"{name} is {_describe(state[name])} instead of {shape}"
        for name, shape in wanted.items()
        if name in state and _describe(state[name]) != str(shape)
    ]
    if faults := missing + extra + other:
        raise InputError(
            f"{path}: {len(faults)} tensors do not fit the model ({len(missing)} missing, "
            f"{len(extra)} without a place, {len(other)} of another shape)"
            f"{_guess_size(state, model.config)}: {', '.join(faults[:5])}"
        )


def _describe(tensor: torch.Tensor) -> str:
    is_plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return str(tuple(tensor.shape)) if is_plain else f"{tensor.type()} {tuple(tensor.shape)}"


def _guess_size(state: Tensors, config: GPTConfig) -> str:
    width = state["tok_emb.weight"].shape[-1:] if "tok_emb.weight" in state else ()
    for name, known in ARCHITECTURES.items():
        is_it = (known.emb_dim,) == tuple(width) and known.n_layers == _count_layers(state)
        if is_it and (known.emb_dim, known.n_layers) != (config.emb_dim, config.n_layers):
            return f", it looks like {name} ({MODEL_SIZES[name]})"
    return ""


def _count_layers(names: Iterable[str]) -> int:
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
