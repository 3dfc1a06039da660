"""Prompt styles: `Entry` → `(prompt, response)` text, and generated text → answer.

The prompt is everything the user supplies, the response header (`### Response:`) included; the
response is everything the model supplies, up to and including the end-of-text token that batching
adds. One `PromptStyle` decides this for training, masking, generation and extraction, so the four
cannot disagree. `header_in_prompt=False` gives the chapter's own arrangement: there the model
writes the header too, and it is cut off its answer afterwards.

    >>> prompt, response = get_style("alpaca").split(entry)

A style of your own needs no code. In a config:

    data:
      prompt_style:
        instruction: "Question: {instruction}"
        input: "\\nContext: {input}"
        header: "\\nAnswer: "

Source: figure 7.4, listing 7.2 and exercise 7.1 of "Build a Large Language Model (From Scratch)".
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Entry

TEMPLATE = "template"  # the style that is a model's own chat template


class Template(str):
    """Text that a style puts around a user's. Only here does `<|im_end|>` name a special token."""


class Break(str):
    """Nothing, between two pieces that are not to be encoded as one text."""


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How an entry is laid out as text.

    Args:
        instruction: Opens the prompt; holds `{instruction}` once.
        input: Follows where the entry has an input; holds `{input}` once.
        header: Announces the answer.
        end: Closes the answer, before the end-of-text token.
        system: Lays out a system message, holds `{system}` once; a style without it puts the
            message in front of the first instruction, an empty line between.
        tool: Lays out what a tool answered, as `instruction` does a question; holds `{tool}` once.
        header_in_prompt: Whether the user supplies the header (true) or the model writes it.
        name: How configs and messages call the style.
        template: A chat template in Jinja that lays out whole conversations; the texts above then
            only describe it. `template.py` has it filled in.
    """

    instruction: str
    input: str
    header: str
    end: str = ""
    header_in_prompt: bool = True
    name: str = "custom"
    system: str = ""
    tool: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        for field in ("instruction", "input", "system", "tool"):
            if field in ("instruction", "input") or getattr(self, field):
                _check_template(self.name, field, getattr(self, field))
        if not self.header:
            raise InputError(f"prompt_style {self.name}: header is empty; it must announce answers")

    def split(self, entry: Entry) -> tuple[str, str]:
        """The two texts whose concatenation is the whole training text."""
        # Listing 7.2. Not `str.format`: braces in an entry's own text are text.
        prompt, response = self.pieces(entry)
        return "".join(map(str, prompt)), "".join(map(str, response))

    def pieces(self, entry: Entry) -> tuple[list[str], list[str]]:
        """`split`'s two texts in pieces, so that the style's own words are known from a user's."""
        question = [*self.fill("instruction", entry.instruction)]
        if entry.input:  # figure 7.4: without one its heading is left out as well
            question += self.fill("input", entry.input)
        answer, header = [entry.output, Template(self.end)], [Template(self.header)]
        # Whoever supplies the header decides where masking and generation begin.
        if self.header_in_prompt:
            return question + header, answer
        return question, header + answer

    def fill(self, field: str, text: str) -> tuple[str, str, str]:
        """A user's text in the middle of the template of that name, in pieces.

        Raises:
            InputError: The style has no such template.
        """
        template: str = getattr(self, field)
        if not template:
            raise InputError(
                f"prompt_style {self.name}: has no place for a {field} message; give a style of "
                f"your own with a template `{field}` that holds {{{field}}}"
            )
        before, after = template.split("{" + field + "}")
        return Template(before), text, Template(after)

    @property
    def closes_answers(self) -> bool:
        """Whether a mark of the style ends an answer, and not the end-of-text token alone."""
        return bool(self.end.strip())

    @property
    def turn_end(self) -> str:
        """What parts a finished answer from the next question of a conversation."""
        if self.end and self.header.startswith(self.end):  # a question ends as an answer does
            rest = self.header.removeprefix(self.end)
            return rest[: len(rest) - len(rest.lstrip())]
        return "\n" if self.end else "\n\n"

    def prompt(self, entry: Entry) -> str:
        """What the model is given to answer `entry`."""
        return self.split(entry)[0]

    def extract(self, generated: str) -> str:
        """The answer within the text that the model wrote after the prompt.

        Only what the model was trained to write around an answer is removed, once and at its
        place: a header inside the answer stays (the chapter's `.replace` would cut it out).
        """
        answer = generated.strip()  # as listing 7.9 does
        if not self.header_in_prompt:
            answer = answer.removeprefix(self.header.strip()).strip()
        if self.end.strip():
            answer = answer.removesuffix(self.end.strip()).strip()
        return answer


