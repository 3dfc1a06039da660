"""Instruction files into entries and splits; what is wrong is said in one line with its place."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.common import downloads, files
from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import (
    BOOK_DATA_URL,
    Entry,
    is_url,
    local_path,
    read_entries,
    read_entry_file,
    read_records,
    split_entries,
)

RECORD = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
ENTRY = Entry("Name a colour.", "", "Blue.")
NOT_A_LIST = "it must be a list of entries ([{…}, …]) or one entry per line"


@pytest.fixture
def write(tmp_path):
    """`write(content, name)` → path of a file with this text, bytes or JSON value."""

    def write_file(content: Any, name: str = "data.json") -> Path:
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def refusal(path: Path | str, **settings: Any) -> str:
    """The message of the InputError, without the file's name that opens it."""
    with pytest.raises(InputError) as error:
        read_entries(path, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# --- Formats ---


def test_json_and_jsonl_give_the_same_entries(write):
    other = {"instruction": "Say hi.", "input": "politely", "output": "Good day."}
    expected = [ENTRY, Entry("Say hi.", "politely", "Good day.")]
    records = [RECORD, other]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    assert read_entries(write(records)) == expected
    assert read_entries(str(write(json.dumps(records, indent=4)))) == expected
    assert read_entries(write(lines, "data.jsonl")) == expected
    assert read_entries(write(lines, "data.json")) == expected  # seen in the text, not the name
    assert read_entries(write(records, "data.jsonl")) == expected
    assert read_entries(write(lines.replace("\n", "\r\n\r\n"), "data.jsonl")) == expected
    assert read_entries(write(lines.rstrip("\n"), "data.jsonl")) == expected


def test_one_line_of_jsonl_is_one_entry(write):
    assert read_entries(write(RECORD, "one.jsonl")) == [ENTRY]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_byte_order_mark_is_accepted(write, name):
    line = json.dumps(RECORD)
    content = f"[{line}]" if name == "data.json" else f"{line}\n{line}\n"
    expected = read_entries(write(content, f"plain-{name}"))
    assert read_entries(write(b"\xef\xbb\xbf" + content.encode(), name)) == expected


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line_of_jsonl(write, separator):
    record = {"instruction": f"one{separator}two", "output": "x"}
    line = json.dumps(record, ensure_ascii=False)
    assert len(line.splitlines()) == 2  # what a careless reader would cut it into
    entries = read_entries(write(f"{line}\n{line}\n", "data.jsonl"))
    assert entries == [Entry(f"one{separator}two", "", "x")] * 2


def test_what_may_be_missing(write):
    bare = {"instruction": "Name a colour."}
    assert read_entries(write([bare | {"output": "Blue."}])) == [ENTRY]  # no input means ""
    assert read_entries(write([RECORD | {"extra": 5}])) == [ENTRY]
    for record in (bare, bare | {"output": ""}, bare | {"output": " \n"}):
        entries = read_entries(write([record]), require_output=False)
        assert entries == [Entry("Name a colour.", "", record.get("output", ""))]
        refusal(write([record]))  # training needs an answer


def test_end_of_text_and_header_in_the_text_are_plain_text(write):
    text = "Why <|endoftext|> and ### Response: here?"
    assert read_entries(write([RECORD | {"instruction": text}]))[0].instruction == text


def test_entries_cannot_be_changed():
    with pytest.raises(AttributeError):
        ENTRY.output = "Red."


# --- Names of fields ---

DOLLY = {"instruction": "i", "context": "c", "response": "r", "category": "open_qa"}
DOLLY_NAMES = {"input": "context", "output": "response"}


def test_field_names(write):
    path = write([DOLLY, {"instruction": "i", "response": "r"}])
    assert read_entries(path, field_names=DOLLY_NAMES) == [
        Entry("i", "c", "r"),
        Entry("i", "", "r"),
    ]
    own = {"frage": "i", "instruction": "not this", "antwort": "r"}
    names = {"instruction": "frage", "output": "antwort"}
    assert read_entries(write([own]), field_names=names) == [Entry("i", "", "r")]


def test_field_names_that_do_not_fit(write):
    path = write([DOLLY])
    assert refusal(path) == (
        "entry 0: 'output' is missing (it has 'instruction', 'context', 'response', 'category'); "
        "data.field_names maps other names"
    )
    assert refusal(path, field_names={"output": "answer"}).startswith(
        "entry 0: 'answer' is missing"
    )
    with pytest.raises(InputError) as error:
        read_entries(path, field_names={"prompt": "instruction"})
    assert str(error.value) == (
        "field_names: unknown field 'prompt'; allowed: instruction, input, output"
    )


def test_messages_use_the_files_own_names(write):
    path = write([{"instruction": "i", "context": 5, "response": "r"}])
    assert refusal(path, field_names=DOLLY_NAMES) == (
        "entry 0: 'context' is a number; it must be text"
    )


def test_a_misspelt_name_for_the_input(write):
    """A record may lack its input, so nothing else would notice that all inputs are empty."""
    path = write([{"instruction": "i", "response": "r"}, DOLLY])
    read_entries(path, field_names=DOLLY_NAMES)  # control: one record has it
    assert refusal(path, field_names=DOLLY_NAMES | {"input": "reponse"}) == (
        "data.field_names calls the input 'reponse', which no entry has (did you mean "
        "'response'?); entry 0 has 'instruction', 'response'"
    )
    assert read_entries(write([RECORD]), field_names={"input": "input"}) == [ENTRY]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(
    ("line", "where"),
    [
        ('{"instruction": "i", "output": "a", "output": "b"}', "entry 1: the key 'output'"),
        (
            '{"instruction": "i", "output": "a", "x": [{"b": 1, "c": 2, "b": 1}]}',
            "an object within an entry: the key 'b'",
        ),
    ],
)
def test_a_key_that_is_there_twice(write, name, line, where):
    lines = [json.dumps(RECORD), line, json.dumps(RECORD)]
    text = f"[{', '.join(lines)}]" if name == "data.json" else "\n".join(lines)
    assert refusal(write(text, name)) == f"{where} is there twice; keep one of them"


def test_empty_outputs_may_be_left_out(write):
    records = [RECORD, RECORD | {"output": ""}, RECORD | {"output": " \n"}, RECORD]
    path = write(records)
    assert read_entry_file(path, empty_output="skip") == ([ENTRY, ENTRY], [1, 2])
    kept = read_entry_file(path, empty_output="keep")
    assert (len(kept.entries), kept.skipped) == (4, [])
    assert refusal(path).startswith("entry 1: 'output' is blank")
    # An empty answer is one thing, a record of another shape another.
    with pytest.raises(InputError, match="entry 0: 'output' is missing"):
        read_entry_file(write([{"instruction": "i"}]), empty_output="skip")
    with pytest.raises(InputError, match="the 'output' of every entry is blank"):
        read_entry_file(write(records[1:3]), empty_output="skip")


# --- Files that are not what they should be ---


def test_files_that_are_no_files(tmp_path):
    missing = tmp_path / "missing.json"
    assert refusal(missing) == "no such file; give a JSON or JSONL file, or a URL"
    assert refusal(tmp_path) == "not a regular file; give a JSON or JSONL file, or a URL"
    assert refusal(os.devnull) == "not a regular file; give a JSON or JSONL file, or a URL"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refusal(pipe).startswith("not a regular file")  # reading it would never end


@pytest.mark.parametrize(
    "path",
    ["a" * 300, "~no-such-user-here/data.json", "a\0b", "", "http://["],
    ids=["too long", "no such user", "zero byte", "empty", "bad address"],
)
def test_paths_that_no_system_can_open(path):
    with pytest.raises(InputError) as error:
        read_entries(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty; it must hold a list of entries"),
        (" \n\t\n", "the file is empty; it must hold a list of entries"),
        (b"\xef\xbb\xbf", "the file is empty; it must hold a list of entries"),
        ("[]", "the list is empty; it must hold at least one entry"),
        ("5", f"the top level is one number; {NOT_A_LIST}"),
        ("true", f"the top level is one boolean; {NOT_A_LIST}"),
        ("null", f"the top level is one null; {NOT_A_LIST}"),
        ('"text"', f"the top level is one text; {NOT_A_LIST}"),
        ('{\n"data": [\n]}', f"the top level is one JSON value; {NOT_A_LIST}"),
        ("not JSON", "line 1, column 1: not valid JSON (Expecting value)"),
        ('[\n  {"a": 1}\n  {}]', "line 3, column 3: not valid JSON (Expecting ',' delimiter)"),
        ('[{"a": "x" "y"}]', "line 1, column 12: not valid JSON (Expecting ',' delimiter)"),
        ('{"a": 1}\n\n{"a": }', "line 3, column 7: not valid JSON (Expecting value)"),
        ('{"a": 1} {"a": 2}\n', "line 1, column 10: not valid JSON (Extra data)"),
        (b'[{"a": "\xff"}]', "byte 8 is not valid UTF-8; save the file as UTF-8"),
        (b'{"a": 1}\n{"\xc3\xa4": "\xe4"}', "byte 17 is not valid UTF-8; save the file as UTF-8"),
        (
            json.dumps([RECORD]).encode("utf-16"),
            "byte 0 is not valid UTF-8; save the file as UTF-8",
        ),
    ],
    ids=repr,
)
def test_malformed_files(write, name, content, message):
    assert refusal(write(content, name)) == message


