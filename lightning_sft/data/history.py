"""A conversation that may have become too long → what of it the model is given.

Whole turns are left out, the oldest first: a question with everything up to the next one. What a
system message says holds for all of them, so it stays, and so does the last question.

    >>> fitted = fit_history(conversation, style, tokenizer, most=768)
    >>> fitted.cut  # turns that were left out

This module does not import torch.
"""

from __future__ import annotations

import bisect
import functools
from typing import NamedTuple

from lightning_sft.data.conversation import Conversation
from lightning_sft.data.encoding import encode_segments
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.segments import render_question
from lightning_sft.data.tokenizer import Tokenizer

LONGEST_TOKEN = 128  # characters; GPT-2's longest is as many spaces


class FittedHistory(NamedTuple):
    """What is left of a conversation, its ids, and how many turns are not."""

    conversation: Conversation
    ids: list[int]
    cut: int


def room_for_prompt(context_length: int, max_new_tokens: int) -> int:
    """Most tokens of a conversation, so that its answer has room.

    That is all it may write, but no more than a quarter of the context: else a limit as large as
    the context would leave no history at all.
    """
    return context_length - min(max_new_tokens, max(context_length // 4, 1))


def fit_history(
    conversation: Conversation, style: PromptStyle, tokenizer: Tokenizer, most: int
) -> FittedHistory:
    """Leave out as few of the oldest turns as possible.

    Args:
        conversation: Its last message is to be answered.
        most: Tokens. The last question alone is not cut, and may be longer.

    Raises:
        InputError: The style has no place for a message.
    """
    messages = conversation.messages
    head = 1 if messages[0].role == "system" else 0
    asked = [place for place, message in enumerate(messages) if message.role == "user"]

    def leave_out(cut: int) -> Conversation:
        return Conversation(messages[:head] + messages[asked[cut] :]) if cut else conversation

    @functools.cache
    def encode(cut: int) -> list[int]:
        segments = render_question(leave_out(cut), style)
        return [token for ids in encode_segments(segments, tokenizer) for token in ids]

    def fits(cut: int) -> bool:
        length = sum(len(message.content) for message in leave_out(cut).messages)
        return length <= most * LONGEST_TOKEN and len(encode(cut)) <= most

    # The fewer turns, the shorter: few of many numbers have to be tried.
    last, cut = len(asked) - 1, 0
    if last and not fits(0):
        cut = bisect.bisect_left(range(last), True, lo=1, key=fits)
    return FittedHistory(leave_out(cut), encode(cut), cut)
