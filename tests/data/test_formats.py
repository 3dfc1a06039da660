"""Files of other programs: the same conversations from all of them; what is wrong with others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sft import Conversation, Entry, Message
from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig
from lightning_sft.data.entries import read_entries, read_entry_file

ENTRIES = [
    Entry("Spell it right.", "freind", "friend"),
    Entry('Say "yes", or no;\nthen stop.', "", "yes,\nno"),
    Entry("Grüße auf 日本語 🙂", "\ttab", "こんにちは"),
]
TALKS = [
    Conversation(
        [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho")]
    ),
    Conversation(
        [
            Message("user", "1 + 1?"), Message("assistant", "3", train=False),
            Message("user", "No."), Message("assistant", "2", weight=0.5),
        ]
    ),
    Entry("Plain.", "", "Plain answer."),
]  # fmt: skip


def as_records(entries: list[Entry]) -> list[dict[str, str]]:
    return [
        {"instruction": entry.instruction, "input": entry.input, "output": entry.output}
        for entry in entries
    ]


def as_messages(role: str = "role", content: str = "content", **names: str) -> list[dict[str, Any]]:
    """`TALKS` as records, in a file's own names for roles."""
    records = []
    for talk in TALKS:
        talk = talk.conversation if isinstance(talk, Entry) else talk
        turns = []
        for message in talk.messages:
            turn: dict[str, Any] = {role: names.get(message.role, message.role)}
            turn[content] = message.content
            if message.train is not None:
                turn["train"] = message.train
            if message.weight != 1:
                turn["weight"] = message.weight
            turns.append(turn)
        records.append({"messages": turns})
    return records


def read(path: Path, format: str = "auto", **settings: Any) -> list[Any]:
    return read_entry_file(path, format=format, **settings).entries


def write_json(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records), "utf-8")
    return path


