"""The shipped data set: what the script writes, well-formed, true, and fair to examine by.

pytest tests/test_quickstart_data.py
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from calendar import month_name
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "configs" / "quickstart.json"


def load_script():
    spec = importlib.util.spec_from_file_location(
        "make_quickstart_data", ROOT / "scripts" / "make_quickstart_data.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()
ITEMS = script.build()
# Cut as `split_entries` cuts, in file order.
N_TRAIN, N_TEST = int(len(ITEMS) * 0.85), int(len(ITEMS) * 0.10)
TRAIN, TEST, VAL = ITEMS[:N_TRAIN], ITEMS[N_TRAIN : N_TRAIN + N_TEST], ITEMS[N_TRAIN + N_TEST :]


def facts(kind: str) -> list[list[str]]:
    found = sorted({item.fact for item in ITEMS if item.kind == kind})
    assert found, f"no facts of kind {kind}"
    return [fact.split(" / ") for fact in found]


def unfair(train, held) -> list[str]:
    """Held-out items that a model could not know, or has been told outright."""
    wordings, subjects, asked = defaultdict(set), defaultdict(set), set()
    for item in train:
        wordings[item.kind, item.fact].add(item.wording)
        subjects[item.kind, item.wording].add(item.fact)
        asked.add((item.entry["instruction"], item.entry["input"]))
    found = []
    for item in held:
        if len(wordings[item.kind, item.fact] - {item.wording}) < 2:
            found.append(f"fact too rare in train: {item.fact}")
        if not subjects[item.kind, item.wording] - {item.fact}:
            found.append(f"wording not in train: {item.wording}")
        if (item.entry["instruction"], item.entry["input"]) in asked:
            found.append(f"question is in train: {item.entry}")
    return found


# -- The file --


def test_script_writes_the_shipped_file_byte_for_byte(tmp_path):
    path = tmp_path / "quickstart.json"
    script.main([str(path)])
    assert path.read_bytes() == SHIPPED.read_bytes()


def test_another_seed_gives_another_order_of_the_same_entries():
    other = script.build(seed=7)
    assert other != ITEMS
    assert sorted(map(str, other)) == sorted(map(str, ITEMS))


def test_file_reads_as_entries_in_the_layout_of_the_chapter():
    text = SHIPPED.read_text(encoding="utf-8")
    entries = json.loads(text)
    assert entries == [item.entry for item in ITEMS]
    assert text == json.dumps(entries, indent=4, ensure_ascii=False)
    for entry in entries:
        assert list(entry) == ["instruction", "input", "output"]
        assert entry["instruction"]
        assert entry["output"]
        for value in entry.values():
            assert value == value.strip()
            assert "  " not in value
            assert not set("{}<\n") & set(value)


def test_size_kinds_and_share_of_entries_with_input():
    assert 1000 <= len(ITEMS) <= 2000
    assert len({item.kind for item in ITEMS}) >= 12
    with_input = sum(bool(item.entry["input"]) for item in ITEMS)
    assert 0.25 < with_input / len(ITEMS) < 0.75


def test_no_question_is_asked_twice():
    counts = Counter((item.entry["instruction"], item.entry["input"]) for item in ITEMS)
    assert [question for question, count in counts.items() if count > 1] == []


# -- The examination --


def test_held_out_questions_are_new_but_their_facts_and_wordings_are_known():
    assert unfair(TRAIN, TEST + VAL) == []


def test_every_kind_is_in_every_split():
    kinds = {item.kind for item in ITEMS}
    for split in (TRAIN, TEST, VAL):
        assert {item.kind for item in split} == kinds


def test_fairness_check_notices_a_leak_a_lost_fact_and_a_lost_wording():
    item = TEST[0]
    assert any("in train" in line for line in unfair([*TRAIN, item], [item]))
    without_fact = [other for other in TRAIN if other.fact != item.fact]
    assert any("too rare" in line for line in unfair(without_fact, [item]))
    without_wording = [other for other in TRAIN if other.wording != item.wording]
    assert any("wording not" in line for line in unfair(without_wording, [item]))


def test_a_held_out_subject_is_spelt_in_train_as_in_its_question():
    """GPT-2's tokenizer tells " bear" from "bear"; a fact must have been met in the form asked."""

    def follows_space(item) -> bool:
        """Whether the first field comes after a space, not after a quote or at a line's start."""
        return re.search(r"(.)\{", item.wording.replace("< ", "<"))[1] == " "

    met = {(item.kind, item.fact, follows_space(item)) for item in TRAIN}
    for item in TEST + VAL:
        assert (item.kind, item.fact, follows_space(item)) in met


