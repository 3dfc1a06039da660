"""Adapters in a checkpoint: their configuration, and which frozen weights they belong to.

A checkpoint of a LoRA run holds adapters, optimizer and `base`: the sha256 of the weights that they
were trained beside, and the precision in which these were held. Beside any other weights the
adapters mean nothing, so they are refused.
"""

from __future__ import annotations

import hashlib
import reprlib
from typing import Any

import torch

from lightning_sft.common.errors import InputError
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.lora import LoRAConfig, is_adapter
from lightning_sft.models.tensor_files import check_finite


def identify_base(model: GPTModel, dtype: str | None = None) -> dict[str, str]:
    """`sha256` of all parameters but the adapters, one tensor at a time, and their `dtype`.

    Args:
        dtype: Look at the weights in this one, as training held them; their own by default.
    """
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    wanted = kinds.get(dtype or "", model.tok_emb.weight.dtype)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if is_adapter(name):
            continue  # they change with every step
        tensor = parameter.detach().to("cpu", wanted).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return {"sha256": digest.hexdigest(), "dtype": str(wanted).removeprefix("torch.")}


def saved_config(settings: dict[str, Any]) -> LoRAConfig | None:
    """The adapters' configuration in a checkpoint's hyperparameters; None for whole weights.

    Raises:
        InputError: There is something else in its place.
    """
    saved = settings.get("lora")
    if saved is None:
        return None
    try:
        if not isinstance(saved, dict):
            raise TypeError
        config = LoRAConfig(**saved | {"targets": tuple(saved["targets"])})
        config.check()
    except (KeyError, TypeError, InputError):
        shown = reprlib.repr(saved)
        raise InputError(f"ckpt_path: its model.lora is {shown}, which is none") from None
    return config


def check_adapters(model: GPTModel, checkpoint: dict[str, Any], weights: str | None) -> None:
    """Make sure that a checkpoint holds this model's adapters, trained beside this very base.

    Args:
        weights: What the model's base was read from, for the message.

    Raises:
        InputError: Whole weights, adapters of other layers or shapes, or another base.
    """
    state = checkpoint["state_dict"]
    if not any(map(is_adapter, state)):
        raise InputError(
            "ckpt_path: holds whole weights and no adapters; leave model.lora out, or give it as "
            "model.weights to train adapters beside them"
        )
    wanted = {f"model.{name}": p.shape for name, p in model.named_parameters() if is_adapter(name)}
    differing = sorted(
        name
        for name in {*wanted, *state}
        if wanted.get(name) != getattr(state.get(name), "shape", None)
    )
    if differing:
        raise InputError(
            f"ckpt_path: {len(differing)} adapters differ from what model.lora makes, first "
            f"{differing[0]}; give the rank and targets they were trained with"
        )
    # Shapes alone do not tell gpt2-small from another model of its size; the digest does.
    trained = checkpoint.get("base")
    if not isinstance(trained, dict):
        raise InputError("ckpt_path: does not say which weights its adapters belong to")
    ours = identify_base(model, trained.get("dtype"))
    if ours != trained:
        settings = checkpoint.get("hyper_parameters", {})
        raise InputError(
            f"ckpt_path: its adapters were trained beside {name_base(settings)} "
            f"({trained.get('dtype')}, sha256 {trained.get('sha256')!s:.12}), but model.weights "
            f"are {name_base({'weights': weights})} ({ours['dtype']}, sha256 {ours['sha256']:.12})"
        )


def load_adapters(model: GPTModel, checkpoint: dict[str, Any], weights: str | None) -> None:
    """Fill the adapters of a model from a checkpoint, after `check_adapters`."""
    check_adapters(model, checkpoint, weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(checkpoint["state_dict"][f"model.{name}"])
                check_finite([(name, parameter)], "ckpt_path")


def name_base(settings: dict[str, Any]) -> str:
    """How messages call the weights that adapters stand beside."""
    if settings.get("weights") is not None:
        return f"the weights {settings['weights']}"
    seed = f" of seed {settings['seed']}" if "seed" in settings else ""
    return f"random weights{seed}"