def test_the_offset_of_a_bad_byte_counts_the_byte_order_mark(write):
    assert refusal(write(b"\xef\xbb\xbf[\xff")).startswith("byte 4 is not valid UTF-8")


def test_an_object_at_the_top(write):
    assert refusal(write(RECORD)) == f"the top level is one object; {NOT_A_LIST}"
    assert refusal(write({"data": [RECORD]})) == f"the top level is one object; {NOT_A_LIST}"


def test_json_that_would_break_the_parser(write):
    deep = refusal(write("[" * 100_000))
    assert deep.startswith("not usable as JSON (")
    deep = refusal(write('{"a":' * 100_000, "deep.jsonl"))
    assert deep.startswith("line 1: not usable as JSON (")
    assert refusal(write("[" + "1" * 5000 + "]")).startswith(
        "not usable as JSON (Exceeds the limit"
    )


# --- Records that are not what they should be ---


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (5, "is a number; it must be an object"),
        ([RECORD], "is a list; it must be an object"),
        (None, "is a null; it must be an object"),
        (
            {"output": "x"},
            "'instruction' is missing (it has 'output'); data.field_names maps other names",
        ),
        ({}, "'instruction' is missing (it has no keys); data.field_names maps other names"),
        (
            {"instruction": "x"},
            "'output' is missing (it has 'instruction'); data.field_names maps other names",
        ),
        (RECORD | {"instruction": None}, "'instruction' is a null; it must be text"),
        (RECORD | {"input": None}, "'input' is a null; it must be text"),
        (RECORD | {"input": {}}, "'input' is a object; it must be text"),
        (RECORD | {"output": 7.5}, "'output' is a number; it must be text"),
        (RECORD | {"output": True}, "'output' is a boolean; it must be text"),
        (RECORD | {"output": ["a"]}, "'output' is a list; it must be text"),
        (RECORD | {"instruction": " \t"}, "'instruction' is blank; it must hold text"),
        (
            RECORD | {"output": ""},
            "'output' is blank; training needs an answer (data.empty_output: skip leaves such "
            "entries out)",
        ),
        (
            RECORD | {"output": "ab\ud800"},
            "'output' has a lone surrogate at character 2, which no UTF-8 text can hold",
        ),
    ],
    ids=repr,
)
def test_bad_records_are_named(write, name, record, message):
    """Two good records before it, so that the index is not right by chance."""
    records = [RECORD, RECORD, record, RECORD]
    text = json.dumps(records)
    if name == "data.jsonl":
        text = "".join(json.dumps(each) + "\n" for each in records)
    assert refusal(write(text, name)) == f"entry 2: {message}"
    read_entries(write(text.replace(json.dumps(record), json.dumps(RECORD)), name))  # control


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
RECORDS = st.dictionaries(
    st.sampled_from(["instruction", "input", "output", "x"]), SCALARS | st.just([]), max_size=4
)


