"""Pieces of a prompt → token ids: special tokens where a style names them, never where a user does.

    >>> encode_prompt(Entry("Say hello.", "", ""), get_style("chatml"), tokenizer)

What lies between two special tokens is encoded as one text, as transformers does. A tokenizer
without special tokens, such as GPT-2's here, reads everything as plain text. This module does not
import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation, Entry, Example, as_conversation
from lightning_sft.data.prompts import Break, PromptStyle, Template
from lightning_sft.data.segments import Segment, render_question
from lightning_sft.data.tokenizer import Tokenizer


def encode_pieces(pieces: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """Ids of pieces laid end to end; in a `Template` the names of special tokens stand for them."""
    special = special_tokens(tokenizer)
    # The longest first: a name may begin another.
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    ids: list[int] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, Break):
            ids, text = ids + tokenizer.encode(text), ""
            continue
        is_template = isinstance(piece, Template) and special
        parts = re.split(f"({names})", piece) if is_template else [piece]
        for place, part in enumerate(parts):
            if place % 2 == 0:
                text += part
                continue
            ids += [*tokenizer.encode(text), special[part]]
            text = ""
    return ids + tokenizer.encode(text)


def encode_question(pieces: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """`encode_pieces` of what a row begins with: the model's own first token comes before it."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return [*([] if begin is None else [begin]), *encode_pieces(pieces, tokenizer)]


def encode_segments(segments: Iterable[Segment], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each segment, encoded apart; the first is what a row begins with."""
    return [
        (encode_pieces if place else encode_question)(segment.pieces, tokenizer)
        for place, segment in enumerate(segments)
    ]


def encode_prompt(example: Example, style: PromptStyle, tokenizer: Tokenizer) -> list[int]:
    """What the model is given to answer an entry, or the last question of a conversation."""
    if isinstance(example, Conversation) or style.template:
        segments = render_question(as_conversation(example), style)
        return [token for ids in encode_segments(segments, tokenizer) for token in ids]
    return encode_question(style.pieces(example)[0], tokenizer)


def encode_response(entry: Entry, style: PromptStyle, tokenizer: Tokenizer) -> list[int]:
    """What the model is to answer, without the end-of-text token that batching adds.

    Where the style's own end is that very token, it stands there once.
    """
    ids = encode_pieces(style.pieces(entry)[1], tokenizer)
    ends_itself = special_tokens(tokenizer).get(style.end) == tokenizer.eos_token_id
    return ids[:-1] if ends_itself else ids


def check_style(style: PromptStyle, tokenizer: Tokenizer) -> None:
    """Refuse a style whose answers would end before they begin.

    Raises:
        InputError: The model is to write a header that holds its end-of-text token.
    """
    header = encode_pieces([Template(style.header)], tokenizer)
    if not style.header_in_prompt and tokenizer.eos_token_id in header:
        raise InputError(
            f"header_in_prompt: the header of {style.name} holds this model's end-of-text token, "
            "at which answers end; leave header_in_prompt true"
        )


def bos_token(tokenizer: Tokenizer) -> str | None:
    """The name of the token that every row begins with, where the model wants one."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return None if begin is None else tokenizer.decode([begin])


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of special tokens by their names; none of a tokenizer that has only text."""
    return getattr(tokenizer, "special_tokens", {})
