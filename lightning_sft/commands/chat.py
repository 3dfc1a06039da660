"""Answers to instructions typed at a terminal, written as they are generated.

    python -m lightning_sft chat --ckpt_path runs/gpt2-medium/version_0/checkpoints/step-000232.ckpt

An empty line sends what was typed, so an instruction can have several lines; a line `Input:` begins
the entry's input. Ctrl-D or `/quit` ends.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import PromptStyle, get_style
from lightning_sft.data.tokenizer import GPT2Tokenizer, gpt2_tokenizer
from lightning_sft.decoding.answer_text import AnswerText
from lightning_sft.decoding.generation import GenerationConfig, decode
from lightning_sft.models.gpt2 import GPTModel, get_config
from lightning_sft.models.loading import load_weights
from lightning_sft.models.lora import final_architecture, merge_lora
from lightning_sft.models.lora_checkpoint import load_adapters, saved_config
from lightning_sft.runs.run_folder import run_of
from lightning_sft.training.checkpoint import read_checkpoint
from lightning_sft.training.module import SFTModule

DEFAULTS = GenerationConfig()


def chat(
    *,
    ckpt_path: str,
    generation: GenerationConfig = DEFAULTS,
    architecture: str | dict[str, Any] | None = None,
    prompt_style: str | dict[str, str] | None = None,
    header_in_prompt: bool | None = None,
    weights: str | None = None,
    device: str = "auto",
) -> None:
    """Answer instructions typed at a terminal.

    Args:
        ckpt_path: A checkpoint, or weights (.pth, .safetensors, folder, or a name such as
            gpt2-medium), which also need an architecture.
        generation: How answers are written.
        architecture: For weights that do not say it themselves.
        prompt_style: For weights away from their run folder; alpaca by default.
        header_in_prompt: Likewise.
        weights: Where the base of a LoRA checkpoint is now, if it was moved.
        device: auto, cpu, cuda or mps.
    """
    model, style = load_for_answers(
        ckpt_path, architecture, prompt_style, header_in_prompt, weights
    )
    model.to(choose_device(device))
    tokenizer = gpt2_tokenizer()
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type an instruction, then an empty line. 'Input:' begins an input. /quit ends.")
    for entry in _read_instructions(interactive):
        for piece in stream_answer(model, entry, style, tokenizer, generation):
            print(piece, end="", flush=True)
        print("\n", flush=True)


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
    module = SFTModule(
        settings["architecture"], base, saved_config(settings), seed=int(settings.get("seed", 0))
    )
    load_adapters(module.network, checkpoint, base)
    return merge_lora(module.network)


def stream_answer(
    model: GPTModel,
    entry: Entry,
    style: PromptStyle,
    tokenizer: GPT2Tokenizer,
    generation: GenerationConfig,
) -> Iterator[str]:
    """Pieces of the answer's text as soon as they are certain; joined they are `extract`'s text.

    The steps of `decode`, through `AnswerText`.
    """
    text = AnswerText(style)
    prompt = tokenizer.encode(style.prompt(entry))
    for step in decode(model, [prompt], generation):
        for _, token in step:
            piece = text.finish() if token is None else text.add(tokenizer.token_bytes(token))
            if piece:
                yield piece


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
    data = {key: config["data"][key] for key in ("prompt_style", "header_in_prompt")}
    return data | {"architecture": dataclasses.asdict(final_architecture(config["model"]))}


def _guess_architecture(path: str) -> str | None:
    """From the book's file names, gpt2-medium355M-sft.pth, or a name such as gpt2-medium."""
    name = Path(path).name
    known = ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl")
    return next((size for size in known if name.startswith(size)), None)


def _read_instructions(interactive: bool) -> Iterator[Entry]:
    """Entries from stdin: one per paragraph at a terminal, one per line from a pipe."""
    lines: list[str] = []
    while True:
        if interactive:
            print("... " if lines else ">>> ", end="", flush=True)
        line = sys.stdin.readline()
        ended = line == ""
        text = line.rstrip("\n")
        if text.strip() in ("/quit", "/exit"):
            return
        if not interactive:
            if text.strip():
                yield Entry(text, "", "")
        elif text.strip() and not ended:
            lines.append(text)
        elif lines:
            instruction, _, given = "\n".join(lines).partition("\nInput:")
            lines = []
            yield Entry(instruction.strip(), given.strip(), "")
        if ended:
            return
