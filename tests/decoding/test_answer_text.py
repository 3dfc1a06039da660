"""What a reader of a growing answer sees: nothing that is taken back, and in the end all of it."""

from __future__ import annotations

import dataclasses
import random

import pytest

from lightning_sft.data.prompts import STYLES, PromptStyle
from lightning_sft.decoding.answer_text import AnswerText

TEXTS = [
    "",
    "  ",
    "plain",
    "  a b \n\n",
    "two\n\nparagraphs  and  blanks",
    "é ü 東京 🙂 end",
    "<|im_end|>",
    "text<|im_end|>",
    "text <|im_end|> ",
    "text<|im_end|>more<|im_end|>",
    "text<|im_",
    "### Response:\nanswer",
    "\n\n### Response:\nanswer ### Response: again\n",
    "### Resp",
    "### Response:",
    "<|assistant|>\n x",
]


def pieces_of(text: str, rng: random.Random) -> list[bytes]:
    """The bytes in pieces of 1 to 4, cutting characters in two."""
    content, pieces = text.encode(), []
    while content:
        size = rng.randint(1, 4)
        pieces.append(content[:size])
        content = content[size:]
    return pieces


def read(answer: AnswerText, pieces: list[bytes]) -> list[str]:
    return [*(answer.add(piece) for piece in pieces), answer.finish()]


@pytest.mark.parametrize("header_in_prompt", [True, False])
@pytest.mark.parametrize("style", STYLES.values(), ids=lambda style: style.name)
def test_all_pieces_together_are_the_extracted_answer(style, header_in_prompt):
    style = dataclasses.replace(style, header_in_prompt=header_in_prompt)
    for seed in range(20):
        for text in TEXTS:
            shown = read(AnswerText(style), pieces_of(text, random.Random(seed)))
            assert "".join(shown) == style.extract(text), text


def test_raw_text_is_left_as_it_is():
    for text in TEXTS:
        assert "".join(read(AnswerText(), pieces_of(text, random.Random(0)))) == text


def test_text_is_shown_as_soon_as_it_is_certain():
    """Control for the test above, which holding back everything would pass."""
    answer = AnswerText(STYLES["alpaca"], stop=["STOP"])
    assert [answer.add(piece) for piece in (b" One", b" two", b" S", b"T", b"ART", b".", b" ")] == [
        *("One", " two", "", "", " START", ".", "")
    ]
    assert answer.finish() == ""


def test_bytes_that_are_no_text_become_the_replacement_character():
    broken = [b"a\xff", b"b\xe6\x9d", b"c", b"\xf0\x9f"]
    assert "".join(read(AnswerText(), broken)) == b"".join(broken).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),  # the first in the text
        ("one two three", ["wo th"], "one t"),
        ("aaab", ["aab"], "a"),  # its beginning may repeat
        ("ababac", ["abac"], "ab"),
        ("one two", ["two!"], "one two"),  # begun, but not finished
        ("one", ["one"], ""),
        ("x🙂y", ["🙂"], "x"),
        ("a\n\nb", ["\n\n"], "a"),
        ("abcd", ["bcd", "abc"], ""),  # the earlier place, though found later
    ],
)
def test_stop_strings(text, stop, expected):
    for seed in range(10):
        pieces = pieces_of(text, random.Random(seed))
        answer = AnswerText(stop=stop)
        shown = read(answer, pieces)
        assert "".join(shown) == expected
        assert answer.stopped is (expected != text)


def test_a_stop_string_is_looked_for_in_what_is_shown():
    style = dataclasses.replace(STYLES["alpaca"], header_in_prompt=False)
    answer = AnswerText(style, stop=["\n\n"])
    shown = read(answer, [b"\n\n### Response:\n", b"\n\nfirst \n", b"\nsecond"])
    assert ("".join(shown), answer.stopped) == ("first", True)


def test_nothing_comes_after_a_stop():
    answer = AnswerText(stop=["."])
    assert [answer.add(b"a."), answer.add(b"b"), answer.finish()] == ["a", "", ""]


def test_a_style_of_ones_own_with_a_long_closing_mark():
    style = PromptStyle(
        instruction="{instruction}", input="{input}", header=":", end="\n</answer>\n"
    )
    for text in ("yes\n</answer>\n", "yes\n</ans", "</answer> no"):
        shown = read(AnswerText(style), pieces_of(text, random.Random(1)))
        assert "".join(shown) == style.extract(text)
