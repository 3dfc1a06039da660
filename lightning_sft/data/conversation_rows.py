"""A conversation → rows of ids with loss spans, one for the whole or one for each answer.

Each segment is encoded apart and its place noted, so that masks are facts of construction.

    >>> [row] = tokenize_conversation(conversation, get_style("chatml"), tokenizer, masking)
    >>> row.spans
    [Span(start=31, end=38, weight=1.0), Span(start=52, end=60, weight=1.0)]

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_sft.data.conversation import Conversation, Entry, Example, as_conversation
from lightning_sft.data.encoding import encode_prompt, encode_segments, special_tokens
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.rows import Row, Span, TokenRows, tokenize
from lightning_sft.data.segments import Masking, Segment, render
from lightning_sft.data.tokenizer import Tokenizer


def tokenize_example(
    example: Example, style: PromptStyle, tokenizer: Tokenizer, masking: Masking, index: int = 0
) -> list[Row]:
    """The rows of an entry, which is always one, or of a conversation."""
    if isinstance(example, Entry) and not style.template:
        return [tokenize(example, style, tokenizer, index)]
    return tokenize_conversation(as_conversation(example), style, tokenizer, masking, index)


def tokenize_conversation(
    conversation: Conversation,
    style: PromptStyle,
    tokenizer: Tokenizer,
    masking: Masking,
    index: int = 0,
) -> list[Row]:
    """One row, or one for each answer that carries loss where the style does not mark their ends.

    Args:
        index: The conversation's place in its split.

    Raises:
        InputError: The conversation has no answer, or the style no place for a message.
    """
    rows = render(conversation, style, masking)
    return [_make_row(segments, style, tokenizer, index) for segments in rows]


def tokenize_questions(
    examples: Sequence[Example], style: PromptStyle, tokenizer: Tokenizer
) -> TokenRows:
    """What a model is given to answer each example: rows that are nothing but prompts."""
    # As arrays at once: 4 bytes a token, where a list takes 40.
    prompts = (np.array(encode_prompt(example, style, tokenizer), np.int32) for example in examples)
    rows = [Row(ids, len(ids), index) for index, ids in enumerate(prompts)]  # type: ignore[arg-type]
    return TokenRows.from_rows(rows)


def _make_row(
    segments: Sequence[Segment], style: PromptStyle, tokenizer: Tokenizer, index: int
) -> Row:
    ids: list[int] = []
    spans: list[Span] = []
    answer_begins = 0  # of the last answer, which is the last segment
    for segment, part in zip(segments, encode_segments(segments, tokenizer), strict=True):
        answer_begins = len(ids)
        ids += part
        if segment.supervised:
            weight = float(np.float32(segment.weight))  # as batches hold it
            _add(spans, Span(answer_begins, len(ids), weight))
    if special_tokens(tokenizer).get(style.end) == tokenizer.eos_token_id:
        del ids[-1]  # batching adds it: there is one behind each row
    elif segments[-1].supervised:
        spans[-1] = spans[-1]._replace(end=len(ids) + 1)  # that one is learned, too
    return Row(ids, answer_begins, index, spans)


def _add(spans: list[Span], span: Span) -> None:
    """Add a span, to the one before it where it only goes on."""
    if spans and spans[-1].end == span.start and spans[-1].weight == span.weight:
        span = spans.pop()._replace(end=span.end)
    spans.append(span)