def read_or_refuse(path: Path) -> None:
    """Nothing but an InputError may come out, and what is read is fit for training."""
    try:
        entries = read_entries(path)
    except InputError as error:
        message = str(error)
    else:
        message = f"{path}: {len(entries)} entries"
        assert all(e.instruction.strip() and e.output.strip() for e in entries)
        "".join(e.instruction + e.input + e.output for e in entries).encode()
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


ALMOST_JSON = st.text('[]{}",:1e-\\ud80\n\r\ufeff\u2028 x').map(str.encode)


@given(content=st.binary(max_size=60) | ALMOST_JSON)
def test_arbitrary_bytes_are_read_or_refused(write, content):
    read_or_refuse(write(content))
    read_or_refuse(write(content, "data.jsonl"))


@given(records=st.lists(RECORDS | SCALARS, max_size=4), as_lines=st.booleans())
def test_arbitrary_json_is_read_or_refused(write, records, as_lines):
    if as_lines:
        read_or_refuse(write("\n".join(map(json.dumps, records)), "data.jsonl"))
    else:
        read_or_refuse(write(records))


@given(texts=st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=1, max_size=3))
def test_good_text_comes_back_unchanged(write, texts):
    expected = [Entry(f"a{a}", b, f"{c}c") for a, b, c in texts]
    records = [dataclasses.asdict(entry) for entry in expected]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    assert read_entries(write(json.dumps(records, ensure_ascii=False))) == expected
    assert read_entries(write(lines, "data.jsonl")) == expected


def test_read_records_does_not_validate(write):
    assert read_records(write([1, {"a": None}])) == [1, {"a": None}]


# --- Addresses ---


def test_is_url():
    assert is_url("http://a/b.json")
    assert is_url("https://a/b.json")
    assert not is_url("data.json")
    assert not is_url(Path("https:/data.json"))
    assert not is_url("ftp://a/b.json")


