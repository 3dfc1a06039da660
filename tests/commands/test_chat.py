"""`chat` at a terminal: what sends, what goes on, what ends; and once through a real one."""

from __future__ import annotations

import io
import os
import pty
import select
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_sft.commands.chat import read_piped, read_typed
from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import get_style
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.decoding.answering import AnsweringModel
from lightning_sft.decoding.generation import generate
from support.runs import run
from support.serving import make_talker


def typed(*lines: str, multiline: bool = False) -> list[tuple[str, str]]:
    """Instruction and input of what is made of these lines."""
    left = iter(lines)

    def ask(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return [(entry.instruction, entry.input) for entry in read_typed(multiline, ask)]


def test_enter_sends():
    assert typed("One?", "", "Two?", "  ") == [("One?", ""), ("Two?", "")]


def test_a_backslash_goes_on():
    assert typed("Rewrite.\\", "Input: She \\", "goes.", "Next") == [
        ("Rewrite.", "She \ngoes."),
        ("Next", ""),
    ]
    assert typed("unfinished\\") == [("unfinished", "")]  # Ctrl-D sends what there is


def test_pasted_lines_arrive_as_one():
    """As `input` gives them, with bracketed paste."""
    assert typed("Rewrite.\nInput: She goes.") == [("Rewrite.", "She goes.")]


def test_an_empty_line_sends_where_lines_are_many():
    lines = ["Rewrite", "it.", "Input: She", "goes.", "", "", "Next \\", "", "last"]
    assert typed(*lines, multiline=True) == [
        ("Rewrite\nit.", "She\ngoes."),
        ("Next \\", ""),
        ("last", ""),
    ]


@pytest.mark.parametrize("multiline", [False, True])
def test_quitting(multiline):
    assert typed("/quit", "no", multiline=multiline) == []
    assert typed("One", "", " /exit ", "no", multiline=multiline) == [("One", "")]


def test_a_pipe_has_an_instruction_a_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n\nTwo \\\n/quit\nno\n"))
    assert list(read_piped()) == [Entry("One?", "", ""), Entry("Two \\", "", "")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(make_talker().state_dict(), path)
    shape = "{context_length: 256, emb_dim: 32, n_heads: 4, n_layers: 2}"
    return ["--ckpt_path", str(path), "--architecture", shape, "--device=cpu"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_ends_an_answer_does_not_end_the_talk(weights, monkeypatch, capsys):
    """Ctrl-C, and an instruction that is too long."""
    right = AnsweringModel.stream

    def answer(self: AnsweringModel, entry: Entry, **settings: Any) -> Iterator[str]:
        for place, piece in enumerate(right(self, entry, **settings)):
            if entry.instruction == "Stop" and place == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(AnsweringModel, "stream", answer)
    monkeypatch.setattr(sys, "stdin", Terminal("One?\nStop\n" + "word " * 300 + "\nOne?\n"))
    assert run("chat", *weights, "--generation.max_new_tokens=20") == 0
    greeting, first, stopped, refused, again, end = capsys.readouterr().out.split(">>> ")
    assert "Enter sends" in greeting
    assert first == again
    assert 0 < len(stopped) < len(first)
    assert "leaves no room for an answer" in refused
    assert end.strip() == ""


def test_ctrl_c_ends_a_pipe(weights, monkeypatch, capsys):
    def interrupt(*arguments: Any, **settings: Any) -> Iterator[str]:
        raise KeyboardInterrupt
        yield ""

    monkeypatch.setattr(AnsweringModel, "stream", interrupt)
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\n"))
    assert run("chat", *weights) == 130


def test_in_a_terminal(weights, tmp_path):
    """The whole command with a keyboard: line editing, Enter, Ctrl-C in an answer, Ctrl-D."""
    child, keyboard = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "lightning_sft", "chat", *weights]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [*command, "--generation.max_new_tokens=80"], environment)
    shown = ""

    def press(keys: str, wait_for: str) -> str:
        """What is shown from these keys on until `wait_for`."""
        nonlocal shown
        before, end = len(shown), time.monotonic() + 60
        os.write(keyboard, keys.encode())
        while wait_for not in shown[before:] and time.monotonic() < end:
            if select.select([keyboard], [], [], 0.1)[0]:
                try:
                    shown += os.read(keyboard, 4096).decode("utf-8", "replace")
                except OSError:  # the terminal is closed: the command has ended
                    break
        return shown[before:]

    try:
        assert "Enter sends" in press("", ">>> ")
        first = press("Hi\n", "\n>>> ")
        assert len(first) > 200
        assert press("\x1b[A\n", "\n>>> ").count("Hi") == 1  # the key "up": what was typed before
        press("Hi\n", first.splitlines()[1][:10])  # the answer has begun
        assert "^C" in press("\x03", "\n>>> ")
        press("\x04", "nothing more")
        assert os.waitpid(child, 0)[1] == 0
        child = 0
    finally:
        if child:
            os.kill(child, 9)
            os.waitpid(child, 0)
        os.close(keyboard)


# --- Conversations ---

COUNT = 12  # tokens an answer


def answers_to(questions: list[str], style: str, system: str = "") -> list[str]:
    """What one pass over the whole conversation gives at each turn, with nothing kept."""
    model, layout, tokenizer = make_talker(), get_style(style), gpt2_tokenizer()
    said = [Message("system", system)] if system else []
    for question in questions:
        said.append(Message("user", question))
        ids = encode_prompt(Conversation(tuple(said)), layout, tokenizer)
        found = generate(model, [ids], max_new_tokens=COUNT)[0]
        said.append(Message("assistant", layout.extract(tokenizer.decode(found))))
    return [message.content for message in said if message.role == "assistant"]


def pipe(monkeypatch, capsys, weights: list[str], style: str, *lines: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    options = ["--prompt_style", style, f"--generation.max_new_tokens={COUNT}"]
    assert run("chat", *weights, *options) == 0
    return capsys.readouterr()


FIVE = ["One?", "And two?", "Three!", "Four, then.", "Five?"]


def test_five_turns_through_a_pipe(weights, monkeypatch, capsys):
    out, err = pipe(monkeypatch, capsys, weights, "chatml", *FIVE)
    expected = answers_to(FIVE, "chatml")
    assert out == "".join(f"{answer}\n\n" for answer in expected)
    assert err == ""
    assert expected[1:] != [answers_to([question], "chatml")[0] for question in FIVE[1:]]


def test_each_stands_by_itself_in_a_style_without_a_closing_mark(weights, monkeypatch, capsys):
    lines = ["One?", "Two?", "/turns", "One?", "Two?"]
    out, err = pipe(monkeypatch, capsys, weights, "alpaca", *lines)
    alone = [answers_to([question], "alpaca")[0] for question in ("One?", "Two?")]
    together = answers_to(["One?", "Two?"], "alpaca")
    assert out.split("\n\n")[:-1] == alone + together
    assert alone != together
    assert err == "(earlier turns go along)\n"


def test_a_system_prompt_and_a_new_beginning(weights, monkeypatch, capsys):
    lines = ["/system", "/system Be brief.", "/system", "One?", "/new", "Two?", "/system -", "/new"]
    out, err = pipe(monkeypatch, capsys, weights, "chatml", *lines, "One?")
    told = [answers_to([question], "chatml", "Be brief.")[0] for question in ("One?", "Two?")]
    assert out.split("\n\n")[:-1] == [*told, answers_to(["One?"], "chatml")[0]]
    assert err.splitlines() == [
        "(system prompt: none is set; /system TEXT sets one, and /system - removes it)",
        "(the system prompt is set)",
        "(system prompt: Be brief.)",
        "(a new conversation)",
        "(the system prompt is gone)",
        "(a new conversation)",
    ]


def test_a_long_talk_loses_its_oldest_turns_and_says_so(weights, monkeypatch, capsys):
    questions = [f"Question {place} " + "and more " * 12 for place in range(6)]
    out, err = pipe(monkeypatch, capsys, weights, "chatml", "/system Be brief.", *questions)
    assert "(1 earlier turn no longer fits the context and was left out)" in err
    assert len(out.split("\n\n")) == 7
    assert out.split("\n\n")[0] == answers_to(questions[:1], "chatml", "Be brief.")[0]


def test_a_command_is_sent_at_once_where_lines_are_many():
    lines = ["/new", "/system Be", "One", "/new", "", "/turns"]
    assert typed(*lines, multiline=True) == [
        ("/new", ""),
        ("/system Be", ""),
        ("One\n/new", ""),
        ("/turns", ""),
    ]
