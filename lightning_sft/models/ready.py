"""From a checkpoint, a run or weights to a model that is ready to answer, and its prompt style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_sft.common import hub
from lightning_sft.common.config_files import read_config
from lightning_sft.common.errors import InputError
from lightning_sft.data.prompts import PromptStyle, get_style, style_of_run
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.models.files import find_weights
from lightning_sft.models.found_config import check_config, found_config
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.loading import fill, load_weights, make_model
from lightning_sft.models.lora import add_lora, final_architecture, merge_lora
from lightning_sft.models.lora_checkpoint import load_adapters, saved_config
from lightning_sft.models.registry import ARCHITECTURES, GPT2, REPOSITORIES, get_config
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
        path: A checkpoint, or weights: a path or a name.
        architecture, prompt_style, header_in_prompt: For weights that do not say it themselves.
        weights: Of a LoRA checkpoint's base, instead of those that it names.

    Raises:
        InputError: The path holds no weights, or they do not say their architecture.
    """
    if path.endswith(".ckpt"):
        return _load_checkpoint(Path(path), weights)
    run = run_of(Path(path))
    settings = read_run_config(run) if run is not None else {}
    guess = _guess_architecture(path)
    # GPT-2's names say all there is to say; others are but a width and a depth.
    theirs = guess if guess in GPT2.sizes else found_config(path) or guess
    found = architecture or _run_architecture(settings) or theirs
    if found is None:
        find_weights(path)  # that it is not there comes first
        raise InputError(f"{path}: does not say its architecture; give --architecture")
    data = settings.get("data", {})
    style = get_style(
        prompt_style or style_of_run(data) or "alpaca",
        data.get("header_in_prompt", True) if header_in_prompt is None else header_in_prompt,
    )
    model = _make(found)
    check_config(model.config, path)
    load_weights(model, path)
    return model.eval(), style


def _load_checkpoint(path: Path, weights: str | None) -> tuple[GPTModel, PromptStyle]:
    checkpoint = read_checkpoint(path, mmap=True, check=True)
    settings = checkpoint["hyper_parameters"]
    try:
        get_config(settings["architecture"])
        style = get_style(settings["prompt_style"], settings["header_in_prompt"])
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"ckpt_path: {path}: its settings are damaged ({error})") from None
    if saved_config(settings) is not None:
        return _load_merged(checkpoint, weights).eval(), style
    model = _make(settings["architecture"])
    fill(model, checkpoint["state_dict"], path)
    return model.eval(), style


def _make(architecture: str | dict[str, Any] | GPTConfig) -> GPTModel:
    return make_model(get_config(architecture))


def _load_merged(checkpoint: dict[str, Any], weights: str | None) -> GPTModel:
    """The base that adapters were trained beside, with the adapters merged into it."""
    settings = checkpoint["hyper_parameters"]
    if weights is not None:
        settings = settings | {"weights": weights}
    base = settings.get("weights")
    model = _make(settings["architecture"])
    if base is None:  # random weights are a function of their seed
        model.randomize(int(settings.get("seed", 0)))
    else:
        load_weights(model, base)
    adapters = saved_config(settings)
    assert adapters is not None
    load_adapters(add_lora(model, adapters), checkpoint, base)
    return merge_lora(model)


def find_device(name: str) -> torch.device | None:
    """The device of that name, None if this machine does not have it.

    Args:
        name: `auto` (CUDA, then MPS, then the CPU), `gpu` (one of the first two), or a device as
            torch names it, such as `cuda:1`.
    """
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    wanted = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}
    found = [one for one in wanted.get(name, (name,)) if here.get(one.split(":")[0], False)]
    return torch.device(found[0]) if found else None


def choose_device(device: str) -> torch.device:
    """`find_device`, where there must be one.

    Raises:
        InputError: Unknown, or not on this machine.
    """
    found = find_device(device)
    if found is None:
        there = [name for name in ("cuda", "mps", "cpu") if find_device(name) is not None]
        raise InputError(f"device: {device!r} is not here; allowed: auto, {', '.join(there)}")
    return found


def read_run_config(run: Path) -> dict[str, Any]:
    """A run's `config.yaml`, whose sections are what others rely on.

    Raises:
        InputError: It is damaged.
    """
    config = read_config(run / "config.yaml")
    kinds: dict[str, tuple[type, ...]] = {"prompt_style": (str, dict), "header_in_prompt": (bool,)}
    for key, allowed in kinds.items():
        value = config.get("data", {}).get(key, allowed[0]())
        if not isinstance(value, allowed):
            raise InputError(f"{run / 'config.yaml'}: data.{key} is {value!r:.40}, which is none")
    return config


def _run_architecture(config: dict[str, Any]) -> GPTConfig | None:
    """Of the final weights of the run with that config."""
    model = config.get("model", {})
    return final_architecture(model) if model.get("architecture") else None


def _guess_architecture(path: str) -> str | None:
    """From the book's file names, gpt2-medium355M-sft.pth, or a name such as gpt2-medium."""
    if (repository := hub.find_repository(path)) is not None:  # its config.json says the rest
        return next((size for size, name in REPOSITORIES.items() if name == repository.name), None)
    name = Path(path).name
    return next((size for size in ARCHITECTURES if name.startswith(size)), None)
