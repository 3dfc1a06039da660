"""Which tokens carry loss by what Axolotl's and torchtune's documentation says, beside ours.

The two are not installed. Their rules are written down here, from their documentation and apart
from our code, over the parts of a conversation: for each message what the template puts before its
text, the text, and what it puts behind. Where we differ, the test says exactly by which parts.

Sources: Axolotl's config reference (`roles_to_train`, `train_on_eos`, `message_field_training`) and
its page on conversations; torchtune's `Message.masked`, `MaskingStrategy` and the printed mask of
its page on messages, in which a message's header and end go with the message.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lightning_sft import Conversation
from lightning_sft.data.batching import collate
from lightning_sft.data.conversation_rows import tokenize_conversation
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.data.prompts import PromptStyle, get_style
from lightning_sft.data.segments import Masking
from lightning_sft.data.tokenizer import Tokenizer
from support.talks import make_talk
from support.tiny_run import write_tokenizer

IM_START, IM_END = 257, 258
Talk = list[dict[str, Any]]
# torchtune's own example is Mistral's: there the answer's header closes the user's message.
MISTRAL = PromptStyle("[INST] {instruction}", "\n{input}", " [/INST] ", "<|im_end|>")


class Token(NamedTuple):
    """An id of a conversation, and where it comes from.

    number: Of the message.
    part: header, content, end, or gap: what stands between this message and the next.
    """

    id: int
    number: int
    part: str


Rule = Callable[[Token], bool]


def chatml(talk: Talk) -> list[Token]:
    tokens = []
    for number, message in enumerate(talk):
        parts: list[tuple[str, list[int]]] = [
            ("header", [IM_START, *f"{message['role']}\n".encode()]),
            ("content", [*message["content"].encode()]),
            ("end", [IM_END]),
            ("gap", [*b"\n"]),
        ]
        tokens += [Token(token, number, part) for part, ids in parts for token in ids]
    return tokens[:-1]  # nothing learns the line break behind the last turn


def mistral(talk: Talk) -> list[Token]:
    tokens = []
    for number, message in enumerate(talk):
        text, is_answer = message["content"], message["role"] == "assistant"
        parts: list[tuple[str, list[int]]] = [
            ("header", [] if is_answer else [*b"[INST] "]),
            ("content", [*text.encode()]),
            ("end", [IM_END] if is_answer else [*b" [/INST] "]),
            ("gap", [*b"\n"] if is_answer else []),
        ]
        tokens += [Token(token, number, part) for part, ids in parts for token in ids]
    return tokens[:-1]


def axolotl(talk: Talk, roles_to_train: Sequence[str], train_on_eos: str, key: str = "") -> Rule:
    """Axolotl's rule.

    Args:
        roles_to_train: The tokens from these roles are considered for the loss.
        train_on_eos: Which end-of-text tokens are: all, those at the end of each trainable turn
            (turn), or the last one of the conversation.
        key: `message_field_training`: a message's own word on whether it is considered.
    """

    def is_trainable(number: int) -> bool:
        own = talk[number].get(key)
        return talk[number]["role"] in roles_to_train if own is None else own

    def is_learned(token: Token) -> bool:
        if token.part == "end":
            is_last = token.number == len(talk) - 1
            return {"turn": is_trainable(token.number), "all": True, "last": is_last}[train_on_eos]
        return token.part == "content" and is_trainable(token.number)

    return is_learned


def torchtune(talk: Talk, masking_strategy: str) -> Rule:
    """torchtune's rule: a message is masked as a whole, with its header and what closes it.

    Args:
        masking_strategy: train_on_all leaves user's and assistant's messages unmasked,
            train_on_assistant the assistant's, train_on_last the last of these.
    """

    def is_learned(token: Token) -> bool:
        message = talk[token.number]
        role, is_last = message["role"], token.number == len(talk) - 1
        unmasked = {
            "train_on_all": role in ("user", "assistant"),
            "train_on_assistant": role == "assistant",
            "train_on_last": is_last,
        }[masking_strategy]
        return message.get("masked") is not True and unmasked

    return is_learned


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return read_tokenizer(tmp_path)


def talks(system: bool = True) -> list[Talk]:
    generator = random.Random(0)
    made = [make_talk(generator) for _ in range(200)]
    return made if system else [[m for m in talk if m["role"] != "system"] for talk in made]


def with_flags(talk: Talk, generator: random.Random, key: str, *values: bool | None) -> Talk:
    """Some of the answers with a word of their own."""
    return [
        message | ({key: generator.choice(values)} if message["role"] == "assistant" else {})
        for message in talk
    ]


def ours(
    talk: Talk, tokens: list[Token], tokenizer: Tokenizer, masking: Masking, style: Any = "chatml"
) -> list[bool]:
    """Whether each token carries loss with us; they are the tokens of our row."""
    talk = [{key: m[key] for key in ("role", "content", "train") if key in m} for m in talk]
    rows = tokenize_conversation(Conversation(talk), get_style(style), tokenizer, masking)
    [row] = rows
    assert [*row.ids, tokenizer.eos_token_id] == [token.id for token in tokens]
    targets = collate([row], eos_token_id=tokenizer.eos_token_id, mask_prompt=True)["targets"]
    return [False, *(target != -100 for target in targets[0].tolist())]


def differences(
    talk: Talk, tokens: list[Token], mine: list[bool], theirs: Rule
) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Role and part of the tokens that only one of the two learns: only ours, only theirs."""
    # Nothing stands before the first token that could predict it.
    both = [(token, a, theirs(token)) for token, a in zip(tokens, mine, strict=True)][1:]
    named = [((talk[token.number]["role"], token.part), a, b) for token, a, b in both]
    return {name for name, a, b in named if a and not b}, {name for name, a, b in named if b > a}


