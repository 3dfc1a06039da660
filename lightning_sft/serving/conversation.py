"""A client's conversation → the prompt that the model is given.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.segments import ask, flatten, render_question
from lightning_sft.serving.api_error import invalid


def render(body: Mapping[str, Any], style: PromptStyle) -> tuple[str, ...]:
    """A conversation as the prompt that the model is given, in pieces as of `PromptStyle.pieces`.

    The last message, a user's, is the instruction, and the field `input` its input. All is laid
    out exactly as conversations are in training: a system (or developer) message in the place that
    the style has for it, or else in front of the first instruction, an empty line between; earlier
    questions and answers before, with an empty line behind each (a line break for a style with a
    closing mark, as ChatML).

    Raises:
        ApiError: The messages are not in that order, or not text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list with at least one message")
    turns = [_read_message(message, place) for place, message in enumerate(messages)]
    system = ""
    if turns[0][0] in ("system", "developer"):
        system = turns.pop(0)[1]
    expected = ["assistant" if place % 2 else "user" for place in range(len(turns))]
    if [role for role, _ in turns] != expected or len(turns) % 2 == 0:
        raise invalid(
            "messages",
            "must be at most one system message, then user and assistant in turn, a user's last",
        )
    given = body.get("input", "")
    if not isinstance(given, str):
        raise invalid("input", "must be a string")
    said = [Message("system", system)] if system else []
    said += [Message(role, text) for role, text in turns[:-1]]
    said.append(Message("user", turns[-1][1], input=given))
    if not style.template:
        return flatten(ask(said, style))
    try:  # a model's own template may refuse messages
        return flatten(render_question(Conversation(tuple(said)), style))
    except InputError as error:
        raise invalid("messages", str(error)) from None


def _read_message(message: Any, place: int) -> tuple[str, str]:
    """Role and text; a list of text parts is joined."""
    name = f"messages[{place}]"
    if not isinstance(message, dict):
        raise invalid(name, "must be an object with role and content")
    extra = {key for key, value in message.items() if value not in (None, [], {})}
    if extra - {"role", "content"}:
        raise invalid(f"{name}.{min(extra - {'role', 'content'}):.100}", "is not supported here")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise invalid(f"{name}.role", "must be system, developer, user or assistant")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        ):
            raise invalid(f"{name}.content", "may hold parts of type text only")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise invalid(f"{name}.content", "must be a string or a list of text parts")
    if role == "user" and not content.strip():
        raise invalid(f"{name}.content", "is empty")
    return role, content