def test_validation_starts_with_a_sentence_put_into_the_passive():
    assert VAL[0].entry == {
        "instruction": "Rewrite the sentence in the passive voice.",
        "input": "The chef prepares the soup every evening.",
        "output": "The soup is prepared by the chef every evening.",
    }


# -- The facts --

# Smaller units per larger one, as in any table of measures.
FACTORS = {
    ("kilometers", "meters"): 1000,
    ("meters", "centimeters"): 100,
    ("centimeters", "millimeters"): 10,
    ("kilograms", "grams"): 1000,
    ("liters", "milliliters"): 1000,
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
    ("days", "hours"): 24,
    ("weeks", "days"): 7,
    ("years", "months"): 12,
}


def test_conversions_are_right_and_asked_about_the_same_amount():
    for item in (item for item in ITEMS if item.kind == "conversion"):
        amount, unit, result, target = re.fullmatch(
            r"(\d+) (\w+) is (\d+) (\w+)\.", item.entry["output"]
        ).groups()
        assert int(result) == int(amount) * FACTORS[unit, target]
        assert f"{amount} {unit}" in item.entry["instruction"]
        assert target in item.entry["instruction"]


def test_squares_are_right():
    for item in (item for item in ITEMS if item.kind == "square"):
        number, square = map(int, re.findall(r"\d+", item.entry["output"]))
        assert square == number**2
        assert re.search(rf"\b{number}\b", item.entry["instruction"])


def test_roman_numerals_are_right():
    values = dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))
    for roman, number in facts("roman numeral"):
        digits = [values[sign] for sign in roman]
        later = [*digits[1:], 0]
        total = sum(-d if d < after else d for d, after in zip(digits, later, strict=True))
        assert total == int(number)


def test_number_words_are_right():
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    ones = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for number, words in facts("number word"):
        ten, one = words.split("-")
        assert 10 * (tens.index(ten) + 2) + ones.index(one) + 1 == int(number)


def test_months_are_counted_in_the_known_order():
    # fmt: off
    ordinals = ["first", "second", "third", "fourth", "fifth", "sixth",
                "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]
    # fmt: on
    expected = zip(ordinals, month_name[1:], strict=True)
    assert sorted(map(list, expected)) == facts("month")


@pytest.mark.parametrize("kind", ["spelling", "antonym", "synonym", "past tense"])
def test_answer_differs_from_the_word_asked_about(kind):
    for word, answer in facts(kind):
        assert word != answer


def test_no_correct_spelling_is_listed_as_a_mistake():
    rows = facts("spelling")
    assert not {wrong for wrong, _ in rows} & {correct for _, correct in rows}
    for wrong, correct in rows:
        # One or two letters lost, added, or swapped: the same word, not another.
        assert abs(len(wrong) - len(correct)) <= 1
        assert wrong[0] == correct[0]


def test_passive_keeps_its_verb_and_agrees_with_its_object():
    for _, verb, thing, _, passive in facts("passive"):
        be, participle = passive.split()
        assert be == ("are" if thing.endswith("s") else "is")
        assert participle[:2] == verb[:2]


def test_question_has_the_words_of_its_statement():
    for statement, question in facts("question"):
        assert sorted(re.findall(r"\w+", statement.lower())) == sorted(
            re.findall(r"\w+", question.lower())
        )
        assert statement.endswith(".")
        assert question.endswith("?")


def test_contraction_shortens_the_words_it_stands_for():
    for full, short in facts("contraction"):
        start, apostrophe, _ = short.partition("'")
        assert apostrophe
        assert full == "will not" or full.startswith(start.removesuffix("n"))
        assert len(short) < len(full)


def test_every_answer_is_a_sentence():
    for item in ITEMS:
        assert re.fullmatch(r"""['"]?[A-Z0-9].*[.?]""", item.entry["output"]), item