def compare(
    made: list[Talk],
    tokenizer: Tokenizer,
    masking: Masking,
    rule: Callable[[Talk], Rule],
    lay_out: Callable[[Talk], list[Token]] = chatml,
    style: Any = "chatml",
) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """`differences` over many conversations."""
    only_ours: set[tuple[str, str]] = set()
    only_theirs: set[tuple[str, str]] = set()
    for talk in made:
        tokens = lay_out(talk)
        mine = ours(talk, tokens, tokenizer, masking, style)
        a, b = differences(talk, tokens, mine, rule(talk))
        only_ours, only_theirs = only_ours | a, only_theirs | b
    return only_ours, only_theirs


def test_axolotls_answers(tokenizer: Tokenizer) -> None:
    answers, roles = Masking(mask_prompt=True), ["assistant"]
    assert compare(talks(), tokenizer, answers, lambda t: axolotl(t, roles, "turn")) == (
        set(),
        set(),
    )
    # Its other two learn other ends: those of turns that are not learned, or the last one alone.
    others = {("system", "end"), ("user", "end")}
    found = compare(talks(), tokenizer, answers, lambda t: axolotl(t, roles, "all"))
    assert found == (set(), others)
    found = compare(talks(), tokenizer, answers, lambda t: axolotl(t, roles, "last"))
    assert found == ({("assistant", "end")}, set())


def test_axolotls_last_message(tokenizer: Tokenizer) -> None:
    """Its page: no roles to train is training on the last message alone; here, marked as such."""
    made = [[*talk[:-1], talk[-1] | {"training": True}] for talk in talks()]
    found = compare(
        made, tokenizer, Masking(True, "last"), lambda t: axolotl(t, [], "turn", "training")
    )
    assert found == (set(), set())


def test_axolotls_word_of_a_message(tokenizer: Tokenizer) -> None:
    generator = random.Random(1)
    made = [with_flags(talk, generator, "train", True, False, None) for talk in talks()]
    found = compare(
        made, tokenizer, Masking(True), lambda t: axolotl(t, ["assistant"], "turn", "train")
    )
    assert found == (set(), set())
    # Its default is not to look: then the flags make a difference, so they were heard.
    found = compare(made, tokenizer, Masking(True), lambda t: axolotl(t, ["assistant"], "turn"))
    assert found == (set(), {("assistant", "content"), ("assistant", "end")})


def test_axolotls_users(tokenizer: Tokenizer) -> None:
    """What opens a user's message is learned with it here, what closes it is the next header's."""
    roles = ["user", "assistant"]
    found = compare(talks(), tokenizer, Masking(True, roles), lambda t: axolotl(t, roles, "turn"))
    assert found == ({("user", "header")}, {("user", "end")})


@pytest.mark.parametrize(
    ("strategy", "train_on"), [("train_on_assistant", "all"), ("train_on_last", "last")]
)
def test_torchtunes_answers(strategy: str, train_on: str, tokenizer: Tokenizer) -> None:
    def rule(talk: Talk) -> Rule:
        return torchtune(talk, strategy)

    masking = Masking(True, train_on)
    # ChatML's header belongs to the assistant's message there, and to the prompt here.
    gap = {("assistant", "gap")} if train_on == "all" else set()
    found = compare(talks(), tokenizer, masking, rule)
    assert found == (set(), {("assistant", "header")} | gap)
    # Where the header closes the user's message, as in its own example, nothing but the line break
    # between two turns is left, which it does not have there.
    found = compare(talks(system=False), tokenizer, masking, rule, mistral, MISTRAL)
    assert found == (set(), gap)


def test_torchtunes_masked_messages(tokenizer: Tokenizer) -> None:
    generator = random.Random(2)
    made = [with_flags(talk, generator, "masked", True, False) for talk in talks(system=False)]
    made = [[m | ({"train": False} if m.get("masked") else {}) for m in talk] for talk in made]

    def rule(talk: Talk) -> Rule:
        return torchtune(talk, "train_on_assistant")

    found = compare(made, tokenizer, Masking(True), rule, mistral, MISTRAL)
    assert found == (set(), {("assistant", "gap")})


def test_torchtunes_train_on_input(tokenizer: Tokenizer) -> None:
    """`train_on_input: true` is `train_on_all`: users are unmasked, too, and no system message."""

    def rule(talk: Talk) -> Rule:
        return torchtune(talk, "train_on_all")

    found = compare(talks(), tokenizer, Masking(True, ["user", "assistant"]), rule)
    around = {("user", "end"), ("user", "gap"), ("assistant", "header"), ("assistant", "gap")}
    assert found == (set(), around)
