"""A responses file is the chapter's, in what it holds and in how it is written.

Entries that have no wanted answer are refused, or left out as the run says.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import Entry, read_entries, split_entries
from lightning_sft.runs.responses import (
    RESPONSES_NAME,
    Response,
    read_responses,
    write_responses,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with five answers, to two of which no output is known."""
    records = [
        {"instruction": f"Do {n}", "output": "" if n in (1, 4) else "x", "model_response": "y"}
        for n in range(5)
    ]
    (tmp_path / RESPONSES_NAME).write_text(json.dumps(records))
    return tmp_path


def test_blank_outputs_are_refused_or_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="entry 1: 'output' is blank; a score needs"):
        read_responses(folder)
    answers = read_responses(folder, empty_output="skip")
    assert [answer.entry.instruction for answer in answers] == ["Do 0", "Do 2", "Do 3"]
    path = folder / RESPONSES_NAME
    said = f"{path}: 2 entries with an empty output are left out: 1, 4\n"
    assert capsys.readouterr().out == said
    (folder / RESPONSES_NAME).write_text(path.read_text().replace('"x"', '""'))
    with pytest.raises(InputError, match="the 'output' of every entry is blank"):
        read_responses(folder, empty_output="skip")


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ("data: {empty_output: skip}", 3),
        ("data: {empty_output: error}", None),
        ("data: {}", None),
        ("data: 5", None),
        ("[", None),
        ("", None),
    ],
)
def test_the_runs_own_config_decides(folder: Path, config: str, count: int | None) -> None:
    (folder / "config.yaml").write_text(config)
    if count is None:
        with pytest.raises(InputError, match="entry 1: 'output' is blank"):
            read_responses(folder)
    else:
        assert len(read_responses(folder)) == count
        with pytest.raises(InputError, match="entry 1: 'output' is blank"):
            read_responses(folder, empty_output="error")


def test_the_books_file_is_written_to_the_byte(tmp_path):
    """From the book's data and the book's answers comes the book's file."""
    data = os.environ.get("LIGHTNING_SFT_BOOK_DATA")
    if not data:
        pytest.skip("LIGHTNING_SFT_BOOK_DATA does not name the book's data")
    book = Path(data).with_name("instruction-data-with-response.json")
    entries = split_entries(read_entries(data)).test
    answers = [record["model_response"] for record in json.loads(book.read_text("utf-8"))]
    path = tmp_path / "responses.json"
    write_responses(path, map(Response, entries, answers))
    assert path.read_bytes() == book.read_bytes()
    assert "\\u" in path.read_text()  # not every text in it is ASCII


def test_what_is_written_is_as_json_dump_of_the_chapter_writes_it(tmp_path):
    entry = Entry("Translate 'naïve' to Japanese.", "", "ナイーブ 😀")
    path = tmp_path / "responses.json"
    write_responses(path, [Response(entry, "“naïve”\n")])
    record = {"instruction": entry.instruction, "input": "", "output": entry.output}
    with (tmp_path / "chapter.json").open("w") as file:
        json.dump([record | {"model_response": "“naïve”\n"}], file, indent=4)
    assert path.read_bytes() == (tmp_path / "chapter.json").read_bytes()
    assert read_responses(path) == [Response(entry, "“naïve”\n")]