def test_a_url_is_downloaded_into_the_cache(monkeypatch, tmp_path):
    asked = []

    def download(url: str, path: Path, **settings: Any) -> Path:
        asked.append((url, path, settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([RECORD]))
        return path

    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "download", download)
    assert read_entries("https://a.example/x/data.json?token=1") == [ENTRY]
    assert read_entries("https://b.example/data.json") == [ENTRY]
    assert local_path("https://a.example/") == asked[-1][1]
    places = [path.relative_to(tmp_path / "cache" / "data") for _, path, _ in asked]
    assert [place.name for place in places] == ["data.json"] * 3
    assert len({place.parent for place in places}) == 3  # addresses that end alike stay apart
    assert [settings for _, _, settings in asked] == [{"sha256": None, "check": read_records}] * 3


def test_a_cached_file_is_used_without_a_request(monkeypatch, tmp_path):
    """The guard of conftest.py fails this test on any request; so does the control below."""
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path / "cache"))
    url = "https://a.example/data.json"
    with pytest.raises(pytest.fail.Exception, match=r"reaches for a\.example"):
        read_entries(url)
    place = next((tmp_path / "cache" / "data").iterdir())  # the folder that the attempt made
    (place / "data.json").write_text(json.dumps([RECORD]))
    assert read_entries(url) == [ENTRY]
    (place / "data.json").write_text("[5]")
    with pytest.raises(InputError, match=r"data\.json: entry 0: is a number"):
        read_entries(url)


def test_the_chapters_own_file_is_pinned(monkeypatch, book_data_path):
    seen = {}
    monkeypatch.setattr(
        downloads, "download", lambda url, path, **settings: seen.update(settings) or book_data_path
    )
    assert len(read_entries(BOOK_DATA_URL)) == 1100
    assert seen["sha256"] == files.sha256_of(book_data_path)


# --- Splits ---


def numbered(count: int) -> list[Entry]:
    return [Entry(f"i{number}", "", "o") for number in range(count)]


def test_the_chapters_split(book_entries):
    """Listing 7.3, as the book has it."""
    train_portion = int(len(book_entries) * 0.85)
    test_portion = int(len(book_entries) * 0.1)
    splits = split_entries(book_entries)
    assert [len(part) for part in splits] == [935, 110, 55]
    assert splits.train == book_entries[:train_portion]
    assert splits.test == book_entries[train_portion : train_portion + test_portion]
    assert splits.val == book_entries[train_portion + test_portion :]


@pytest.mark.parametrize(
    ("count", "fractions", "sizes"),
    [
        (20, (0.85, 0.10, 0.05), [17, 2, 1]),
        (39, (0.85, 0.10, 0.05), [33, 3, 3]),  # rounded down twice; validation takes the rest
        (10, [0.5, 0.3, 0.2], [5, 3, 2]),
        (3, (1 / 3, 1 / 3, 1 / 3), [1, 1, 1]),
    ],
)
def test_split_sizes(count, fractions, sizes):
    entries = numbered(count)
    splits = split_entries(entries, fractions)
    assert [len(part) for part in splits] == sizes
    assert [*splits.train, *splits.test, *splits.val] == entries


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.8, 0.2), "[0.8, 0.2] is not three numbers between 0 and 1"),
        ((1.0, 0.0, 0.0), "[1.0, 0.0, 0.0] is not three numbers between 0 and 1"),
        ((1.2, -0.1, -0.1), "[1.2, -0.1, -0.1] is not three numbers between 0 and 1"),
        ((float("nan"), 0.5, 0.5), "[nan, 0.5, 0.5] is not three numbers between 0 and 1"),
        ((85, 10, 5), "[85, 10, 5] is not three numbers between 0 and 1"),
        ((0.8, 0.1, 0.05), "[0.8, 0.1, 0.05] sum to 0.95, not to 1"),
    ],
)
def test_fractions_that_are_no_shares(fractions, message):
    with pytest.raises(InputError) as error:
        split_entries(numbered(100), fractions)
    assert str(error.value) == f"fractions: {message}"


@pytest.mark.parametrize(
    ("count", "fractions", "name"),
    [
        (1, (0.9, 0.05, 0.05), "train"),
        (9, (0.85, 0.1, 0.05), "test"),
        (10, (0.5, 0.5, 5e-7), "val"),
    ],
)
def test_an_empty_split_is_refused(count, fractions, name):
    with pytest.raises(InputError) as error:
        split_entries(numbered(count), fractions)
    assert str(error.value) == (
        f"fractions: {list(fractions)} of {count} entries leave the {name} split empty; "
        "give more entries or other fractions"
    )
