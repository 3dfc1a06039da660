"""The chat template gives exactly the prompt that training used, whatever the style holds."""

from __future__ import annotations

import re

import jinja2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_sft.data.chat_template import jinja_template, ollama_template
from lightning_sft.data.conversation import Conversation, Entry
from lightning_sft.data.prompts import STYLES, PromptStyle, get_style
from lightning_sft.data.segments import Masking, flatten, lay_out, render_question
from lightning_sft.data.segments import render as render_rows
from lightning_sft.serving.conversation import lay_out_prompt, read_conversation

ODD = PromptStyle(
    instruction="'Q\"\\n\\' {instruction} \t?\r\n",
    input="\n\n<{input}> %% é\u2028",
    header="\n{{ x }} {% if %} {# #}\n\n ",
    end=" </'ende'> ",
)


def render(
    template: str, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """As transformers does it (`render_jinja_template`)."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt
    )


def ask(instruction: str, given: str = "") -> dict[str, str]:
    message = {"role": "user", "content": instruction}
    return message | ({"input": given} if given else {})


@pytest.mark.parametrize("header_in_prompt", [True, False])
@pytest.mark.parametrize("style", [*STYLES.values(), ODD], ids=lambda style: style.name)
@given(instruction=st.text(), given=st.text())
@example(instruction="Say\n\n### Response:\n{{ it }}", given="  \n{% raw %}")
def test_a_question_is_laid_out_as_in_training(style, header_in_prompt, instruction, given):
    style = get_style(style, header_in_prompt)
    entry = Entry(instruction, given, "")
    assert render(jinja_template(style), [ask(instruction, given)]) == style.prompt(entry)


@pytest.mark.parametrize("style", STYLES.values(), ids=lambda style: style.name)
def test_an_input_may_follow_in_the_styles_own_words(style):
    """For programs that hand on nothing but `content`, as llama.cpp's server."""
    content = "Rewrite it." + style.input.replace("{input}", "She walks.")
    expected = style.prompt(Entry("Rewrite it.", "She walks.", ""))
    assert render(jinja_template(style), [ask(content)]) == expected


@pytest.mark.parametrize("style", [*STYLES.values(), ODD], ids=lambda style: style.name)
def test_a_conversation(style):
    template = jinja_template(style)
    # In the style's own place for a system message, or before the first instruction.
    opening = style.system.replace("{system}", "One")
    first = Entry("Two" if opening else "One\n\nTwo", "", "Three.")
    second = Entry("Four", "Five", "")
    parted = "" if style.name == "llama3" else "\n" if style.end else "\n\n"
    messages = [
        {"role": "system", "content": "One"},
        ask("Two"),
        {"role": "assistant", "content": "Three."},
    ]
    whole = opening + "".join(style.split(first)) + parted
    assert render(template, messages, add_generation_prompt=False) == whole
    assert render(template, [*messages, ask("Four", "Five")]) == whole + style.prompt(second)
    messages[0]["role"] = "developer"
    assert render(template, messages, add_generation_prompt=False) == whole
    with pytest.raises(jinja2.exceptions.TemplateError, match="system, user and assistant only"):
        render(template, [{"role": "critic" if style.tool else "tool", "content": "x"}])


@pytest.mark.parametrize("header_in_prompt", [True, False])
@pytest.mark.parametrize("style", [*STYLES.values(), ODD], ids=lambda style: style.name)
def test_a_conversation_is_laid_out_as_in_training(style, header_in_prompt):
    style = get_style(style, header_in_prompt)
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    if style.tool:
        roles[3:3] = ["tool", "tool", "assistant"]
    messages = [{"role": role, "content": f"{place} {role}"} for place, role in enumerate(roles)]
    conversation = Conversation(messages)
    trained = "".join(
        text for part in lay_out(conversation.messages, style) for text in part.pieces
    )
    prompt = "".join(flatten(render_question(conversation, style)))
    if not header_in_prompt:  # it comes back with the answer
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = style.header + message["content"]
    assert render(jinja_template(style), messages, add_generation_prompt=False) == trained
    assert render(jinja_template(style), messages) == prompt


@pytest.mark.parametrize("style", STYLES.values(), ids=lambda style: style.name)
def test_five_turns_of_an_exported_template(style):
    """Each turn's prompt, with a system's message and inputs, is what training and `serve` give."""
    said = [{"role": "system", "content": "Be brief."}]
    for turn in range(5):
        said.append(ask(f"Question {turn}?", "some text" if turn % 2 else ""))
        conversation = Conversation(tuple(said))
        prompt = "".join(flatten(render_question(conversation, style)))
        assert render(jinja_template(style), said) == prompt
        assert "".join(lay_out_prompt(read_conversation({"messages": said}), style)) == prompt
        said.append({"role": "assistant", "content": f"Answer {turn}."})
    [*rows] = render_rows(Conversation(tuple(said)), style, Masking())
    trained = "".join("".join(segment.pieces) for segment in rows[-1])
    before = said[:-1]
    assert trained == render(jinja_template(style), before) + said[-1]["content"] + style.end


def test_a_header_of_the_models_own_comes_back_with_its_answer():
    style = get_style("alpaca", header_in_prompt=False)
    said = {"role": "assistant", "content": "### Response:\nTwo."}
    text = render(jinja_template(style), [ask("One"), said], add_generation_prompt=False)
    assert text.count("### Response:") == 1


def test_ollamas_template_has_the_same_words():
    """Its own program was never asked: the fields are filled in by hand here."""
    for style in STYLES.values():
        text = ollama_template(style).split("{{ .Response }}")[0]
        text, count = re.subn(r"{{ if \.System }}.*?{{ end }}", "", text, flags=re.DOTALL)
        assert count == 1
        assert text.replace("{{ .Prompt }}", "Say it.") == style.prompt(Entry("Say it.", "", ""))
