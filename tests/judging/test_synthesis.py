"""What is asked for, word for word where the book has words, and what becomes of the replies."""

from __future__ import annotations

import pytest

from lightning_sft.data.entries import Entry
from lightning_sft.judging.synthesis import (
    fill,
    find_parts,
    is_for,
    make_record,
    read_reflection,
    read_text,
)

PLAIN = Entry("Name a colour.", "", "Red.")
GIVEN = Entry("Edit this.", "He go {output}", "He goes {instruction}")
NAMES = {"instruction": "instruction", "input": "input", "output": "output"}
RECORD = {"instruction": "Name a colour.", "input": "", "output": "Red.", "source": 7}


def test_prompts_of_the_book() -> None:
    assert fill("passive_voice", PLAIN) == (
        "Without adding any response or explanation, convert the following text to passive voice: "
        "Red."
    )
    assert fill("preferences", PLAIN, "impolite") == (
        "Given the input `Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nName a colour.` and correct "
        "output `Red.`, slightly rewrite the output to be more impolite. Keep the modification "
        "minimal. Only return the generated response and nothing else."
    )
    reflection = fill("reflect_instruction", PLAIN)
    assert "[Instruction]\nName a colour.\n\n[The Start of Answer]\nRed.\n\n" in reflection
    assert "in the format of [New Answer] your answer [End]" in reflection


def test_an_input_is_shown_where_there_is_one() -> None:
    assert "[The Start of Input]\nHe go {output}\n\n[The End of Input]\n" in fill(
        "reflect_response", GIVEN
    )
    assert "The Start of Input" not in fill("reflect_response", PLAIN)


def test_texts_are_never_searched_for_places() -> None:
    prompt = fill("reflect_response", GIVEN)
    assert "He goes {instruction}" in prompt
    assert "He go {output}" in prompt


def test_a_new_instruction_would_not_fit_an_old_input() -> None:
    assert is_for("reflect_instruction", PLAIN)
    assert not is_for("reflect_instruction", GIVEN)
    assert is_for("reflect_response", GIVEN)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (" Rot. \n", "Rot."),
        ("<think>Hm.\nRed?</think>\nRot.", "Rot."),
        ("a\n\nb", "a\n\nb"),
        ("", None),
        (" \n", None),
        ("<think>Hm.</think>", None),
    ],
)
def test_the_text_of_a_reply(reply: str, text: str | None) -> None:
    assert read_text(reply).score == text
    assert (read_text(reply).reason is None) is (text is not None)


BOTH = "1. It is bad.\n2. [New Instruction] Why is\nred warm? [End]\n3. [New Answer] Because. [End]"


@pytest.mark.parametrize(
    ("kind", "reply", "parts"),
    [
        ("reflect_instruction", BOTH, ["Why is\nred warm?", "Because."]),
        ("reflect_instruction", "[New Instruction] A? [New Answer] B.", ["A?", "B."]),
        ("reflect_instruction", "[New Instruction] A? [End]", ["A?", ""]),
        ("reflect_response", "Bad. [Better Answer] Red, or blue. [End] Bye.", ["Red, or blue."]),
        ("reflect_response", "[Better Answer] Red", ["Red"]),
        ("reflect_response", "Better: red", [""]),
    ],
)
def test_the_marked_parts(kind: str, reply: str, parts: list[str]) -> None:
    assert list(find_parts(kind, reply).values()) == parts
    assert (read_reflection(kind, reply).score is None) is ("" in parts)


def test_a_missing_part_is_named() -> None:
    assert read_reflection("reflect_response", "No.").reason == "the reply has no [Better Answer]"


def test_new_records_keep_the_rest() -> None:
    assert make_record("passive_voice", RECORD, "It is red.", NAMES) == RECORD | {
        "output_2": "It is red."
    }
    assert make_record("rewrite", RECORD, "Say a colour.", NAMES)["instruction"] == "Say a colour."
    new = make_record("reflect_instruction", RECORD, BOTH, NAMES)
    assert new == RECORD | {"instruction": "Why is\nred warm?", "output": "Because."}
    new = make_record("reflect_response", RECORD, "[Better Answer] Blue.", NAMES)
    assert new == RECORD | {"output": "Blue."}


def test_which_of_a_pair_is_chosen() -> None:
    polite = make_record("preferences", RECORD, "Red, please.", NAMES, "polite")
    assert (polite["chosen"], polite["rejected"]) == ("Red, please.", "Red.")
    rude = make_record("preferences", RECORD, "Red, dimwit.", NAMES, "impolite")
    assert (rude["chosen"], rude["rejected"]) == ("Red.", "Red, dimwit.")
    assert rude["output"] == "Red."


def test_other_names_of_fields() -> None:
    names = {"instruction": "q", "input": "c", "output": "a"}
    assert make_record("rewrite", {"q": "1", "a": "2"}, "3", names) == {"q": "3", "a": "2"}
