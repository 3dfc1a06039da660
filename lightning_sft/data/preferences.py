"""Records of preferences → pairs: a question, the answer that was chosen and the one rejected.

Three kinds of records are known: `prompt`, `chosen` and `rejected` as texts or lists of messages;
two whole conversations that differ in their last answer; and the book's, `instruction`, `input` and
`output` with `chosen` and `rejected` (ch07/04 of its repository).

    >>> read_pairs("instruction-data-with-preference.json")[0].chosen

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Entry, Example, Message, simplest
from lightning_sft.data.formats import recognise, settle_names
from lightning_sft.data.records import local_path, read_records, type_name
from lightning_sft.data.shapes import answered, make_conversation, read_messages, text_of


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one question, the better one first.

    Args:
        question: An entry without output, or a conversation that ends with what is asked.
        chosen, rejected: The answers. They may be equal, which teaches nothing.
    """

    question: Example
    chosen: str
    rejected: str

    @property
    def examples(self) -> tuple[Example, Example]:
        """The question with either answer: the chosen one, then the rejected."""
        return answered(self.question, self.chosen), answered(self.question, self.rejected)


def read_pairs(
    path: str | Path, *, field_names: Mapping[str, str] | None = None, is_told: bool = False
) -> list[Pair]:
    """Read preference data from any file that `data.path` takes.

    Args:
        field_names: Where the file calls a field otherwise, the file's name for it.
        is_told: The file is said to hold preferences; else its first record must look like one.

    Raises:
        InputError: The file or a record is wrong, or holds no preferences; names it.
        ServiceError: A URL could not be fetched.
    """
    source = local_path(path)
    records = read_records(source)
    format = "preference" if is_told else recognise(records, field_names)
    if format != "preference":
        raise InputError(
            f"{source}: has records in the format {format}; preferences need chosen and rejected"
        )
    names = settle_names(format, records, field_names)
    return [
        read_pair(record, names, f"{source}: entry {index}") for index, record in enumerate(records)
    ]


def read_pair(record: Any, names: dict[str, str], where: str) -> Pair:
    """The pair in a record.

    Raises:
        InputError: Names record, field and what is allowed.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: is a {type_name(record)}; it must be an object")
    chosen_before, chosen = _answer(record, names["chosen"], names, where)
    rejected_before, rejected = _answer(record, names["rejected"], names, where)
    if chosen_before != rejected_before:
        raise InputError(
            f"{where}: {names['chosen']!r} and {names['rejected']!r} answer different "
            "conversations; they may differ in their last message alone"
        )
    if chosen_before:
        messages = chosen_before
    elif names["instruction"] in record:
        return Pair(_entry(record, names, where), chosen, rejected)
    elif isinstance(record.get(names["prompt"]), list):
        messages = read_messages(record, names["prompt"], names["role"], names["content"], where)
    else:
        prompt = text_of(record, names["prompt"], where)
        messages = [Message("user", prompt)]
    keys = names["prompt"], names["role"], names["content"]
    question = make_conversation(messages, *keys, where)
    if question.messages[-1].role not in ("user", "tool"):
        raise InputError(f"{where}: {names['prompt']!r} must end with what is to be answered")
    return Pair(simplest(question), chosen, rejected)


def _answer(
    record: dict[str, Any], key: str, names: dict[str, str], where: str
) -> tuple[list[Message], str]:
    """The messages before an answer, where the field holds a conversation, and the answer."""
    before: list[Message] = []
    if isinstance(record.get(key), list):
        messages = read_messages(record, key, names["role"], names["content"], where)
        if not messages or messages[-1].role != "assistant":
            raise InputError(f"{where}: {key!r} must end with an assistant's message")
        *before, last = messages
        answer = last.content
    else:
        answer = text_of(record, key, where)
    if not answer.strip():
        raise InputError(f"{where}: {key!r} is blank; it must hold an answer")
    return before, answer


def _entry(record: dict[str, Any], names: dict[str, str], where: str) -> Entry:
    instruction = text_of(record, names["instruction"], where)
    if not instruction.strip():
        raise InputError(f"{where}: {names['instruction']!r} is blank; it must hold text")
    key = names["input"]
    return Entry(instruction, text_of(record, key, where) if key in record else "", "")
