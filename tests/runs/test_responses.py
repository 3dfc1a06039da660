"""A responses file is the chapter's, in what it holds and in how it is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_sft.data.entries import Entry, read_entries, split_entries
from lightning_sft.runs.responses import Response, read_responses, write_responses


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
