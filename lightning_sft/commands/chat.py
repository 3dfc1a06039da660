"""Answers to instructions typed at a terminal, written as they are generated.

    python -m lightning_sft chat --ckpt_path runs/gpt2-medium/version_0

Enter sends a line; a backslash before it goes on to the next one. With `--multiline` an empty line
sends what was typed. Either way a line `Input:` begins the entry's input. Ctrl-C ends an answer;
at the prompt, Ctrl-C, Ctrl-D and `/quit` end the talk. From a pipe, every line is an instruction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import Entry
from lightning_sft.decoding.answering import load_model
from lightning_sft.decoding.settings import GenerationConfig

DEFAULTS = GenerationConfig()
QUIT = ("/quit", "/exit")


def chat(
    *,
    ckpt_path: str,
    generation: GenerationConfig = DEFAULTS,
    multiline: bool = False,
    architecture: str | dict[str, Any] | None = None,
    prompt_style: str | dict[str, str] | None = None,
    header_in_prompt: bool | None = None,
    weights: str | None = None,
    device: str = "auto",
) -> None:
    """Answer instructions typed at a terminal.

    Args:
        ckpt_path: A checkpoint, a run folder, or weights (.pth, .safetensors, folder, or a name
            such as gpt2-medium or the hub's owner/name).
        generation: How answers are written.
        multiline: An empty line sends what was typed, instead of Enter.
        architecture: For weights that do not say it themselves.
        prompt_style: For weights away from their run folder; alpaca by default.
        header_in_prompt: Likewise.
        weights: Where the base of a LoRA checkpoint is now, if it was moved.
        device: auto, cpu, cuda or mps.
    """
    model = load_model(
        ckpt_path,
        device=device,
        architecture=architecture,
        prompt_style=prompt_style,
        header_in_prompt=header_in_prompt,
        weights=weights,
    )
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        sends = "an empty line sends" if multiline else "Enter sends, \\ before it goes on"
        print(f"Type an instruction; {sends}. A line 'Input:' begins an input. /quit ends.")
    for entry in read_typed(multiline) if at_terminal else read_piped():
        try:
            for piece in model.stream(entry, **dataclasses.asdict(generation)):
                print(piece, end="", flush=True)
        except (InputError, KeyboardInterrupt) as reason:
            if not at_terminal:
                raise
            # An instruction that is too long, or Ctrl-C: the end of this answer, not of the talk.
            print(reason, end="")
        print("\n", flush=True)


def read_piped() -> Iterator[Entry]:
    """Entries from standard input, one a line."""
    for line in sys.stdin:
        if line.strip() in QUIT:
            return
        if line.strip():
            yield Entry(line.rstrip("\n"), "", "")


def read_typed(multiline: bool, ask: Callable[[str], str] = input) -> Iterator[Entry]:
    """Entries from a terminal, with its line editing and history.

    Args:
        ask: Shows a prompt and returns the line typed; raises EOFError at the end.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` edits lines once it is imported
    lines: list[str] = []
    while True:
        try:
            line, ended = ask("... " if lines else ">>> "), False
        except EOFError:
            print()
            line, ended = "", True
        if line.strip() in QUIT:
            return
        goes_on = bool(line.strip()) if multiline else line.endswith("\\")
        lines.append(line if multiline else line.removesuffix("\\"))
        if ended or not goes_on:
            instruction, _, given = "\n".join(lines).partition("\nInput:")
            lines = []
            if instruction.strip():
                yield Entry(instruction.strip(), given.strip(), "")
        if ended:
            return