def get_style(
    style: str | Mapping[str, Any] | PromptStyle, header_in_prompt: bool = True
) -> PromptStyle:
    """The style of that name, or one made from a config's mapping of `PromptStyle` fields.

    Raises:
        InputError: Unknown name or field, missing field, or a template without its placeholder.
    """
    if isinstance(style, PromptStyle):
        return dataclasses.replace(style, header_in_prompt=header_in_prompt)
    if (style == TEMPLATE or (isinstance(style, Mapping) and style.get("name") == TEMPLATE)) and (
        not header_in_prompt
    ):
        raise InputError("header_in_prompt: must be true with prompt_style template")
    if style == TEMPLATE:  # until the tokenizer is known that brings it
        return PromptStyle("{instruction}", "\n\n{input}", "\n", name=TEMPLATE)
    if isinstance(style, str):
        if style not in STYLES:
            raise InputError(
                f"prompt_style: unknown style {style!r}; allowed: {', '.join(STYLES)}, {TEMPLATE}, "
                "or a mapping with instruction, input and header"
            )
        return dataclasses.replace(STYLES[style], header_in_prompt=header_in_prompt)
    allowed = {field.name for field in dataclasses.fields(PromptStyle)} - {"header_in_prompt"}
    unknown = sorted(set(style) - allowed)
    missing = sorted({"instruction", "input", "header"} - set(style))
    if unknown or missing:
        problem = f"unknown field {unknown[0]!r}" if unknown else f"{missing[0]!r} is missing"
        raise InputError(f"prompt_style: {problem}; allowed: {', '.join(sorted(allowed))}")
    not_text = sorted(name for name, value in style.items() if not isinstance(value, str))
    if not_text:
        raise InputError(f"prompt_style: {not_text[0]!r} must be text")
    made = PromptStyle(**style, header_in_prompt=header_in_prompt)
    known = STYLES.get(made.name)
    # Checkpoints of version 0.1.0 hold a shipped style's texts as far as it had them then.
    if known is not None and not {"system", "tool"} & set(style):
        known = dataclasses.replace(known, header_in_prompt=header_in_prompt)
        if dataclasses.replace(known, system="", tool="") == made:
            return known
    return made


def style_of_run(data: Mapping[str, Any]) -> str | dict[str, Any]:
    """The prompt style that the `data` section of a run's own `config.yaml` stands for.

    Version 0.1.0 put `phi3`'s input on a line of its own. Its configs have no `empty_output`.
    """
    style = data.get("prompt_style", "alpaca")
    if style != "phi3" or "empty_output" in data:
        return style
    texts = dataclasses.asdict(STYLES["phi3"]) | {"input": "\n{input}"}
    return {name: text for name, text in texts.items() if name != "header_in_prompt"}


def _check_template(style: str, field: str, template: str) -> None:
    """Allow the one placeholder, once. Anything else in braces would be a typing error."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        names = []
    rest = template.replace("{" + field + "}", "", 1)
    if names != [field] or "{" in rest or "}" in rest:
        raise InputError(
            f"prompt_style {style}: {field} must hold {{{field}}} exactly once and no other "
            f"placeholder, not {template!r}"
        )


# The first is figure 7.4's left side and the chapter's own; the second its right side.
STYLES = {
    style.name: style
    for style in (
        PromptStyle(
            name="alpaca",
            instruction=(
                "Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request."
                "\n\n### Instruction:\n{instruction}"
            ),
            input="\n\n### Input:\n{input}",
            header="\n\n### Response:\n",
        ),
        # Figure 7.4's layout, the input on the instruction's line. (The figure also rewords the
        # sentence around it, which no template can.) Microsoft's own template closes turns with
        # <|end|>, and the code of exercise 7.1 has "\n<|assistant|>:\n"; neither is what the
        # figure shows. GPT-2 knows none of these markers as single tokens: they are plain text.
        PromptStyle(
            name="phi3",
            instruction="<|user|>\n{instruction}",
            input=" {input}",
            header="\n\n<|assistant|>\n",
        ),
        PromptStyle(
            name="chatml",
            instruction="<|im_start|>user\n{instruction}",
            input="\n{input}",
            header="<|im_end|>\n<|im_start|>assistant\n",
            end="<|im_end|>",
            system="<|im_start|>system\n{system}<|im_end|>\n",
            tool="<|im_start|>tool\n{tool}",
        ),
        # Llama 3.2's and Qwen3's own templates, without what they say of dates and tools, and
        # Qwen3's without thinking, which its own drops from all but the last answer. A tokenizer
        # that lacks their markers reads them as plain text.
        PromptStyle(
            name="llama3",
            instruction="<|start_header_id|>user<|end_header_id|>\n\n{instruction}",
            input="\n\n{input}",
            header="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            end="<|eot_id|>",
            system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
            tool="<|start_header_id|>ipython<|end_header_id|>\n\n{tool}",
        ),
        PromptStyle(
            name="qwen3",
            instruction="<|im_start|>user\n{instruction}",
            input="\n{input}",
            header="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            end="<|im_end|>",
            system="<|im_start|>system\n{system}<|im_end|>\n",
            tool="<|im_start|>user\n<tool_response>\n{tool}\n</tool_response>",
        ),
    )
}
