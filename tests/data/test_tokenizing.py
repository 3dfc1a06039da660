"""Entries tokenized by several processes: the same rows and first error, and nothing left over."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.data import jsonl_lines, tokenizing
from lightning_sft.data.conversation import Conversation, Entry, Message
from lightning_sft.data.entries import read_entry_file
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.data.prompts import get_style
from lightning_sft.data.segments import Masking
from lightning_sft.data.token_files import ARRAYS
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.data.tokenizing import tokenize_part, tokenize_parts
from support.tiny_run import write_tokenizer

pytestmark = pytest.mark.process

ENTRIES = [Entry(f"Say {k}. <|im_end|>", "ü" * (k % 3), f"It is {k} 🙂") for k in range(23)]
TALK = (Message("user", "a"), Message("assistant", "b"), Message("tool", "c"))
TALK += (Message("assistant", "d"),)


@pytest.fixture
def processes(monkeypatch):
    """Two processes for the smallest set, five entries a part; returns those that were started."""
    started = []

    class Watched(tokenizing._Process):
        def __init__(self, task):
            super().__init__(task)
            started.append(self._process)

    monkeypatch.setattr(tokenizing, "PART", 5)
    monkeypatch.setattr(tokenizing, "PROCESSES_FROM_ENTRIES", 1)
    monkeypatch.setattr(tokenizing, "count_cores", lambda: 2)
    monkeypatch.setattr(tokenizing, "_Process", Watched)
    return started


@pytest.mark.parametrize("kind", ["gpt2", "a model's own"])
def test_the_rows_are_those_of_one_process(processes, kind, tmp_path):
    style, tokenizer = get_style("alpaca"), gpt2_tokenizer()
    if kind != "gpt2":
        write_tokenizer(tmp_path)
        style, tokenizer = get_style("chatml"), read_tokenizer(tmp_path)
    whole = tokenize_part(ENTRIES, 0, style, tokenizer, Masking())
    parts = list(tokenize_parts(ENTRIES, style, tokenizer, Masking()))
    assert len(processes) == 2
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    rows = [row for part in parts for row in part]
    assert [row.index for row in rows] == list(range(23))
    for found, expected in zip(rows, whole, strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found[1:] == expected[1:]
    assert all(process.poll() is not None for process in processes)


def test_entries_that_stay_in_their_file_are_read_by_the_processes(
    processes, tmp_path, monkeypatch
):
    monkeypatch.setattr(jsonl_lines, "STREAM_FROM", 0)
    path = tmp_path / "data.jsonl"
    records = [{"instruction": f"Say {k}.", "output": f"It is {k}"} for k in range(12)]
    path.write_text("\n".join(map(json.dumps, records)))
    entries = read_entry_file(path).entries
    assert len(pickle.dumps(entries[:5])) < 1000
    task = get_style("alpaca"), gpt2_tokenizer(), Masking()
    parts = list(tokenize_parts(entries, *task))
    whole = tokenize_part(list(entries), 0, *task)
    assert len(processes) == 2
    assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
    for name in ARRAYS:
        assert getattr(parts[0], name).dtype == getattr(whole, name).dtype


def test_the_first_entry_that_has_no_place_is_named(processes):
    entries = [*ENTRIES[:7], Conversation(TALK), *ENTRIES, Conversation(TALK)]
    with pytest.raises(InputError, match=r"^entry 7: ") as error:
        list(tokenize_parts(entries, get_style("alpaca"), gpt2_tokenizer(), Masking()))
    assert "tool" in str(error.value)
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_a_process_that_dies_is_said_in_one_line(processes):
    parts = tokenize_parts(ENTRIES, get_style("alpaca"), gpt2_tokenizer(), Masking())
    next(parts)
    for process in processes:
        process.kill()
        process.wait()
    with pytest.raises(ServiceError, match="a process of it died"):
        list(parts)


def test_whoever_stops_asking_leaves_no_process(processes):
    parts = tokenize_parts(ENTRIES, get_style("alpaca"), gpt2_tokenizer(), Masking())
    next(parts)
    parts.close()
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_a_process_ends_with_its_parent(processes):
    tokenizing._Process((get_style("alpaca"), gpt2_tokenizer(), Masking()))
    [process] = processes
    process.stdin.close()  # as the kernel does for a parent that was killed
    assert process.wait(timeout=60) == 0
    process.stdout.close()


class Words:
    """A tokenizer of somebody else's, which another process might not have."""

    name, vocab_size, eos_token_id = "words", 100, 99

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def test_somebody_elses_tokenizer_stays_in_this_process(processes):
    parts = list(tokenize_parts(ENTRIES, get_style("alpaca"), Words(), Masking()))
    assert not processes
    assert sum(map(len, parts)) == 23


def test_a_tokenizer_is_the_same_in_another_process(tmp_path):
    write_tokenizer(tmp_path)
    own = read_tokenizer(tmp_path)
    copy = pickle.loads(pickle.dumps(own))
    assert copy.name == own.name
    assert copy.encode("<|im_end|>") == own.encode("<|im_end|>")  # text, not the special token
    assert (copy.eos_token_id, copy.bos_token_id) == (own.eos_token_id, own.bos_token_id)
    assert copy.chat_template == own.chat_template
    assert pickle.loads(pickle.dumps(gpt2_tokenizer())) is gpt2_tokenizer()
