"""A client's messages → a conversation, and the prompt that the model is given.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.segments import flatten, render_question
from lightning_sft.serving.api_error import invalid


def read_conversation(body: Mapping[str, Any]) -> Conversation:
    """The messages of a chat request, the last of which, a user's, is to be answered.

    A system (or developer) message may come first; a blank one says nothing. A user's message may
    have an `input`, as the request itself may for the last one.

    Raises:
        ApiError: The messages are not in that order, or not text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list with at least one message")
    said = [_read_message(message, place) for place, message in enumerate(messages)]
    has_system = said[0].role == "system"
    before = "system" if has_system else ""
    for place, message in enumerate(said[has_system:], start=has_system):
        wanted = "assistant" if before == "user" else "user"
        if message.role != wanted:
            raise invalid(
                "messages",
                f"must be at most one system message, then user and assistant in turn; "
                f"messages[{place}] is the {message.role}'s, and must be the {wanted}'s",
            )
        before = message.role
    if before != "user":
        raise invalid("messages", "must end with the user's message that is to be answered")
    given = body.get("input", "")
    if not isinstance(given, str):
        raise invalid("input", "must be a string")
    if given:
        said[-1] = Message("user", said[-1].content, input=given)
    if has_system and not said[0].content.strip():
        del said[0]
    return Conversation(tuple(said))


def lay_out_prompt(conversation: Conversation, style: PromptStyle) -> tuple[str, ...]:
    """The prompt in pieces as of `PromptStyle.pieces`, laid out exactly as in training.

    A system message stands in the place that the style has for it, or else in front of the first
    instruction; earlier questions and answers stand before the last.

    Raises:
        ApiError: A model's own template refuses the messages.
    """
    try:
        return flatten(render_question(conversation, style))
    except InputError as error:
        raise invalid("messages", str(error)) from None


def _read_message(message: Any, place: int) -> Message:
    """One of the messages; a list of text parts is joined."""
    name = f"messages[{place}]"
    if not isinstance(message, dict):
        raise invalid(name, "must be an object with role and content")
    extra = {key for key, value in message.items() if value not in (None, [], {})}
    role, content, given = message.get("role"), message.get("content"), message.get("input") or ""
    extra -= {"role", "content"} | ({"input"} if role == "user" else set())
    if extra:
        raise invalid(f"{name}.{min(extra):.100}", "is not supported here")
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
    if role in ("user", "assistant") and not content.strip():
        raise invalid(f"{name}.content", "is empty")
    if not isinstance(given, str):
        raise invalid(f"{name}.input", "must be a string")
    return Message("system" if role == "developer" else role, content, input=given)
