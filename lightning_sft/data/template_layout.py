"""A conversation in a model's own chat template → rows of questions and answers.

The rule by which places are certain: the template's text of the messages up to an answer, and that
of the question before it with the answer's header, must each be a prefix of the row's whole text.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.prompts import Template
from lightning_sft.data.template import render_prefixes


def cut(pieces: Sequence[str], begin: int, end: int) -> tuple[str, ...]:
    """The pieces of the characters from `begin` up to `end`."""
    found: list[str] = []
    here = 0
    for piece in pieces:
        text = piece[max(begin - here, 0) : max(end - here, 0)]
        if text:
            found.append(Template(text) if isinstance(piece, Template) else str(text))
        here += len(piece)
    return tuple(found)


def lay_out_template(
    conversation: Conversation, source: str, end: str
) -> list[list[tuple[tuple[str, ...], Message | None]]]:
    """The rows of a conversation, each in questions (no message) and answers, in turn.

    Args:
        conversation: Its last message is an answer.
        end: What closes an answer; white space behind it belongs to the next question.

    Returns:
        One row where every question and answer is a prefix of the whole, and answers are closed.
        Else one for each answer, which stands last in it.

    Raises:
        InputError: Not even the question before an answer is a prefix of what both render to.
    """
    found = _render_answers(conversation, source, [])
    whole = found.upto[-1].text
    nests = all(whole.startswith(part.text) for part in (*found.questions, *found.upto))
    rows = []
    for last in range(len(found.upto)):
        if nests and end and last < len(found.upto) - 1:
            continue
        if not found.upto[last].text.startswith(found.questions[last].text):
            place = conversation.answers[last]
            raise InputError(
                f"chat template: what stands before messages[{place}] is laid out otherwise once "
                "it is answered, so that no mask would be right"
            )
        row = found.upto[last]
        closed = _Rendered(cut(row.pieces, 0, len(_closed(row.text, end))))
        rows.append(_part(closed, found, last + 1, end))
    return rows


def lay_out_question(
    conversation: Conversation, source: str, end: str
) -> list[tuple[tuple[str, ...], Message | None]]:
    """What a model is given to answer the last message, in parts as `lay_out_template` has them."""
    asked = conversation.question
    found = _render_answers(asked, source, [(len(asked.messages), True)])
    return _part(found.others[0], found, len(found.upto), end)


class _Rendered(NamedTuple):
    """A text in pieces."""

    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class _Answers(NamedTuple):
    """What a template makes of a conversation up to each of its answers.

    answers: The messages.
    questions: What stands before each, the header of the answer included.
    upto: The text that ends with each.
    others: Further texts that were asked for.
    """

    answers: list[Message]
    questions: list[_Rendered]
    upto: list[_Rendered]
    others: list[_Rendered]


def _render_answers(
    conversation: Conversation, source: str, others: list[tuple[int, bool]]
) -> _Answers:
    places = conversation.answers
    renders = [(k, True) for k in places] + [(k + 1, False) for k in places] + others
    found = [_Rendered(tuple(part)) for part in render_prefixes(conversation, source, renders)]
    count = len(places)
    answers = [conversation.messages[k] for k in places]
    return _Answers(answers, found[:count], found[count : 2 * count], found[2 * count :])


def _part(
    row: _Rendered, found: _Answers, count: int, end: str
) -> list[tuple[tuple[str, ...], Message | None]]:
    """A row cut at each of the first `count` answers whose place in it is certain."""
    text, begin = row.text, 0
    parts: list[tuple[tuple[str, ...], Message | None]] = []
    begun = list(zip(found.answers, found.questions, found.upto, strict=True))[:count]
    for message, question, upto in begun:
        opens, closed = len(question.text), _closed(upto.text, end)
        if text.startswith(question.text) and text.startswith(closed):
            parts.append((cut(row.pieces, begin, opens), None))
            parts.append((cut(row.pieces, opens, len(closed)), message))
            begin = len(closed)
    if begin < len(text):
        parts.append((cut(row.pieces, begin, len(text)), None))
    return parts


def _closed(text: str, end: str) -> str:
    """A text that ends with an answer, without the white space behind what closes it."""
    return text.rstrip() if end else text
