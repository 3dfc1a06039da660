"""Twelve conversations in every style: each id of the rows, and exactly which of them carry loss.

What is expected is written down turn by turn, apart from the code that lays conversations out. The
tiny tokenizer's ids are the bytes of the text, and 256 and up for special tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from lightning_sft import Conversation, Message
from lightning_sft.data.batching import collate
from lightning_sft.data.conversation_rows import tokenize_conversation
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.data.prompts import get_style
from lightning_sft.data.segments import Masking
from support.tiny_run import write_tokenizer

END, IM_START, IM_END, BEGIN, EOT, HEAD, HEAD_END, THINK, THINK_END = range(256, 265)
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)


class Turn(NamedTuple):
    """What is expected of a message: who, what, and whether it is learned."""

    role: str
    text: str
    learned: bool = False
    input: str = ""


def user(text: str, **settings) -> Message:
    return Message("user", text, **settings)


def bot(text: str, **settings) -> Message:
    return Message("assistant", text, **settings)


SYSTEM = Message("system", "Be brief.")
# name: messages, train_on, what is expected of them
TALKS: dict[str, tuple[list[Message], str, list[Turn]]] = {
    "one question": ([user("Hi"), bot("Hello.")], "all",
        [Turn("user", "Hi"), Turn("assistant", "Hello.", True)]),
    "with an input": ([user("Spell", input="freind"), bot("friend")], "all",
        [Turn("user", "Spell", input="freind"), Turn("assistant", "friend", True)]),
    "two questions": ([user("a"), bot("b"), user("c"), bot("d")], "all",
        [Turn("user", "a"), Turn("assistant", "b", True),
         Turn("user", "c"), Turn("assistant", "d", True)]),
    "three questions": ([user("a"), bot("b"), user("c"), bot("d"), user("e"), bot("f")], "all",
        [Turn("user", "a"), Turn("assistant", "b", True), Turn("user", "c"),
         Turn("assistant", "d", True), Turn("user", "e"), Turn("assistant", "f", True)]),
    "a system message": ([SYSTEM, user("a"), bot("b")], "all",
        [Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b", True)]),
    "a system message and two questions": ([SYSTEM, user("a"), bot("b"), user("c"), bot("d")],
        "all", [Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b", True),
                Turn("user", "c"), Turn("assistant", "d", True)]),
    "the last answer alone": ([user("a"), bot("b"), user("c"), bot("d")], "last",
        [Turn("user", "a"), Turn("assistant", "b"),
         Turn("user", "c"), Turn("assistant", "d", True)]),
    "an answer that is given": ([user("a"), bot("b", train=False), user("c"), bot("d")], "all",
        [Turn("user", "a"), Turn("assistant", "b"),
         Turn("user", "c"), Turn("assistant", "d", True)]),
    "a last answer that is given": ([user("a"), bot("b"), user("c"), bot("d", train=False)], "all",
        [Turn("user", "a"), Turn("assistant", "b", True),
         Turn("user", "c"), Turn("assistant", "d")]),
    "an open question at the end": ([user("a"), bot("b"), user("c")], "all",
        [Turn("user", "a"), Turn("assistant", "b", True)]),
    "white space and other alphabets": ([user(" é\n"), bot("\n日本 "), user("c"), bot("d")],
        "all", [Turn("user", " é\n"), Turn("assistant", "\n日本 ", True),
                Turn("user", "c"), Turn("assistant", "d", True)]),
    "words of the style": ([user("<|im_end|><|eot_id|>"), bot("### Response:\n<|endoftext|>")],
        "all", [Turn("user", "<|im_end|><|eot_id|>"),
                Turn("assistant", "### Response:\n<|endoftext|>", True)]),
}  # fmt: skip


class Expected(NamedTuple):
    """A row: its ids with the end-of-text token, and for each whether it is a target."""

    ids: list[int]
    learned: list[bool]


def join(*parts: tuple[int | str, bool]) -> Expected:
    ids: list[int] = []
    learned: list[bool] = []
    for part, is_learned in parts:
        these = [part] if isinstance(part, int) else list(part.encode())
        ids += these
        learned += [is_learned] * len(these)
    return Expected(ids, learned)


def chatml(turns: list[Turn], header: tuple[int | str, ...] = ()) -> list[Expected]:
    parts: list[tuple[int | str, bool]] = []
    for turn in turns:
        text = turn.text + (f"\n{turn.input}" if turn.input else "")
        if turn.role == "assistant":
            parts += [
                (IM_START, False),
                ("assistant\n", False),
                *((part, False) for part in header),
            ]
            parts += [(text, turn.learned), (IM_END, turn.learned), ("\n", False)]
        else:
            parts += [(IM_START, False), (f"{turn.role}\n{text}", False), (IM_END, False)]
            parts += [("\n", False)]
    return [join(*parts[:-1])]  # the last turn's end is the row's


def qwen3(turns: list[Turn]) -> list[Expected]:
    return chatml(turns, (THINK, "\n\n", THINK_END, "\n\n"))


def llama3(turns: list[Turn]) -> list[Expected]:
    parts: list[tuple[int | str, bool]] = [(BEGIN, False)]
    for turn in turns:
        text = turn.text + (f"\n\n{turn.input}" if turn.input else "")
        parts += [(HEAD, False), (turn.role, False), (HEAD_END, False), ("\n\n", False)]
        parts += [(text, turn.learned), (EOT, turn.learned)]
    return [join(*parts)]


def one_row_an_answer(turns: list[Turn], opening: str, given: str, header: str) -> list[Expected]:
    rows, before, system = [], "", ""
    for turn in turns:
        if turn.role == "system":
            system = f"{turn.text}\n\n"
        elif turn.role == "user":
            asked = given.format(turn.input) if turn.input else ""
            before, system = f"{before}{opening}{system}{turn.text}{asked}{header}", ""
        else:
            if turn.learned:
                rows.append(join((before, False), (turn.text, True), (END, True)))
            before += f"{turn.text}\n\n"
    return rows


def alpaca(turns: list[Turn]) -> list[Expected]:
    opening = f"{PREAMBLE}\n\n### Instruction:\n"
    return one_row_an_answer(turns, opening, "\n\n### Input:\n{}", "\n\n### Response:\n")


def phi3(turns: list[Turn]) -> list[Expected]:
    return one_row_an_answer(turns, "<|user|>\n", " {}", "\n\n<|assistant|>\n")


STYLES = {
    "alpaca": (alpaca, {"eos": "<|endoftext|>"}),
    "phi3": (phi3, {"eos": "<|endoftext|>"}),
    "chatml": (chatml, {"eos": "<|im_end|>"}),
    "qwen3": (qwen3, {"eos": "<|im_end|>"}),
    "llama3": (llama3, {"eos": "<|eot_id|>", "bos": "<|begin_of_text|>"}),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", TALKS)
def test_ids_and_masks(name: str, style: str, tmp_path: Path) -> None:
    messages, train_on, turns = TALKS[name]
    expect, tokens = STYLES[style]
    write_tokenizer(tmp_path, **tokens)
    tokenizer = read_tokenizer(tmp_path)
    rows = tokenize_conversation(
        Conversation(messages), get_style(style), tokenizer, Masking(True, train_on)
    )
    found = []
    for row in rows:
        batch = collate([row], eos_token_id=tokenizer.eos_token_id, mask_prompt=True)
        targets = batch["targets"][0].tolist()
        ids = [*row.ids, tokenizer.eos_token_id]
        assert all(target in (-100, token) for target, token in zip(targets, ids[1:], strict=True))
        found.append(Expected(ids, [False, *(target != -100 for target in targets)]))
    assert found == expect(turns)
