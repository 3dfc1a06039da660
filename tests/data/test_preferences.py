"""Pairs of preferences from the three kinds of records."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_sft import Conversation, Entry, Message
from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import read_entry_file
from lightning_sft.data.preferences import Pair, read_pairs

ASK, YES = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "yes"}
NO, SYSTEM = {"role": "assistant", "content": "no"}, {"role": "system", "content": "S"}
QUESTION = Entry("Q", "", "")


def write(path: Path, *records: object) -> Path:
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"prompt": "Q", "chosen": "yes", "rejected": "no"}, QUESTION),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, QUESTION),
        ({"prompt": [ASK], "chosen": "yes", "rejected": "no"}, QUESTION),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, QUESTION),
        ({"prompt": "Q", "chosen": [ASK, YES], "rejected": [ASK, NO]}, QUESTION),
        (
            {"instruction": "Q", "input": "I", "output": "o", "chosen": "yes", "rejected": "no"},
            Entry("Q", "I", ""),
        ),
        (
            {"chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, ASK, NO]},
            Conversation([Message("system", "S"), Message("user", "Q")]),
        ),
    ],
)
def test_pairs(record, question, tmp_path):
    [pair] = read_pairs(write(tmp_path / "p.json", record))
    assert pair == Pair(question, "yes", "no")
    chosen, rejected = pair.examples
    assert (chosen.output, rejected.output) == ("yes", "no")
    assert chosen.instruction == rejected.instruction == question.instruction
    assert chosen.input == question.input


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Q", "chosen": "yes", "rejected": ""},
         "'rejected' is blank; it must hold an answer"),
        ({"prompt": "Q", "chosen": "yes"},
         "'rejected' is missing (it has 'prompt', 'chosen'); data.field_names maps other names"),
        ({"chosen": "yes", "rejected": "no"},
         "'prompt' is missing (it has 'chosen', 'rejected'); data.field_names maps other names"),
        ({"chosen": [ASK, YES], "rejected": [SYSTEM, ASK, NO]},
         "'chosen' and 'rejected' answer different conversations; they may differ in their last "
         "message alone"),
        ({"chosen": [ASK], "rejected": [ASK, NO]}, "'chosen' must end with an assistant's message"),
        ({"prompt": [ASK, YES], "chosen": "yes", "rejected": "no"},
         "'prompt' must end with what is to be answered"),
        ({"prompt": [], "chosen": "yes", "rejected": "no"},
         "prompt: is empty; it must hold at least one message"),
        (5, "is a number; it must be an object"),
    ],
)  # fmt: skip
def test_what_is_refused(record, message, tmp_path):
    good = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    path = write(tmp_path / "p.json", good, record)
    with pytest.raises(InputError) as error:
        read_pairs(path)
    assert str(error.value) == f"{path}: entry 1: {message}"


def test_other_names_and_other_files(tmp_path):
    record = {"q": "Q", "good": "yes", "bad": "no"}
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    path = write(tmp_path / "p.json", record)
    assert read_pairs(path, field_names=names) == [Pair(QUESTION, "yes", "no")]
    with pytest.raises(InputError, match="in the format instruction; preferences need chosen and"):
        read_pairs(path)


def test_supervised_fine_tuning_says_what_to_do_with_them(tmp_path):
    record = {"instruction": "Q", "output": "o", "chosen": "yes", "rejected": "no"}
    path = write(tmp_path / "p.json", record)
    with pytest.raises(InputError, match="holds preferences"):
        read_entry_file(path, format="auto")
    assert read_entry_file(path, format="instruction").entries == [Entry("Q", "", "o")]


def test_the_books_own():
    data = os.environ.get("LIGHTNING_SFT_BOOK_DATA")
    path = Path(data).with_name("instruction-data-with-preference.json") if data else None
    if path is None or not path.exists():
        pytest.skip("needs the book's preference file beside the chapter's")
    pairs = read_pairs(path)
    assert len(pairs) == 1100
    assert sum(pair.chosen == pair.rejected for pair in pairs) == 6
