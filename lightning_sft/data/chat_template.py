"""A prompt style as a chat template: Jinja for transformers and llama.cpp, Go for Ollama.

What the template makes of one user message and an open answer is `PromptStyle.prompt` to the
character, so that a model is asked elsewhere as it was trained here. For what training never shows:

- an entry's `input` goes into the message as a key of its own (`{"role": "user", "content": …,
  "input": …}`, which transformers hands on), or behind the instruction in the style's own words;
- a system (or developer) message has a place of its own where the style has one for it; else it is
  put before the next instruction, an empty line between;
- earlier questions and answers stand before, each laid out as one training text, with an empty
  line behind it (a line break for a style with a closing mark, as ChatML);
- any other role is refused, but for a tool's where the style has a place for it.

A style that is a model's own template is that template.

    >>> tokenizer.chat_template = jinja_template(get_style("alpaca"))

This module does not import torch.
"""

from __future__ import annotations

import json

from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.template import without_tokens

_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

_JINJA = """\
{{%- set turn = namespace(system='') -%}}
{{%- for message in messages -%}}
{{%- if message['role'] in ['system', 'developer'] -%}}
{system}
{{%- elif message['role'] == 'user' -%}}
{{{{- {before} + turn.system + message['content'] + {after} -}}}}
{{%- set turn.system = '' -%}}
{{%- if message['input'] -%}}
{{{{- {before_input} + message['input'] + {after_input} -}}}}
{{%- endif -%}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- {header} + message['content'] + {end} -}}}}
{tool}{{%- else -%}}
{{{{- raise_exception('this template knows the roles system, user and assistant only') -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- {open_header} -}}}}
{{%- endif -%}}"""


def jinja_template(style: PromptStyle, bos_token: str | None = None) -> str:
    """The style as a Jinja template of `messages` and `add_generation_prompt`.

    Args:
        bos_token: What every row of the model begins with. transformers adds nothing to a rendered
            conversation; llama.cpp takes it off where it adds one itself. A model's own template
            names its own.
    """
    if style.template:
        return without_tokens(style.template)
    before, after = style.instruction.split("{instruction}")
    before_input, after_input = style.input.split("{input}")
    # A header that the model writes itself is part of the answer that a client sends back.
    header = style.header if style.header_in_prompt else ""
    begin = "" if bos_token is None else f"{{{{- {_quote(bos_token)} -}}}}\n"
    return begin + _JINJA.format(
        system=_system(style),
        tool=_tool(style),
        before=_quote(before),
        after=_quote(after),
        before_input=_quote(before_input),
        after_input=_quote(after_input),
        header=_quote(header),
        end=_quote(style.end + style.turn_end),
        open_header=_quote(header),
    )


def _system(style: PromptStyle) -> str:
    """What a system message does: it is written in its own place, or kept for the next question."""
    if not style.system:
        return "{%- set turn.system = turn.system + message['content'] + '\\n\\n' -%}"
    before, after = style.system.split("{system}")
    return f"{{{{- {_quote(before)} + message['content'] + {_quote(after)} -}}}}"


def _tool(style: PromptStyle) -> str:
    """The branch of a tool's messages, if the style knows them."""
    if not style.tool:
        return ""
    before, after = style.tool.split("{tool}")
    between = _quote(style.end + style.turn_end)
    return (
        "{%- elif message['role'] == 'tool' -%}\n"
        f"{{{{- {between} if loop.previtem and loop.previtem['role'] == 'tool' -}}}}\n"
        f"{{{{- {_quote(before)} + message['content'] + {_quote(after)} -}}}}\n"
    )


def ollama_template(style: PromptStyle) -> str:
    """The style as a Go template of Ollama's `.System`, `.Prompt` and `.Response`."""
    before, after = style.instruction.split("{instruction}")
    header = style.header if style.header_in_prompt else ""
    question = "{{ .Prompt }}" + _go(after + header)
    if style.system:
        opening, closing = style.system.split("{system}")
        system = "{{ if .System }}" + _go(opening) + "{{ .System }}" + _go(closing) + "{{ end }}"
        question = system + _go(before) + question
    else:
        question = _go(before) + "{{ if .System }}{{ .System }}\n\n{{ end }}" + question
    return question + "{{ .Response }}" + _go(style.end + style.turn_end)


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return "'" + "".join(_ESCAPES.get(character, character) for character in text) + "'"


def _go(text: str) -> str:
    """Text of a Go template within a Modelfile's triple quotes."""
    plain = "{{" not in text and '"' not in text
    return text if plain else "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
