"""A conversation in a prompt style → segments of text, each of which carries loss or does not.

This is where it is decided what a model learns: `Masking` says which messages, `render` lays them
out. Each segment is encoded apart from its neighbours, so that where loss begins and ends is known
by construction and never searched for in text.

    >>> rows = render(conversation, get_style("chatml"), Masking(mask_prompt=True))
    >>> [segment for segment in rows[0] if segment.supervised]

A turn's end is learned with it: whatever closes an answer in the style (`<|im_end|>`) belongs to
the answer's segment. A style that closes answers with nothing but the end-of-text token, as alpaca,
has no such mark in the middle of a row; there a conversation becomes one row for each of its
answers, every one of which ends with that token. Earlier turns stand before it exactly as chat,
serving and exported templates lay them out, and a batch's prefix tree computes them once.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import ROLES, Conversation, Message
from lightning_sft.data.prompts import Break, PromptStyle, Template
from lightning_sft.data.template_layout import lay_out_question, lay_out_template


class Segment(NamedTuple):
    """Text that is encoded as one.

    pieces: The text; a `Template` among them is the style's own, in which the names of special
        tokens stand for these tokens.
    supervised: Whether its tokens carry loss.
    weight: What each of them counts then.
    """

    pieces: tuple[str, ...]
    supervised: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Masking:
    """Which messages carry loss. A message's own `train` and `weight` go before this.

    Args:
        mask_prompt: Loss on chosen messages alone; else on everything, as in the chapter.
        train_on: `all` answers of the assistant, its `last` one, or the messages of these roles,
            with the style's words around them.

    Raises:
        InputError: `train_on` is something else, or would be without effect.
    """

    mask_prompt: bool = False
    train_on: str | Sequence[str] = "all"

    def __post_init__(self) -> None:
        if isinstance(self.train_on, str):
            is_known = self.train_on in ("all", "last")
        else:
            object.__setattr__(self, "train_on", tuple(self.train_on))
            is_known = bool(self.train_on) and set(self.train_on) <= set(ROLES)
        if not is_known:
            raise InputError(
                f"data.train_on: {self.train_on!r} is not allowed; all, last, or a list of roles: "
                f"{', '.join(ROLES)}"
            )
        if self.train_on != "all" and not self.mask_prompt:
            raise InputError(
                "data.train_on: says what carries loss where the rest does not; set "
                "data.mask_prompt to true as well"
            )

    def trains(self, message: Message, is_last: bool) -> bool:
        """Whether a message carries loss; `is_last` of the last answer."""
        if message.weight == 0.0:
            return False
        if message.train is not None:
            return message.train
        if not self.mask_prompt:
            return True
        if isinstance(self.train_on, str):
            return message.role == "assistant" and (is_last or self.train_on == "all")
        return message.role in self.train_on


class Part(NamedTuple):
    """What one message, or the style between two, adds to the text."""

    pieces: tuple[str, ...]
    message: Message | None = None


def lay_out(messages: Sequence[Message], style: PromptStyle) -> list[Part]:
    """The whole text, message by message.

    Raises:
        InputError: The style has no place for a tool's message.
    """
    parts: list[Part] = []
    system, before = "", ""
    for message in messages:
        if message.role == "system" and not style.system:
            system = f"{message.content}\n\n"  # goes in front of the first instruction
        elif message.role == "system":
            parts.append(Part(style.fill("system", message.content), message))
        elif message.role == "assistant":
            header: tuple[str, ...] = (Template(style.header),)
            if style.header_in_prompt:
                parts.append(Part(header))
                header = ()
            parts.append(Part((*header, message.content, Template(style.end)), message))
        else:
            if before == "assistant":
                parts.append(Part((Template(style.turn_end),)))
            elif before == "tool":
                parts.append(Part((Template(style.end + style.turn_end),)))
            if message.role == "tool":
                pieces: tuple[str, ...] = style.fill("tool", message.content)
            else:
                pieces = style.fill("instruction", system + message.content)
                system = ""
                if message.input:  # figure 7.4: without one its heading is left out as well
                    pieces += style.fill("input", message.input)
            parts.append(Part(pieces, message))
        before = message.role
    return parts


def render(conversation: Conversation, style: PromptStyle, masking: Masking) -> list[list[Segment]]:
    """What is trained on: one row of segments, or one for each answer that carries loss.

    What stands behind the last answer is left out: it leads to nothing. The last segment of each
    row is an answer, behind which batching puts the end-of-text token.

    Raises:
        InputError: There is no answer, or the style has no place for a message.
    """
    if not conversation.answers:
        raise InputError("messages: no assistant's among them; training needs an answer")
    conversation = Conversation(conversation.messages[: conversation.answers[-1] + 1])
    if style.template:
        return _render_template(conversation, style, masking)
    parts = lay_out(conversation.messages, style)
    losses = [_loss(part, masking, part is parts[-1]) for part in parts]
    if style.closes_answers:
        return [_join(parts, losses)]
    rows: list[list[Segment]] = []
    begin = 0
    for place, part in enumerate(parts):
        if part.message is None or part.message.role != "assistant":
            continue
        # Each token carries its loss in one row, that of the answer it leads to.
        here = [(False, 1.0)] * begin + losses[begin : place + 1]
        if any(supervised for supervised, _ in here) or (part is parts[-1] and not rows):
            rows.append(_join(parts[: place + 1], here))
        begin = place + 1
    return rows


def render_question(conversation: Conversation, style: PromptStyle) -> list[Segment]:
    """What a model is given to answer the last message, the header included if it is given.

    It is, token by token, what stands before that answer in training.
    """
    if style.template:
        rows = lay_out_question(conversation, style.template, style.end)
        return _join([Part(*part) for part in rows])
    return ask(conversation.question.messages, style)


def ask(messages: Sequence[Message], style: PromptStyle) -> list[Segment]:
    """`render_question` of messages that nobody has checked, the last of them to be answered."""
    parts = lay_out(messages, style)
    if style.header_in_prompt:
        parts.append(Part((Template(style.header),)))
    return _join(parts)


def flatten(segments: Sequence[Segment]) -> tuple[str, ...]:
    """The pieces of all segments, in a form that is encoded as these are."""
    pieces: list[str] = []
    for segment in segments:
        pieces += [*([Break()] if pieces else []), *segment.pieces]
    return tuple(pieces)


def _render_template(
    conversation: Conversation, style: PromptStyle, masking: Masking
) -> list[list[Segment]]:
    """`render` for a model's own template, which lays out questions as a whole."""
    for place, message in enumerate(conversation.messages):
        is_wanted = masking.mask_prompt and message.role != "assistant"
        if is_wanted and masking.trains(message, is_last=False):
            raise InputError(
                f"messages[{place}]: a {message.role}'s message cannot carry loss with "
                "prompt_style template, which has no place of its own for it"
            )
    layouts = lay_out_template(conversation, style.template, style.end)
    rows: list[list[Segment]] = []
    for number, layout in enumerate(layouts):
        parts = [Part(*part) for part in layout]
        losses = [_loss(part, masking, part is parts[-1]) for part in parts]
        if len(layouts) > 1:  # earlier answers have rows of their own
            last = _loss(parts[-1], masking, number == len(layouts) - 1)
            losses = [(not masking.mask_prompt, 1.0)] * (len(parts) - 1) + [last]
        is_needed = any(supervised for supervised, _ in losses)
        if is_needed or (number == len(layouts) - 1 and not rows):
            rows.append(_join(parts, losses))
    return rows


def _loss(part: Part, masking: Masking, is_last: bool) -> tuple[bool, float]:
    """Whether a part carries loss, and its weight."""
    if part.message is None:
        return not masking.mask_prompt, 1.0
    if not masking.trains(part.message, is_last):
        return False, 1.0
    return True, part.message.weight


def _join(
    parts: Sequence[Part], losses: Sequence[tuple[bool, float]] | None = None
) -> list[Segment]:
    """Neighbours with the same loss are one text; an answer always is one of its own.

    So the tokens do not depend on which answers carry loss, and a question's are those it has
    when the model is asked.
    """
    losses = losses or [(False, 1.0)] * len(parts)
    segments: list[Segment] = []
    was_answer = True
    for part, (supervised, weight) in zip(parts, losses, strict=True):
        is_answer = part.message is not None and part.message.role == "assistant"
        if not (is_answer or was_answer) and segments[-1][1:] == (supervised, weight):
            joined = segments[-1].pieces + part.pieces
            segments[-1] = Segment(joined, supervised, weight)
        else:
            segments.append(Segment(part.pieces, supervised, weight))
        was_answer = is_answer
    return segments
