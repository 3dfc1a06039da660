"""Answers to instructions typed at a terminal, written as they are generated.

    python -m lightning_sft chat --ckpt_path runs/gpt2-medium/version_0/checkpoints/step-000232.ckpt

An empty line sends what was typed, so an instruction can have several lines; a line `Input:` begins
the entry's input. Ctrl-D or `/quit` ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import GPT2Tokenizer, gpt2_tokenizer
from lightning_sft.decoding.answer_text import AnswerText
from lightning_sft.decoding.generation import GenerationConfig, decode
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.ready import (
    choose_device,
    load_for_answers,
)

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
