"""Prompt styles: exact texts, and the answer found again in what a model writes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import STYLES, PromptStyle, get_style, style_of_run

WITH_INPUT = Entry("Edit for grammar.", "He go home.", "He goes home.")
WITHOUT_INPUT = Entry("Name a colour.", "", "Blue.")
OWN = {"instruction": "Q: {instruction}", "input": " ({input})", "header": "\nA: ", "end": " END"}
ALL_STYLES = [*STYLES, pytest.param(OWN, id="own")]

ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes \
the request.

### Instruction:
Edit for grammar.

### Input:
He go home.

### Response:
He goes home."""
PHI3 = """\
<|user|>
Edit for grammar. He go home.

<|assistant|>
He goes home."""
CHATML = """\
<|im_start|>user
Edit for grammar.
He go home.<|im_end|>
<|im_start|>assistant
He goes home.<|im_end|>"""


def chapter_text(entry: Entry) -> str:
    """Listing 7.2's `format_input`, and the response as listing 7.4 appends it."""
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{entry.instruction}"
    )
    text += f"\n\n### Input:\n{entry.input}" if entry.input else ""
    return f"{text}\n\n### Response:\n{entry.output}"


def refusal(style: object) -> str:
    with pytest.raises(InputError) as error:
        get_style(style)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Texts ---


@pytest.mark.parametrize(
    ("style", "expected"), [("alpaca", ALPACA), ("phi3", PHI3), ("chatml", CHATML)]
)
def test_whole_text_with_input(style, expected):
    assert "".join(get_style(style).split(WITH_INPUT)) == expected


@pytest.mark.parametrize(
    ("style", "prompt", "response"),
    [
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nName a colour.\n\n### Response:\n",
            "Blue.",
        ),
        ("phi3", "<|user|>\nName a colour.\n\n<|assistant|>\n", "Blue."),
        (
            "chatml",
            "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
            "Blue.<|im_end|>",
        ),
        (OWN, "Q: Name a colour.\nA: ", "Blue. END"),
    ],
)
def test_prompt_and_response_without_input(style, prompt, response):
    assert get_style(style).split(WITHOUT_INPUT) == (prompt, response)
    assert get_style(style).prompt(WITHOUT_INPUT) == prompt


@pytest.mark.parametrize(
    ("style", "prompt", "response"),
    [
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nName a colour.",
            "\n\n### Response:\nBlue.",
        ),
        ("phi3", "<|user|>\nName a colour.", "\n\n<|assistant|>\nBlue."),
        (
            "chatml",
            "<|im_start|>user\nName a colour.",
            "<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>",
        ),
        (OWN, "Q: Name a colour.", "\nA: Blue. END"),
    ],
)
def test_the_model_writes_the_header(style, prompt, response):
    assert get_style(style, header_in_prompt=False).split(WITHOUT_INPUT) == (prompt, response)


@pytest.mark.parametrize("header_in_prompt", [True, False])
def test_the_chapters_text_on_all_its_entries(book_entries, header_in_prompt):
    style = get_style("alpaca", header_in_prompt)
    for entry in book_entries:
        prompt, response = style.split(entry)
        assert prompt + response == chapter_text(entry)


@pytest.mark.parametrize("style", ALL_STYLES)
@given(texts=st.tuples(st.text(), st.text(), st.text()))
def test_the_header_only_changes_sides(style, texts):
    entry = Entry(*texts)
    given_text, written = (get_style(style, side).split(entry) for side in (True, False))
    assert "".join(given_text) == "".join(written)
    header = get_style(style).header
    assert given_text[0] == written[0] + header
    assert written[1] == header + given_text[1]


@given(instruction=st.text("{}instructoupe \\%$", min_size=1))
@pytest.mark.parametrize("style", ALL_STYLES)
def test_braces_in_a_users_text_are_plain(style, instruction):
    marks = "{instruction} {input} {{}} {0} {output}"
    made = get_style(style)
    prompt, response = made.split(Entry(instruction + marks, marks, marks))
    before, _, _ = made.instruction.partition("{instruction}")
    between = made.instruction.removeprefix(before + "{instruction}")
    expected = before + instruction + marks + between + made.input.replace("{input}", marks)
    assert prompt == expected + made.header
    assert response == marks + made.end


def test_split_reads_a_template_once():
    """Text that came in by one placeholder must not be filled by the other."""
    prompt, _ = get_style("alpaca").split(Entry("Explain {input}.", "x", "y"))
    assert "Explain {input}." in prompt


# --- Which style ---


def test_get_style_by_name_mapping_and_object():
    assert get_style("phi3") == STYLES["phi3"]
    assert get_style("phi3").name == "phi3"
    assert not get_style("phi3", header_in_prompt=False).header_in_prompt
    own = get_style(OWN, header_in_prompt=False)
    assert own == PromptStyle(**OWN, header_in_prompt=False)
    assert own.name == "custom"
    assert get_style(own) == dataclasses.replace(own, header_in_prompt=True)
    assert get_style({**OWN, "name": "mine"}).name == "mine"
    assert get_style({key: OWN[key] for key in ("instruction", "input", "header")}).end == ""


