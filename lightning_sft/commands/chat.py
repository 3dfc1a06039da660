"""Answers to instructions typed at a terminal, written as they are generated.

    python -m lightning_sft chat --ckpt_path runs/gpt2-medium/version_0

Enter sends a line; a backslash before it goes on to the next one. With `--multiline` an empty line
sends what was typed. Either way a line `Input:` begins the entry's input. Ctrl-C ends an answer;
at the prompt, Ctrl-C, Ctrl-D and `/quit` end the talk. From a pipe, every line is an instruction.

Earlier turns go along, laid out as in training, where the prompt style closes answers with a mark
of its own, as chatml does. With the others, as alpaca, each instruction stands by itself until
`/turns` says otherwise. `/new` forgets what was said, `/system` shows what the model is told first
and `/system TEXT` sets it. Notes go to standard error, so that a pipe holds answers alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.entries import Entry
from lightning_sft.decoding.answering import load_model
from lightning_sft.decoding.settings import GenerationConfig

DEFAULTS = GenerationConfig()
QUIT = ("/quit", "/exit")
COMMANDS = ("/new", "/system", "/turns")


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

    Earlier turns go along with prompt styles that close answers (chatml, llama3, qwen3, template).
    /new forgets them, /turns turns that on or off, /system shows or sets the system prompt.

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
    talk = Talk(model.style.closes_answers)
    if at_terminal:
        sends = "an empty line sends" if multiline else "Enter sends, \\ before it goes on"
        print(f"Type an instruction; {sends}. A line 'Input:' begins an input. /quit ends.")
        stands = "Earlier turns go along" if talk.keeps_turns else "Each stands by itself"
        print(f"{stands}; /turns changes that. /new begins anew, /system TEXT sets a prompt.")
    for entry in read_typed(multiline) if at_terminal else read_piped():
        if talk.obey(entry.instruction):
            continue
        said = ""
        asked = talk.ask(entry)
        try:
            asked, cut = model.cut_history(asked, generation.max_new_tokens)
            if cut:
                turns = "turn no longer fits" if cut == 1 else "turns no longer fit"
                was = "was" if cut == 1 else "were"
                _note(f"{cut} earlier {turns} the context and {was} left out")
            for piece in model.stream(asked, **dataclasses.asdict(generation)):
                print(piece, end="", flush=True)
                said += piece
        except (InputError, KeyboardInterrupt) as reason:
            if not at_terminal:
                raise
            # An instruction that is too long, or Ctrl-C: the end of this answer, not of the talk.
            print(reason, end="")
        print("\n", flush=True)
        talk.remember(asked, said)


class Talk:
    """What was said so far, as far as it goes along with the next instruction.

    Args:
        keeps_turns: Whether earlier turns do at all.
    """

    def __init__(self, keeps_turns: bool) -> None:
        self.keeps_turns = keeps_turns
        self.system = ""
        self.turns: tuple[Message, ...] = ()  # questions and answers, without the system's message

    def ask(self, entry: Entry) -> Conversation:
        """The conversation that ends with this instruction."""
        system = (Message("system", self.system),) if self.system else ()
        return Conversation((*system, *self.turns, *entry.conversation.messages))

    def remember(self, asked: Conversation, answer: str) -> None:
        """What was asked and answered, also where the answer was ended early; not what was not."""
        if self.keeps_turns and answer.strip():
            said = [message for message in asked.messages if message.role != "system"]
            self.turns = (*said, Message("assistant", answer))

    def obey(self, line: str) -> bool:
        """Do what a line says, if it is a command."""
        command, _, text = line.strip().partition(" ")
        if command not in COMMANDS or (text and command != "/system"):
            return False
        if command == "/new":
            self.turns = ()
            _note("a new conversation")
        elif command == "/turns":
            self.keeps_turns, self.turns = not self.keeps_turns, ()
            _note("earlier turns go along" if self.keeps_turns else "each stands by itself")
        elif text.strip():
            self.system = "" if text.strip() == "-" else text.strip()
            _note("the system prompt is set" if self.system else "the system prompt is gone")
        else:
            shown = self.system or "none is set; /system TEXT sets one, and /system - removes it"
            _note(f"system prompt: {shown}")
        return True


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


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
        if not lines and line.split(" ")[0] in COMMANDS:
            goes_on = False  # there is nothing to wait for
        lines.append(line if multiline else line.removesuffix("\\"))
        if ended or not goes_on:
            instruction, _, given = "\n".join(lines).partition("\nInput:")
            lines = []
            if instruction.strip():
                yield Entry(instruction.strip(), given.strip(), "")
        if ended:
            return
