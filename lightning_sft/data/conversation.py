"""The one shape behind all data: a `Conversation` of `Message`s, and `Entry`, one of two turns.

Whatever a file holds becomes one of the two. An instruction entry, the chapter's own, is a
conversation of one user's and one assistant's turn; it keeps its three fields because a prompt
style may set the input apart from the instruction.

    >>> Conversation([Message("user", "What is 1 + 1?"), Message("assistant", "2")])
    >>> Entry("Spell it right.", "freind", "friend").conversation.messages[0].input
    'freind'

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_sft.common.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
# Which roles may follow which; nothing stands before the first message. A model answers once what
# it was asked once, so that it is always clear where an answer begins and what it answers.
_FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True, slots=True)
class Message:
    """What one of the roles says.

    Args:
        role: system, user, assistant or tool (what a program answered to the assistant, as text).
        content: Text; it may be empty only where an assistant is still to answer.
        train: Whether it carries loss, whatever `data.train_on` says of its role; None: as that
            says.
        weight: What each of its tokens counts in the loss, at least 0; 0 is no loss at all.
        input: Of a user: what to do it with, set apart by styles that have a place for it.
    """

    role: str
    content: str
    train: bool | None = None
    weight: float = 1.0
    input: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: perhaps a system's, then user, assistant and tool in turn.

    `instruction`, `input` and `output` show it as the entry that it amounts to, for whoever prints,
    compares or judges: what was said before the last answer, as one text, and that answer.

    Args:
        messages: A sequence of messages, or of mappings of their fields.

    Raises:
        InputError: Names the message, what is wrong with it and what is allowed.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        messages = tuple(
            message if isinstance(message, Message) else _as_message(message, place)
            for place, message in enumerate(_as_sequence(self.messages))
        )
        object.__setattr__(self, "messages", messages)
        if not messages:
            raise InputError("messages: is empty; it must hold at least one message")
        before = ""
        for place, message in enumerate(messages):
            _check(message, place)
            if message.role not in _FOLLOWERS[before]:
                raise InputError(_explain_order(message.role, before, place))
            before = message.role

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's messages."""
        return [n for n, message in enumerate(self.messages) if message.role == "assistant"]

    @property
    def question(self) -> Conversation:
        """What stands before the last answer; all of it where the last message is not answered."""
        is_answered = self.messages[-1].role == "assistant"
        return Conversation(self.messages[:-1]) if is_answered else self

    @property
    def instruction(self) -> str:
        """The question as one text; who says what, where it is more than one message."""
        asked = self.question.messages
        if len(asked) == 1:
            return asked[0].content
        return "\n\n".join(f"{message.role}: {message.content}" for message in asked)

    @property
    def input(self) -> str:
        """Of a single question: what to do it with."""
        asked = self.question.messages
        return asked[0].input if len(asked) == 1 else ""

    @property
    def output(self) -> str:
        """The last answer; empty where it is still to be given."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One instruction-response pair. `input` may be empty; the other two say something."""

    instruction: str
    input: str
    output: str

    @property
    def conversation(self) -> Conversation:
        """The same as two turns; as one where there is no answer."""
        asked = Message("user", self.instruction, input=self.input)
        answer = (Message("assistant", self.output),) if self.output else ()
        return Conversation((asked, *answer))


# One element of a data set.
Example: TypeAlias = Entry | Conversation


def as_conversation(example: Example) -> Conversation:
    """The general shape."""
    return example.conversation if isinstance(example, Entry) else example


def as_entry(example: Example) -> Entry:
    """The chapter's shape, for what is written, judged or shown: a long question becomes one text.

    An entry stays what it is.
    """
    if isinstance(example, Entry):
        return example
    return Entry(example.instruction, example.input, example.output)


def simplest(conversation: Conversation) -> Example:
    """An entry where one says the same: one question, one answer, nothing about their loss."""
    messages = conversation.messages
    is_plain = all(message.train is None and message.weight == 1.0 for message in messages)
    if is_plain and [message.role for message in messages] in (["user"], ["user", "assistant"]):
        return as_entry(conversation)
    return conversation


def _as_sequence(messages: Any) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"messages: is {messages!r:.40}; it must be a list of messages")
    return messages


def _as_message(message: Any, place: int) -> Message:
    fields = Message.__dataclass_fields__
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) <= set(fields):
        raise InputError(
            f"messages[{place}]: must be a message or a mapping of {', '.join(fields)}; role and "
            "content are needed"
        )
    return Message(**message)


def _check(message: Message, place: int) -> None:
    where = f"messages[{place}]"
    if message.role not in ROLES:
        allowed = ", ".join(ROLES)
        raise InputError(f"{where}.role: unknown role {message.role!r:.40}; allowed: {allowed}")
    if not isinstance(message.content, str) or not isinstance(message.input, str):
        raise InputError(f"{where}.content: must be text")
    if not message.content.strip():
        raise InputError(f"{where}.content: is blank; it must hold text")
    if message.input and message.role != "user":
        raise InputError(f"{where}.input: only a user's message has one")
    if not isinstance(message.train, bool | None):
        raise InputError(f"{where}.train: {message.train!r:.40} is not allowed; true or false")
    weight = message.weight
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < math.inf:
        raise InputError(f"{where}.weight: {weight!r:.40} is not allowed; a number of at least 0")


def _explain_order(role: str, before: str, place: int) -> str:
    allowed = " or ".join(_FOLLOWERS[before])
    where = f"messages[{place}].role"
    if not before:
        return f"{where}: {role!r} cannot come first; allowed: {allowed}"
    if role == before:
        return f"{where}: two {role} turns running; join them, or put {allowed} between"
    return f"{where}: {role!r} cannot follow {before!r}; allowed: {allowed}"