def test_unknown_styles():
    assert refusal("alpacca") == (
        "prompt_style: unknown style 'alpacca'; allowed: alpaca, phi3, chatml, llama3, qwen3, "
        "template, or a mapping with instruction, input and header"
    )
    allowed = "allowed: end, header, input, instruction, name, system, template, tool"
    assert refusal(OWN | {"prefix": ""}) == f"prompt_style: unknown field 'prefix'; {allowed}"
    assert refusal(OWN | {"header_in_prompt": True}) == (
        f"prompt_style: unknown field 'header_in_prompt'; {allowed}"
    )
    assert refusal({"instruction": "{instruction}"}) == (
        f"prompt_style: 'header' is missing; {allowed}"
    )
    assert refusal(OWN | {"end": None}) == "prompt_style: 'end' must be text"
    assert refusal(OWN | {"header": ""}) == (
        "prompt_style custom: header is empty; it must announce answers"
    )


@pytest.mark.parametrize("field", ["instruction", "input"])
@pytest.mark.parametrize(
    "template",
    [
        "no placeholder",
        "{other}",
        "{FIELD} {FIELD}",
        "{FIELD} {other}",
        "{FIELD} {}",
        "{FIELD!r}",
        "{FIELD:>9}",
        "{FIELD.name}",
        "{FIELD[0]}",
        "{{FIELD}}",
        "{FIELD",
        "} {FIELD}",
        "{FIELD!r} {{FIELD}}",
    ],
)
def test_bad_templates(field, template):
    template = template.replace("FIELD", field)
    get_style(OWN | {field: f"a {{{field}}} b"})  # control
    assert refusal(OWN | {field: template, "name": "mine"}) == (
        f"prompt_style mine: {field} must hold {{{field}}} exactly once and no other placeholder, "
        f"not {template!r}"
    )


def test_runs_keep_the_layout_that_they_learned():
    """Version 0.1.0 put phi3's input on a line of its own; its configs lack newer keys."""
    old = style_of_run({"prompt_style": "phi3", "header_in_prompt": True})
    assert get_style(old).prompt(WITH_INPUT) == (
        "<|user|>\nEdit for grammar.\nHe go home.\n\n<|assistant|>\n"
    )
    assert get_style(old).name == "phi3"
    assert style_of_run({"prompt_style": "phi3", "empty_output": "error"}) == "phi3"
    assert style_of_run({"prompt_style": "alpaca"}) == "alpaca"
    assert style_of_run({}) == "alpaca"
    assert style_of_run({"prompt_style": OWN}) == OWN


# --- Extraction ---


@pytest.mark.parametrize(
    ("style", "header_in_prompt", "written", "answer"),
    [
        ("alpaca", True, "\n Blue. \n", "Blue."),
        ("alpaca", False, "\n\n### Response:\nBlue.", "Blue."),
        ("alpaca", False, "### Response: Blue.", "Blue."),
        ("alpaca", False, "Blue.", "Blue."),  # a model that has not learned the header yet
        ("alpaca", True, "### Response:\nBlue.", "### Response:\nBlue."),
        ("alpaca", True, "Use\n\n### Response:\nBlue.", "Use\n\n### Response:\nBlue."),
        ("alpaca", False, "\n\n### Response:\nUse\n\n### Response:\nX", "Use\n\n### Response:\nX"),
        ("alpaca", False, "\n\n### Response:\n### Response:\nX", "### Response:\nX"),
        ("phi3", False, "\n\n<|assistant|>\nBlue.", "Blue."),
        ("chatml", True, "Blue.<|im_end|>", "Blue."),
        ("chatml", True, "Blue.", "Blue."),  # cut at max_new_tokens
        ("chatml", True, "<|im_end|> closes a turn.<|im_end|>", "<|im_end|> closes a turn."),
        ("chatml", True, "Blue.<|im_end|>\n<|im_end|>", "Blue.<|im_end|>"),
        ("chatml", False, "<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>", "Blue."),
        (OWN, True, "The END. END", "The END."),
        (OWN, False, "A: A: x END", "A: x"),
    ],
)
def test_extract(style, header_in_prompt, written, answer):
    assert get_style(style, header_in_prompt).extract(written) == answer


def test_the_chapters_way_would_lose_part_of_an_answer():
    """Control: listing 7.9's `.replace` cuts a header out of the answer itself."""
    written = "\n\n### Response:\nWrite ### Response: first."
    assert written.replace("### Response:", "").strip() == "Write  first."
    style = get_style("alpaca", header_in_prompt=False)
    assert style.extract(written) == "Write ### Response: first."


MARKERS = st.sampled_from(
    ["### Response:", "<|im_end|>", "<|im_start|>assistant", "<|assistant|>", "A:", " END", "\n"]
)


@pytest.mark.parametrize("header_in_prompt", [True, False])
@pytest.mark.parametrize("style", ALL_STYLES)
@given(parts=st.lists(st.text(max_size=5) | MARKERS, max_size=6))
def test_what_was_trained_is_extracted_again(style, header_in_prompt, parts):
    entry = Entry("i", "", "".join(parts))
    made = get_style(style, header_in_prompt)
    assert made.extract(made.split(entry)[1]) == entry.output.strip()
