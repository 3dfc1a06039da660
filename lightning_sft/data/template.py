"""A model's own chat template as a prompt style (`data.prompt_style: template`).

A template is a program: it may say anything about a conversation as a whole. What it says of one
message is known where the rendering of the messages up to it is a prefix of the rendering of all;
then the mask is a fact. Where it is not, as with templates that drop an earlier answer's `<think>`
text, each answer becomes a row of its own, with what the template makes of the messages before it;
and where even that fails the conversation is refused.

What a user wrote is known from what the template wrote by rendering placeholders in its place, so
that here, too, a special token's name in a user's text stays text.

    >>> style = bind_style(get_style("template"), tokenizer)
    >>> style.split(Entry("Say hello.", "", "Hello."))

This module does not import torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.prompts import TEMPLATE, PromptStyle, Template
from lightning_sft.data.template_process import TemplateProcess
from lightning_sft.data.tokenizer import Tokenizer

# Placeholders: private characters around a number. Thoughts keep their tags, which templates look
# for, and text its white space at both ends, which templates strip.
_PLACE = re.compile("\ue000([0-9]+)\ue001")
_KEPT = re.compile(r"(\s*</?think>\s*)")


def bind_style(style: PromptStyle, tokenizer: Tokenizer) -> PromptStyle:
    """The style itself; where it stands for a model's own template, with that template in it.

    Raises:
        InputError: The tokenizer brings no template, or one that cannot be used.
    """
    if style.name != TEMPLATE or style.template:
        return style
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        raise InputError(
            "prompt_style: template is the model's own, and its tokenizer brings none; give one of "
            "the named styles, or a mapping"
        )
    # What every row begins with is put there by encoding, and must not be there twice.
    begins_itself = getattr(tokenizer, "bos_token_id", None) is not None
    tokens = dict(getattr(tokenizer, "facts", {}))
    if begins_itself:
        tokens["bos_token"] = ""
    return _probe(with_tokens(source, tokens))


def with_tokens(source: str, tokens: dict[str, str | None]) -> str:
    """The template with a first line that says what its special tokens are called."""
    names = {name: tokens.get(name) or "" for name in ("bos_token", "eos_token")}
    line = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in names.items())
    return f"{line}\n{source}"


def without_tokens(source: str) -> str:
    """The template as its model brought it."""
    return source.partition("\n")[2]


@functools.lru_cache(maxsize=8)
def _process(source: str) -> TemplateProcess:
    return TemplateProcess(source)


@functools.lru_cache(maxsize=8)
def _probe(source: str) -> PromptStyle:
    """The style of a template, which parts of it seen on one question and one answer."""
    asked = Conversation((Message("user", "a Question"), Message("assistant", "an Answer")))
    question, opened, whole = render_prefixes(asked, source, [(1, False), (1, True), (2, False)])
    texts = ["".join(pieces) for pieces in (question, opened, whole)]
    if not texts[1].startswith(texts[0]) or not texts[2].startswith(texts[0]):
        raise InputError("chat template: a question is not laid out alike with and without answer")
    end = whole[-1].rstrip() if isinstance(whole[-1], Template) else ""
    said = next(place for place, piece in enumerate(question) if not isinstance(piece, Template))
    before, after = "".join(question[:said]), "".join(question[said + 1 :])
    # All but `end` is for whoever shows the style: rows and prompts come from the template itself.
    return PromptStyle(
        instruction=("" if {"{", "}"} & set(before) else before) + "{instruction}",
        input="\n\n{input}",
        header=after + texts[1].removeprefix(texts[0]) or "\n",
        end=end,
        name=TEMPLATE,
        template=source,
    )


def render_prefixes(
    conversation: Conversation, source: str, renders: Sequence[tuple[int, bool]]
) -> list[list[str]]:
    """Texts of the first so many messages, in pieces: the template's own words and the users'.

    Args:
        renders: For each text how many messages, and whether the header of an answer follows.

    Raises:
        InputError: The template fails, or makes something else of a text than to trim it.
    """
    plain = [{"role": m.role, "content": _content(m)} for m in conversation.messages]
    texts: list[str] = []
    marked = [message | {"content": _mark(message["content"], texts)} for message in plain]
    process = _process(source)
    found = process.render(marked, renders)
    pieces = [_pieces(text, texts) for text in found]
    if ["".join(part) for part in pieces] != process.render(plain, renders):
        raise InputError(
            "chat template: changes the text of a message, so that what it adds cannot be told "
            "from what was said"
        )
    return pieces


def render_text(
    messages: Sequence[dict[str, str]], source: str, add_generation_prompt: bool = True
) -> str:
    """What a template makes of messages that are plain mappings, as one text.

    Raises:
        InputError: The template refuses them, or is stopped.
    """
    return _process(source).render(messages, [(len(messages), add_generation_prompt)])[0]


def _content(message: Message) -> str:
    return message.content + (f"\n\n{message.input}" if message.input else "")


def _mark(content: str, texts: list[str]) -> str:
    """A content with placeholders for its texts, which are added to `texts`."""
    marked = ""
    for place, part in enumerate(_KEPT.split(content)):
        core = part.strip()
        if place % 2 or not core:  # a thought's tag, or white space
            marked += part
            continue
        before, _, after = part.partition(core)
        marked += f"{before}\ue000{len(texts)}\ue001{after}"
        texts.append(core)
    return marked


def _pieces(text: str, texts: Sequence[str]) -> list[str]:
    parts = _PLACE.split(text)  # words of the template, and numbers of texts, in turn
    return [
        texts[int(part)] if place % 2 else Template(part)
        for place, part in enumerate(parts)
        if part
    ]
