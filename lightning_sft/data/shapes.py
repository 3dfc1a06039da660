"""One record → one `Entry` or `Conversation`, checked field by field.

Whatever is wrong is said in one line that names the file, the record, the field and what is
allowed; nothing is skipped or mended silently.

    >>> shape(record, "sharegpt", names, "talks.jsonl: entry 3")

This module does not import torch.
"""

from __future__ import annotations

import json
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import (
    Conversation,
    Entry,
    Example,
    Message,
    as_conversation,
    simplest,
)
from lightning_sft.data.records import type_name

# What others call the four roles.
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


def shape(
    record: Any,
    format: str,
    names: dict[str, str],
    where: str,
    may_lack_answer: bool,
    may_be_blank: bool = False,
) -> Example:
    """The example in a record.

    Args:
        format: One of `FIELDS` but preference, whose records are pairs.
        names: The file's names of its fields.
        where: File and record, for messages.
        may_lack_answer: Whether the field of the answer may be missing altogether.
        may_be_blank: Whether an assistant may have said nothing last; the conversation then ends
            before that.

    Raises:
        InputError: Names record, field and what is allowed.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: is a {type_name(record)}; it must be an object")
    if format == "instruction":
        return _entry(record, names, where, may_lack_answer)
    if format == "prompt_completion":
        return _completion(record, names, where, may_lack_answer)
    key, role, content = (names[field] for field in _MESSAGE_FIELDS[format])
    messages = read_messages(record, key, role, content, where)
    if may_be_blank and messages and messages[-1].role == "assistant":
        messages = messages if messages[-1].content.strip() else messages[:-1]
    return simplest(make_conversation(messages, key, role, content, where))


_MESSAGE_FIELDS = {
    "messages": ("messages", "role", "content"),
    "sharegpt": ("conversations", "from", "value"),
}


def is_answered(example: Example) -> bool:
    """Whether there is an answer to learn from."""
    if isinstance(example, Conversation):
        return bool(example.answers)
    return bool(example.output.strip())


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text under a key.

    Raises:
        InputError: It is missing, no text, or holds half a character.
    """
    if key not in record:
        present = ", ".join(repr(name) for name in list(record)[:6]) or "no keys"
        raise InputError(
            f"{where}: {key!r} is missing (it has {present}); data.field_names maps other names"
        )
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is a {type_name(value)}; it must be text")
    try:
        # JSON can spell half a character, as in "\ud800"; no tokenizer or file can hold it.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {key!r} has a lone surrogate at character {error.start}, which no UTF-8 "
            "text can hold"
        ) from None
    return value


def read_messages(
    record: dict[str, Any], key: str, role: str, content: str, where: str
) -> list[Message]:
    """The list of messages under a key, each with its own `train` and `weight` where it has them.

    Args:
        role, content: What the messages call these two.

    Raises:
        InputError: It is no such list.
    """
    value = record[key] if key in record else text_of(record, key, where)
    if isinstance(value, str) and value.lstrip().startswith("["):  # as a cell of a table holds it
        try:
            value = json.loads(value)
        except (RecursionError, ValueError):
            raise InputError(f"{where}: {key!r} is text that is no valid JSON") from None
    if not isinstance(value, list):
        raise InputError(f"{where}: {key!r} is a {type_name(value)}; it must be a list of messages")
    return [
        _message(message, role, content, f"{where}: {key}[{place}]")
        for place, message in enumerate(value)
    ]


def make_conversation(
    messages: list[Message], key: str, role: str, content: str, where: str
) -> Conversation:
    """A conversation of a file's messages; what is wrong is said in the file's own names."""
    try:
        return Conversation(tuple(messages))
    except InputError as error:
        place, colon, reason = str(error).partition(": ")
        own = place.replace("messages", key, 1)
        own = own.replace(".role", f".{role}").replace(".content", f".{content}")
        raise InputError(f"{where}: {own}{colon}{reason}") from None


def _message(message: Any, role: str, content: str, where: str) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"{where}: is a {type_name(message)}; it must be an object")
    if message.get("tool_calls"):
        raise InputError(
            f"{where}.tool_calls: only text is supported; give what the assistant wrote as "
            f"{content}"
        )
    who = text_of(message, role, where)
    train, weight = message.get("train"), message.get("weight")
    given = message.get("input") if ROLE_NAMES.get(who, who) == "user" else None
    return Message(
        role=ROLE_NAMES.get(who, who),
        content=_content(message, content, where),
        train=train,
        weight=1.0 if weight is None else weight,
        input="" if given is None else text_of(message, "input", where),
    )


def _content(message: dict[str, Any], key: str, where: str) -> str:
    """A message's text, which may come in parts."""
    parts = message.get(key)
    if not isinstance(parts, list):
        return text_of(message, key, where)
    texts = []
    for place, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InputError(f"{where}.{key}[{place}]: only parts of type text are supported")
        texts.append(text_of(part, "text", f"{where}.{key}[{place}]"))
    return "".join(texts)


def _entry(
    record: dict[str, Any], names: dict[str, str], where: str, may_lack_answer: bool
) -> Entry:
    instruction = text_of(record, names["instruction"], where)
    if not instruction.strip():
        raise InputError(f"{where}: {names['instruction']!r} is blank; it must hold text")
    lacks_output = may_lack_answer and names["output"] not in record
    return Entry(
        instruction,
        input=text_of(record, names["input"], where) if names["input"] in record else "",
        output="" if lacks_output else text_of(record, names["output"], where),
    )


def _completion(
    record: dict[str, Any], names: dict[str, str], where: str, may_lack_answer: bool
) -> Example:
    """A prompt and its completion, texts or messages; loss is on the completion's messages."""
    prompt, completion = names["prompt"], names["completion"]
    if not isinstance(record.get(prompt), list):
        as_entry = {"instruction": prompt, "input": "", "output": completion}
        return _entry(record, as_entry, where, may_lack_answer)
    keys = names["role"], names["content"]
    asked = read_messages(record, prompt, *keys, where)
    if completion not in record and may_lack_answer:
        answers = []
    elif isinstance(record.get(completion), str):
        answers = [Message("assistant", text_of(record, completion, where))]
    else:
        answers = read_messages(record, completion, *keys, where)
    # Answers within the prompt are given, not learned.
    given = [
        Message(m.role, m.content, False, m.weight, m.input) if m.role == "assistant" else m
        for m in asked
    ]
    return simplest(make_conversation([*given, *answers], prompt, *keys, where))


def answered(question: Example, answer: str) -> Example:
    """A question with an answer behind it, whatever the shape of the question."""
    if isinstance(question, Entry):
        return Entry(question.instruction, question.input, answer)
    messages = as_conversation(question).question.messages
    return Conversation((*messages, Message("assistant", answer)))
