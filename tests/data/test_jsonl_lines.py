"""A large JSONL file read line by line: the same entries and the same complaints as a small one."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.data import jsonl_lines
from lightning_sft.data.config import DataConfig
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.data.entries import Entry, read_entry_file
from lightning_sft.data.jsonl_lines import JoinedEntries, LineEntries, join_entries

GOOD = '{"instruction": "Name a colour.", "input": "", "output": "Blue."}'
OTHER = '{"instruction": "Größe?", "input": "x\u2028y", "output": "klein"}'


@pytest.fixture
def stream(monkeypatch):
    """`stream(path)` reads as of a large file, `stream(path, False)` as of a small one."""

    def read(path: Path, is_large: bool = True, **settings: Any) -> Any:
        monkeypatch.setattr(jsonl_lines, "STREAM_FROM", 0 if is_large else 1 << 40)
        return read_entry_file(path, **{"format": "auto"} | settings)

    return read


def write(tmp_path: Path, content: str | bytes, name: str = "large.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def complaint(read: Any, path: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        read(path, **settings)
    return str(error.value)


MESSAGES = '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}'
MESSAGES += ', {"role": "user", "content": "R"}, {"role": "assistant", "content": "S"}]}'


@pytest.mark.parametrize(
    "content",
    [
        f"{GOOD}\n{OTHER}\n{GOOD}\n",
        f"\ufeff{GOOD}\r\n\r\n \u00a0\n{OTHER}\r\n{GOOD}",
        f"{MESSAGES}\n{MESSAGES}\n",
        GOOD,
    ],
    ids=["plain", "mark, blank lines, no end", "conversations", "one"],
)
def test_the_entries_are_those_of_a_small_file(tmp_path, stream, content):
    path = write(tmp_path, content)
    large, small = stream(path).entries, stream(path, False).entries
    assert isinstance(large, LineEntries)
    assert isinstance(small, list)
    assert list(large) == small
    assert [large[k] for k in range(-len(small), len(small))] == small + small
    assert list(large[1:]) == small[1:]
    with pytest.raises(IndexError):
        large[len(small)]


@pytest.mark.parametrize(
    "bad",
    [
        '{"instruction": "i", "output": }',
        '{"instruction": "i", "output": "a", "output": "b"}',
        '{"instruction": "i", "output": "a", "x": [{"b": 1, "b": 1}]}',
        '{"instruction": 5, "output": "a"}',
        '{"instruction": "i", "output": " "}',
        '{"instruction": "i"}',
        "[1]",
        '{"instruction": "\\ud800", "output": "a"}',
        '{"x": ' + "[" * 100_000 + "}",
    ],
)
def test_the_first_bad_line_is_named_as_in_a_small_file(tmp_path, stream, bad):
    path = write(tmp_path, f"{GOOD}\n\n{OTHER}\n{bad}\n{GOOD}\n")
    message = complaint(stream, path)
    assert message == complaint(stream, path, is_large=False)
    assert ("line 4" in message) or ("entry 2" in message) or ("within an entry" in message)
    path.write_text(f"{GOOD}\n{bad}\n{{broken\n")  # a worse one behind it changes nothing
    assert "line 3" not in complaint(stream, path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode() + b"\n" + b'{"instruction": "\xff"}\n',
        b'{\n  "data": [1, 2]\n}\n',
        b"{broken\n{broken\n",
    ],
    ids=["a byte", "one object", "no JSON"],
)
def test_files_that_are_no_jsonl(tmp_path, stream, content):
    path = write(tmp_path, content, "large.json")
    assert complaint(stream, path) == complaint(stream, path, is_large=False)


def test_a_lone_object_needs_the_name(tmp_path, stream):
    path = write(tmp_path, GOOD, "large.json")
    assert complaint(stream, path) == complaint(stream, path, is_large=False)


def test_what_is_left_out_keeps_its_number(tmp_path, stream):
    blank = '{"instruction": "i", "output": ""}'
    path = write(tmp_path, f"{GOOD}\n{blank}\n{OTHER}\n{blank}\n")
    found = stream(path, empty_output="skip")
    assert found.skipped == [1, 3]
    assert list(found.entries) == stream(path, False, empty_output="skip").entries
    only_blank = write(tmp_path, f"{blank}\n{blank}\n", "blank.jsonl")
    assert "every entry is blank" in complaint(stream, only_blank, empty_output="skip")


def test_a_misspelt_input_is_found_behind_all_lines(tmp_path, stream):
    path = write(tmp_path, f"{GOOD}\n{OTHER}\n")
    for is_large in (True, False):
        message = complaint(stream, path, is_large=is_large, field_names={"input": "inputt"})
        assert "did you mean 'input'?" in message


@pytest.mark.parametrize("change", ["longer", "other", "gone"])
def test_a_file_that_is_changed_meanwhile_is_refused(tmp_path, stream, change):
    path = write(tmp_path, f"{GOOD}\n{OTHER}\n")
    entries = stream(path).entries
    assert entries[0] == Entry("Name a colour.", "", "Blue.")
    if change == "longer":
        path.write_text(f"{GOOD}\n{OTHER}\n{GOOD}\n")
    elif change == "other":
        path.write_text(f"{OTHER}\n{GOOD}\n")
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    message = complaint(lambda entries: entries[1], entries)
    assert "was changed" in message or "No such file" in message


def test_parts_of_several_files_are_one_sequence(tmp_path, stream):
    one = stream(write(tmp_path, f"{GOOD}\n{OTHER}\n")).entries
    held = [Entry("a", "", "b")]
    joined = join_entries([one, [], held, one[1:]])
    assert isinstance(joined, JoinedEntries)
    every = [*one, *held, *one[1:]]
    assert list(joined) == every
    assert [joined[k] for k in range(len(every))] == every
    assert joined[-1] == every[-1]
    for begin in range(5):
        for end in range(begin, 5):
            assert list(joined[begin:end]) == every[begin:end]
    assert list(pickle.loads(pickle.dumps(joined))) == every  # as processes get it
    assert join_entries([held, held]) == held + held


def test_splits_are_cut_as_ever_and_held_by_nobody(tmp_path, stream, monkeypatch):
    lines = [json.dumps({"instruction": f"i{k}", "output": f"o{k}"}) for k in range(40)]
    path = write(tmp_path, "\n".join(lines))
    own = write(tmp_path, f"{GOOD}\n", "val.jsonl")
    monkeypatch.setattr(jsonl_lines, "STREAM_FROM", 0)
    large = DataConfig(str(path), val_path=str(own)).read().splits
    monkeypatch.setattr(jsonl_lines, "STREAM_FROM", 1 << 40)
    small = DataConfig(str(path), val_path=str(own)).read().splits
    assert not any(isinstance(part, list) for part in large)
    assert [list(part) for part in large] == [list(part) for part in small]


def test_training_and_answering_see_what_they_see_of_a_small_file(tmp_path, monkeypatch):
    lines = [
        json.dumps({"instruction": f"i{k}" * (k % 5 + 1), "output": f"o{k}"}) for k in range(60)
    ]
    path = write(tmp_path, "\n".join(lines))
    seen = []
    for threshold in (0, 1 << 40):
        monkeypatch.setattr(jsonl_lines, "STREAM_FROM", threshold)
        data = InstructionDataModule(str(path), share_prefix=True, mask_prompt=True)
        data.setup("fit")
        assert isinstance(data.split("train"), list) is (threshold > 0)
        batches = [*data.train_dataloader(), *data.val_dataloader()]
        prompts = [batch["prompts"] for batch in data.predict_dataloader()]
        seen.append((batches, prompts, data.rows("train").fingerprint(), data.split("val")[0]))
    (batches, *rest), (expected, *expected_rest) = seen
    assert rest == expected_rest
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(torch.as_tensor(batch[k]), torch.as_tensor(other[k])) for k in other)