def refuse(path: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        read(path, **settings)
    text = str(error.value)
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


# --- the same from all ---


def write_pandas_csv(folder: Path) -> Path:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(as_records(ENTRIES)).to_csv(folder / "a.csv", index=False)
    return folder / "a.csv"


def write_pandas_tsv(folder: Path) -> Path:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(as_records(ENTRIES)).to_csv(folder / "a.tsv", index=False, sep="\t")
    return folder / "a.tsv"


def write_spreadsheet(folder: Path) -> Path:
    """As Excel saves it: a byte-order mark, and CRLF between rows but not within cells."""
    cells = [["instruction", "input", "output"]]
    cells += [[e.instruction, e.input, e.output] for e in ENTRIES]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    text = "\ufeff" + "".join(",".join(row) + "\r\n" for row in quoted)
    (folder / "b.csv").write_bytes(text.encode())
    return folder / "b.csv"


def write_parquet(folder: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = arrow.Table.from_pylist(as_records(ENTRIES))
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def write_saved_folder(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(as_records(ENTRIES))
    made.save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def write_gz(folder: Path) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in as_records(ENTRIES))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder / "a.jsonl.gz"


def write_zst(folder: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    with arrow.CompressedOutputStream(str(folder / "a.json.zst"), "zstd") as file:
        file.write(json.dumps(as_records(ENTRIES)).encode())
    return folder / "a.json.zst"


def write_packed_csv(folder: Path) -> Path:
    (folder / "c.csv.gz").write_bytes(gzip.compress(write_spreadsheet(folder).read_bytes()))
    return folder / "c.csv.gz"


@pytest.mark.parametrize(
    "write",
    [
        write_pandas_csv, write_pandas_tsv, write_spreadsheet, write_parquet, write_saved_folder,
        write_gz, write_zst, write_packed_csv,
    ],
)  # fmt: skip
def test_the_same_entries_from_every_kind_of_file(write, tmp_path):
    path = write(tmp_path)
    assert read(path) == read_entries(path) == ENTRIES


def test_the_same_conversations_from_every_format(tmp_path):
    pytest.importorskip("datasets")
    import datasets

    messages = as_messages()
    sharegpt = [
        {"conversations": record["messages"]}
        for record in as_messages("from", "value", user="human", assistant="gpt")
    ]
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(messages).save_to_disk(saved)
    datasets.Dataset.from_list(sharegpt).to_parquet(tmp_path / "s.parquet")
    datasets.Dataset.from_list(messages).to_json(tmp_path / "m.jsonl")
    cells = [{"messages": json.dumps(record["messages"])} for record in messages]
    paths = [
        write_json(tmp_path / "m.json", messages),
        write_json(tmp_path / "s.json", sharegpt),
        write_json(tmp_path / "c.json", [{"conversations": r["messages"]} for r in messages]),
        write_json(tmp_path / "cells.json", cells),
        saved,
        tmp_path / "s.parquet",
        tmp_path / "m.jsonl",
    ]
    for path in paths:
        assert read(path) == TALKS, path


def test_prompts_and_completions(tmp_path):
    ask, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    more = {"role": "user", "content": "R"}
    records = [
        {"prompt": "Q", "completion": "A"},
        {"prompt": [ask], "completion": [answer]},
        {"prompt": [ask, answer, more], "completion": "B"},
    ]
    given = Message("assistant", "A", train=False)
    talk = Conversation(
        [Message("user", "Q"), given, Message("user", "R"), Message("assistant", "B")]
    )
    entry = Entry("Q", "", "A")
    assert read(write_json(tmp_path / "p.json", records)) == [entry, entry, talk]


def test_field_names_for_every_format(tmp_path):
    for record, names in (
        ({"q": "Q", "a": "A"}, {"instruction": "q", "output": "a"}),
        ({"q": "Q", "a": "A"}, {"prompt": "q", "completion": "a"}),
        (
            {"dialog": [{"who": "human", "what": "Q"}, {"who": "gpt", "what": "A"}]},
            {"conversations": "dialog", "from": "who", "value": "what"},
        ),
        (
            {"dialog": [{"who": "user", "what": "Q"}, {"who": "assistant", "what": "A"}]},
            {"messages": "dialog", "role": "who", "content": "what"},
        ),
    ):
        path = write_json(tmp_path / "named.json", [record])
        assert read(path, field_names=names) == [Entry("Q", "", "A")], names


def test_what_a_file_was_taken_for_is_said(tmp_path):
    def said(path: Path, format: str = "auto") -> list[str]:
        lines: list[str] = []
        read_entry_file(path, format=format, say=lines.append)
        return lines

    path = write_json(tmp_path / "m.json", as_messages())
    end = "3 records in the format messages"
    assert said(path) == [f"{path}: JSON, {end} (recognised by its fields)"]
    assert said(path, "messages") == [f"{path}: JSON, {end} (as data.format says)"]
    path = write_spreadsheet(tmp_path)
    assert said(path) == [f"{path}: CSV, 3 records in the format instruction (recognised by its "
                          "fields)"]  # fmt: skip
    path = write_json(tmp_path / "i.json", as_records(ENTRIES))
    assert said(path) == []  # what it always was
    data = DataConfig(str(write_json(tmp_path / "m.json", as_messages() * 10)))
    assert len(data.read().notes) == 1


def test_entries_that_hold_more_stay_entries(tmp_path):
    """A file that was read before is not another one for a column beside the three."""
    record = as_records(ENTRIES)[0] | {"messages": [], "prompt": "x", "completion": "y"}
    assert read(write_json(tmp_path / "more.json", [record])) == [ENTRIES[0]]


# --- what is wrong ---

ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ASK, {"role": "critic", "content": "x"}],
         "messages[1].role: unknown role 'critic'; allowed: system, user, assistant, tool"),
        ([ASK, ANSWER, ANSWER],
         "messages[2].role: two assistant turns running; join them, or put user or tool between"),
        ([], "messages: is empty; it must hold at least one message"),
        ([ASK, {"role": "assistant", "content": ""}],
         "messages[1].content: is blank; it must hold text"),
        ([ASK, {"role": "assistant"}],
         "messages[1]: 'content' is missing (it has 'role'); data.field_names maps other names"),
        ([ASK, {"role": "assistant", "content": None}],
         "messages[1]: 'content' is a null; it must be text"),
        ([ASK, {"role": "assistant", "content": "", "tool_calls": [{}]}],
         "messages[1].tool_calls: only text is supported; give what the assistant wrote as "
         "content"),
        ([{"role": "user", "content": [{"type": "image"}]}],
         "messages[0].content[0]: only parts of type text are supported"),
        ([ASK, 5], "messages[1]: is a number; it must be an object"),
        ("Q", "'messages' is a text; it must be a list of messages"),
        ("[Q", "'messages' is text that is no valid JSON"),
        ([ASK, ANSWER | {"train": "no"}], "messages[1].train: 'no' is not allowed; true or false"),
        ([ASK], "has no assistant's message; training needs an answer (data.empty_output: skip "
                "leaves such entries out)"),
    ],
)  # fmt: skip
def test_bad_messages(messages, message, tmp_path):
    good = {"messages": [ASK, ANSWER]}
    path = write_json(tmp_path / "m.json", [good, {"messages": messages}])
    assert refuse(path) == f"entry 1: {message}"


def test_errors_speak_in_the_files_own_names(tmp_path):
    turns = [{"from": "human", "value": "Q"}, {"from": "narrator", "value": "x"}]
    path = write_json(tmp_path / "s.json", [{"conversations": turns}])
    assert refuse(path).startswith("entry 0: conversations[1].from: unknown role 'narrator'; ")


