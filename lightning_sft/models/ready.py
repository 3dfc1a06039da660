"""From a checkpoint, a run or weights to a model that is ready to answer, and its prompt style."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_sft.common.errors import InputError
from lightning_sft.data.prompts import PromptStyle, get_style, style_of_run
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.loading import load_weights
from lightning_sft.models.lora import add_lora, final_architecture, merge_lora
from lightning_sft.models.lora_checkpoint import load_adapters, saved_config
from lightning_sft.models.registry import get_config
from lightning_sft.runs.run_folder import run_of


def load_for_answers(
    path: str,
    architecture: str | dict[str, Any] | None = None,
    prompt_style: str | dict[str, str] | None = None,
    header_in_prompt: bool | None = None,
    weights: str | None = None,
) -> tuple[GPTModel, PromptStyle]:
    """A model ready to answer, and the style it was trained with. Adapters are merged.

    Args:
        path: A checkpoint, or weights.
        architecture, prompt_style, header_in_prompt: For weights that do not say it themselves.
        weights: Of a LoRA checkpoint's base, instead of those that it names.

    Raises:
        InputError: The path holds no weights, or they do not say their architecture.
    """
    if path.endswith(".ckpt"):
        checkpoint = read_checkpoint(Path(path), mmap=True)
        hparams = checkpoint["hyper_parameters"]
        config = get_config(hparams["architecture"])
        style = get_style(hparams["prompt_style"], hparams["header_in_prompt"])
        if saved_config(hparams) is not None:
            return _load_merged(checkpoint, weights).eval(), style
    else:
        run = _run_settings(Path(path))
        found = architecture or run.get("architecture") or _guess_architecture(path)
        if found is None:
            raise InputError(f"{path}: does not say its architecture; give --architecture")
        config = get_config(found)
        style = get_style(
            prompt_style or run.get("prompt_style", "alpaca"),
            run.get("header_in_prompt", True) if header_in_prompt is None else header_in_prompt,
        )
    with torch.device("meta"):
        model = GPTModel(config)
    load_weights(model, path)
    return model.eval(), style


def _load_merged(checkpoint: dict[str, Any], weights: str | None) -> GPTModel:
    """The base that adapters were trained beside, with the adapters merged into it."""
    settings = checkpoint["hyper_parameters"]
    if weights is not None:
        settings = settings | {"weights": weights}
    base = settings.get("weights")
    with torch.device("meta"):
        model = GPTModel(get_config(settings["architecture"]))
    if base is None:
        model.randomize(int(settings.get("seed", 0)))
    else:
        load_weights(model, base)
    adapters = saved_config(settings)
    assert adapters is not None
    load_adapters(add_lora(model, adapters), checkpoint, base)
    return merge_lora(model)


def choose_device(device: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        InputError: Unknown, or not on this machine.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(device.split(":")[0], False):
        there = [name for name, here in available.items() if here]
        raise InputError(f"device: {device!r} is not here; allowed: auto, {', '.join(there)}")
    return torch.device(device)


def _run_settings(weights: Path) -> dict[str, Any]:
    """What the configuration beside a run's weights says of architecture and style."""
    run = run_of(weights)
    if run is None:
        return {}
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    data = {
        "prompt_style": style_of_run(config["data"]),
        "header_in_prompt": config["data"]["header_in_prompt"],
    }
    return data | {"architecture": dataclasses.asdict(final_architecture(config["model"]))}


def _guess_architecture(path: str) -> str | None:
    """From the book's file names, gpt2-medium355M-sft.pth, or a name such as gpt2-medium."""
    name = Path(path).name
    known = ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl")
    return next((size for size in known if name.startswith(size)), None)