def test_parts_of_text_are_joined(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": t} for t in ("Q", "R")]}
    path = write_json(tmp_path / "m.json", [{"messages": [parts, ANSWER]}])
    assert read(path) == [Entry("QR", "", "A")]


def test_unanswered_conversations_may_be_left_out(tmp_path):
    path = write_json(tmp_path / "m.json", [{"messages": [ASK]}, {"messages": [ASK, ANSWER]}])
    found = read_entry_file(path, format="auto", empty_output="skip")
    assert found == ([Entry("Q", "", "A")], [0])
    assert len(read(path, empty_output="keep")) == 2
    blank = {"role": "assistant", "content": " "}
    path = write_json(
        tmp_path / "m.json", [{"messages": [ASK, blank]}, {"messages": [ASK, ANSWER]}]
    )
    assert read_entry_file(path, format="auto", empty_output="skip") == found
    assert refuse(path) == "entry 0: messages[1].content: is blank; it must hold text"
    path = write_json(tmp_path / "m.json", [{"messages": [ASK]}])
    assert refuse(path, empty_output="skip") == "no entry has an assistant's message"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 fields where the header has 2; quote fields that hold the "
                              "separator or line ends"),
        ('a,b\n"x\ny",2\n\n1\n', "line 5: 1 fields where the header has 2; quote fields that hold "
                                 "the separator or line ends"),
        ('a,b\n"x,2\n', "line 2: not valid as a table (unexpected end of data)"),
        ("a,a\n1,2\n", "line 1: the column 'a' is there twice; keep one of them"),
        ("a,\n1,2\n", "line 1: column 2 has no name"),
        ("a,b\r\n", "there is no row behind the header"),
        ("\n", "the file is empty; it must hold a row of names and a record"),
        ("a,b\n1,\xff", "byte 6 is not valid UTF-8; save the file as UTF-8"),
    ],
)  # fmt: skip
def test_bad_csv(text, message, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode("latin-1"))
    assert refuse(path) == message


def test_a_long_field_is_read_and_others_keep_their_limit(tmp_path):
    import csv

    path, before = tmp_path / "long.csv", csv.field_size_limit()
    path.write_text(f"instruction,output\n{'x' * (before + 1)},y\n")
    assert read(path) == [Entry("x" * (before + 1), "", "y")]
    assert csv.field_size_limit() == before


def test_a_corrupt_parquet_file(tmp_path):
    path = write_parquet(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1" + bytes(100) + b"PAR1", whole[:-40]):
        path.write_bytes(damaged)
        assert refuse(path).startswith("cannot be read as parquet (")
    # A nested field that is missing in some records is missing there.
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        arrow.Table.from_pylist([{"instruction": "i", "output": "o", "input": None}]), path
    )
    assert read(path) == [Entry("i", "", "o")]


def test_a_damaged_folder(tmp_path):
    folder = write_saved_folder(tmp_path)
    (folder / "data-00001-of-00002.arrow").unlink()
    assert refuse(folder) == "the file data-00001-of-00002.arrow is missing"
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../secret"}]}')
    assert "'../secret' is not a file's name" in refuse(folder)
    (tmp_path / "plain").mkdir()
    assert refuse(tmp_path / "plain").startswith("not a regular file")


def test_a_folder_of_splits_asks_for_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(as_records(ENTRIES))
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    assert refuse(tmp_path / "both").startswith("holds the splits test, train; give the folder of")
    assert read(tmp_path / "both" / "train") == ENTRIES


def test_damaged_and_endless_packed_files(tmp_path, monkeypatch):
    path = write_gz(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    assert refuse(path).startswith("cannot be unpacked (")
    path = write_zst(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    assert refuse(path)
    monkeypatch.setattr(files, "MOST", 1000)
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b" " * 3_000_000))
    assert refuse(bomb) == "is over 1,000 bytes once it is unpacked"


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    import sys

    paths = [write_parquet(tmp_path), write_zst(tmp_path)]
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in paths:
        assert "needs pyarrow: pip install" in refuse(path)


def test_an_unknown_format(tmp_path):
    path = write_json(tmp_path / "m.json", as_records(ENTRIES))
    allowed = "auto, instruction, messages, sharegpt, prompt_completion, preference"
    with pytest.raises(InputError, match=f"format: unknown 'chat'; allowed: {allowed}"):
        read(path, format="chat")
    with pytest.raises(InputError, match=r"data\.format: unknown 'chat'; allowed: auto"):
        DataConfig(str(path), format="chat")
    assert refuse(path, format="messages").startswith("entry 0: 'messages' is missing (it has ")
    with pytest.raises(InputError, match="unknown field 'input'; allowed: messages, role, content"):
        read(path, format="messages", field_names={"input": "x"})
