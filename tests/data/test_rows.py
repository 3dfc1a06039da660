"""Entries into ids: boundaries, length policies and the cache of large sets."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_sft.common.errors import InputError
from lightning_sft.common.files import sha256_of
from lightning_sft.data import token_cache, tokenizing
from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.entries import Entry
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.data.prompts import PromptStyle, get_style
from lightning_sft.data.rows import Row, TokenRows, fit_to_length, tokenize
from lightning_sft.data.segments import Masking
from lightning_sft.data.token_cache import tokenize_entries
from lightning_sft.data.token_files import ARRAYS
from lightning_sft.data.tokenizer import gpt2_tokenizer
from support.tiny_run import write_tokenizer

ALPACA = get_style("alpaca")
TERSE = PromptStyle(instruction="{instruction}", input="+{input}", header=">", end=".")


def as_tuples(rows: TokenRows) -> list[tuple[list[int], int, int]]:
    return [(list(map(int, row.ids)), row.prompt_length, row.index) for row in rows]


# --- Tokenizing ---


def test_a_row_can_be_read_off_its_text(char_tokenizer):
    row = tokenize(Entry("ab", "c", "de"), TERSE, char_tokenizer, index=7)
    assert row.ids == [ord(character) for character in "ab+c>de."]
    assert (row.prompt_length, row.index) == (5, 7)
    written = dataclasses.replace(TERSE, header_in_prompt=False)
    row = tokenize(Entry("ab", "c", "de"), written, char_tokenizer)
    assert row.ids == [ord(character) for character in "ab+c>de."]
    assert (row.prompt_length, row.index) == (4, 0)


def test_the_books_data_has_62025_tokens(book_entries):
    """The figure of the issue: alpaca, without end-of-text. Also the arrays' own sum."""
    rows = tokenize_entries(book_entries, ALPACA, gpt2_tokenizer())
    assert len(rows) == 1100
    assert sum(len(row.ids) for row in rows) == 62_025
    assert rows.lengths.sum() == len(rows.ids) == 62_025


@pytest.mark.parametrize("name", ["alpaca", "phi3", "chatml"])
def test_tokenized_apart_equals_tokenized_whole(book_entries, name):
    style, tokenizer = get_style(name), gpt2_tokenizer()
    for entry in book_entries:
        prompt, response = style.split(entry)
        row = tokenize(entry, style, tokenizer)
        assert row.ids == tokenizer.encode(prompt + response)
        assert tokenizer.decode(row.ids[: row.prompt_length]) == prompt


@pytest.mark.parametrize(("name", "num_different"), [("alpaca", 0), ("phi3", 0), ("chatml", None)])
def test_where_the_model_writes_the_header(book_entries, name, num_different):
    """Only chatml's closing mark merges with a full stop before it, as `tokenize` says."""
    style, tokenizer = get_style(name, header_in_prompt=False), gpt2_tokenizer()
    differ = [
        entry
        for entry in book_entries
        if tokenize(entry, style, tokenizer).ids != tokenizer.encode("".join(style.split(entry)))
    ]
    if num_different is None:
        assert differ
        assert all(style.split(entry)[0][-1] in ".?!'\")" for entry in differ)
    else:
        assert len(differ) == num_different


@pytest.mark.parametrize("answer", ["\n\nx", "\n \nx"])
def test_an_answer_that_opens_with_a_blank_line_keeps_its_boundary(answer):
    """Where GPT-2's splitting would join the header's newline with what follows."""
    tokenizer = gpt2_tokenizer()
    entry = Entry("i", "", answer)
    prompt, response = ALPACA.split(entry)
    row = tokenize(entry, ALPACA, tokenizer)
    assert row.ids != tokenizer.encode(prompt + response)  # control
    assert tokenizer.decode(row.ids[: row.prompt_length]) == prompt
    assert tokenizer.decode(row.ids[row.prompt_length :]) == response


def test_many_entries_are_tokenized_as_each_alone(book_entries, tmp_path):
    """Together, whichever tokenizer and style it is."""
    write_tokenizer(tmp_path, eos="<|im_end|>")
    cases = [("alpaca", gpt2_tokenizer()), ("chatml", gpt2_tokenizer())]
    cases += [("chatml", read_tokenizer(tmp_path)), ("llama3", read_tokenizer(tmp_path))]
    for name, tokenizer in cases:
        style = get_style(name)
        rows = tokenize_entries(book_entries, style, tokenizer)
        alone = [tokenize(entry, style, tokenizer, i) for i, entry in enumerate(book_entries)]
        assert as_tuples(rows) == [tuple(row)[:3] for row in alone]


# --- TokenRows ---


def test_token_rows_give_rows_back():
    rows = [Row([5, 6, 7], 2, 0), Row([], 0, 1), Row([8], 1, 5)]
    packed = TokenRows.from_rows(rows)
    assert len(packed) == 3
    assert as_tuples(packed) == [([5, 6, 7], 2, 0), ([], 0, 1), ([8], 1, 5)]
    assert packed.lengths.tolist() == [3, 0, 1]
    assert np.shares_memory(packed[0].ids, packed.ids)  # no copy per access
    assert as_tuples(packed.select(np.array([True, False, True]))) == [
        ([5, 6, 7], 2, 0),
        ([8], 1, 5),
    ]


@pytest.mark.parametrize(
    ("length", "prompt_length", "max_length", "all_targets", "answer_targets"),
    [
        (6, 2, 9, 6, 5),  # the end-of-text target makes up for the first token
        (6, 2, 6, 6, 5),
        (6, 2, 4, 4, 3),
        (6, 4, 4, 4, 1),  # the prompt's last position still predicts the first answer token
        (6, 5, 4, 4, 0),
        (6, 6, 9, 6, 1),  # an empty answer: end-of-text alone
        (6, 0, 9, 6, 6),
        (6, 1, 9, 6, 6),
    ],
)
def test_count_targets(length, prompt_length, max_length, all_targets, answer_targets):
    rows = TokenRows.from_rows([Row(list(range(length)), prompt_length)])
    assert rows.count_targets(max_length, mask_prompt=False).tolist() == [all_targets]
    assert rows.count_targets(max_length, mask_prompt=True).tolist() == [answer_targets]


def test_fingerprint_tells_sets_apart():
    rows = [Row([1, 2, 3], 1, 0), Row([4, 5], 1, 1)]
    same = TokenRows.from_rows(rows).fingerprint()
    assert TokenRows.from_rows(list(rows)).fingerprint() == same
    others = [
        rows[::-1],
        rows[:1],
        [Row([1, 2, 3], 2, 0), rows[1]],  # another prompt boundary
        [Row([1, 2], 1, 0), Row([3, 4, 5], 1, 1)],  # another boundary between rows
        [Row([1, 2, 9], 1, 0), rows[1]],
    ]
    prints = {TokenRows.from_rows(other).fingerprint() for other in others}
    assert len(prints) == len(others)
    assert same not in prints


# --- Length policies ---

LONG = [Row([1, 2, 3], 1, 0), Row([1, 2, 3, 4, 5], 2, 1), Row([1] * 9, 1, 2)]


def fit(rows: list[Row], max_length: int, overlong: str, mask_prompt: bool = False) -> TokenRows:
    return fit_to_length(
        TokenRows.from_rows(rows),
        max_length=max_length,
        overlong=overlong,
        mask_prompt=mask_prompt,
        where="train split",
    )


def test_overlong_rows():
    whole = as_tuples(TokenRows.from_rows(LONG))
    for policy in ("truncate", "drop", "error"):
        assert as_tuples(fit(LONG, 9, policy)) == whole  # a row of max_length tokens is not longer
    assert as_tuples(fit(LONG, 4, "truncate")) == whole  # cut where it is batched
    assert as_tuples(fit(LONG, 4, "drop")) == whole[:1]
    assert as_tuples(fit(LONG, 5, "drop")) == whole[:2]
    with pytest.raises(InputError) as error:
        fit(LONG, 4, "error")
    assert str(error.value) == (
        "train split: entry 1 has 5 tokens, more than max_length 4 (2 such entries); raise "
        "data.max_length or set data.overlong to truncate or drop"
    )
    with pytest.raises(InputError) as error:
        fit(LONG, 2, "drop")
    assert str(error.value) == "train split: every entry is longer than max_length 2"


def test_messages_name_the_entry_and_not_the_row():
    kept = fit(LONG, 5, "drop").select(np.array([False, True]))
    with pytest.raises(InputError, match="entry 1 has 5 tokens"):
        fit_to_length(kept, max_length=4, overlong="error", mask_prompt=False, where="x")


def test_a_row_without_a_target_is_named():
    rows = [Row([1, 2, 3], 1, 0), Row([1] * 9, 6, 4)]
    for max_length in (9, 7, 6):
        assert len(fit(rows, max_length, "truncate", mask_prompt=True)) == 2
    assert len(fit(rows, 5, "truncate", mask_prompt=False)) == 2
    with pytest.raises(InputError) as error:
        fit(rows, 5, "truncate", mask_prompt=True)
    assert str(error.value) == (
        "train split: entry 4 has no target left: its prompt of 6 tokens fills max_length 5; "
        "raise data.max_length or set data.overlong to drop"
    )
    assert len(fit(rows, 5, "drop", mask_prompt=True)) == 1  # as the message says


# --- The cache of large sets ---


class CountingTokenizer:
    """Says how often it was asked."""

    name, vocab_size, eos_token_id = "counting", 50257, 50256

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return [ord(character) for character in text]

    def decode(self, ids: object) -> str:
        raise NotImplementedError


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, used from two entries on; returns the folder of its token files."""
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "CACHE_FROM_ENTRIES", 2)
    return tmp_path / "tokens"


SET = [Entry("ab", "", "c"), Entry("d", "e", "f"), Entry("g", "", "é")]


def folders(cache) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_a_large_set_is_tokenized_once(cache):
    tokenizer = CountingTokenizer()
    first = tokenize_entries(SET, TERSE, tokenizer)
    assert tokenizer.calls == 6
    second = tokenize_entries(SET, TERSE, tokenizer)
    assert tokenizer.calls == 6
    expected = [tokenize(entry, TERSE, tokenizer, index) for index, entry in enumerate(SET)]
    for rows in (first, second):
        assert as_tuples(rows) == [(row.ids, row.prompt_length, row.index) for row in expected]
        assert rows.fingerprint() == TokenRows.from_rows(expected).fingerprint()
        assert isinstance(rows.ids, np.memmap)  # processes share it through the kernel
        assert not rows.ids.flags.writeable
    assert len(folders(cache)) == 1


def test_a_small_set_makes_no_file(cache):
    tokenize_entries(SET[:1], TERSE, CountingTokenizer())
    assert not cache.exists()
    tokenize_entries(SET[:2], TERSE, CountingTokenizer())
    assert cache.exists()


def test_an_unfinished_folder_is_made_anew(cache):
    tokenizer = CountingTokenizer()
    expected = as_tuples(tokenize_entries(SET, TERSE, tokenizer))
    folder = cache / folders(cache)[0]
    (folder / "ids.npy").write_bytes(b"\x93NUMPY torn")
    (folder / "done").unlink()
    assert as_tuples(tokenize_entries(SET, TERSE, tokenizer)) == expected
    assert tokenizer.calls == 12
    done = json.loads((folder / "done").read_text())
    assert done["rows"] == 3
    assert done["sha256"] == {name: sha256_of(folder / f"{name}.npy") for name in ARRAYS}
    tokenize_entries(SET, TERSE, tokenizer)
    assert tokenizer.calls == 12


@pytest.mark.parametrize("name", ARRAYS)
def test_a_damaged_file_is_made_anew(cache, name):
    """One flipped bit anywhere in a file: in its header, in its numbers, at its end."""
    tokenizer = CountingTokenizer()
    expected = as_tuples(tokenize_entries(SET, TERSE, tokenizer))
    path = cache / folders(cache)[0] / f"{name}.npy"
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 25), len(whole) - 1]:
        calls = tokenizer.calls
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert as_tuples(tokenize_entries(SET, TERSE, tokenizer)) == expected
        assert tokenizer.calls == calls + 6
        assert path.read_bytes() == whole


@pytest.mark.parametrize("done", ['{"rows": 3}', "", "[]", '{"sha256": {"ids": 5}}', "[" * 9_999])
def test_a_cache_without_good_digests_is_made_anew(cache, done):
    """Also that of the version that kept none."""
    tokenizer = CountingTokenizer()
    expected = as_tuples(tokenize_entries(SET, TERSE, tokenizer))
    (cache / folders(cache)[0] / "done").write_text(done)
    assert as_tuples(tokenize_entries(SET, TERSE, tokenizer)) == expected
    assert tokenizer.calls == 12


def test_done_is_written_last(cache, monkeypatch):
    """A kill between two files must not leave a folder that looks finished."""
    monkeypatch.setattr(tokenizing, "PART", 1)

    class Interrupted(CountingTokenizer):
        def encode(self, text: str) -> list[int]:
            if self.calls == 4:  # two parts are written by then
                raise KeyboardInterrupt
            return super().encode(text)

    with pytest.raises(KeyboardInterrupt):
        tokenize_entries(SET, TERSE, Interrupted())
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_what_a_killed_process_leaves_is_cleared(cache):
    tokenizer = CountingTokenizer()
    tokenize_entries(SET, TERSE, tokenizer)
    folder = cache / folders(cache)[0]
    (folder / "done").unlink()
    (folder / ".ids.npy.0a1b2c3d.tmp").write_bytes(b"half")
    tokenize_entries(SET, TERSE, tokenizer)
    names = {f"{name}.npy" for name in ARRAYS} | {"done"}
    assert {path.name for path in folder.iterdir()} == names


def test_parts_are_written_as_the_whole_is(cache, monkeypatch):
    monkeypatch.setattr(tokenizing, "PART", 2)
    talk = Conversation(
        (Message("user", "a"), Message("assistant", "b"), Message("user", "c"),
         Message("assistant", "d", weight=0.5))
    )  # fmt: skip
    entries = [*SET, talk, *SET, talk, talk]
    found = tokenize_entries(entries, TERSE, CountingTokenizer())
    whole = tokenizing.tokenize_part(entries, 0, TERSE, CountingTokenizer(), Masking())
    for name in ARRAYS:
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name
        assert getattr(found, name).dtype == getattr(whole, name).dtype
    places = np.array([5, 0, 0, len(whole) - 1, 3])
    taken, expected = whole.take(places), TokenRows.from_rows([whole[int(p)] for p in places])
    for name in ARRAYS:
        assert np.array_equal(getattr(taken, name), getattr(expected, name)), name


NAMED = dataclasses.replace(TERSE, name="other")
Change = Callable[[list[Entry], PromptStyle], tuple[list[Entry], PromptStyle]]


@pytest.mark.parametrize(
    "change",
    [
        lambda entries, style: (entries[::-1], style),
        lambda entries, style: (entries[:2], style),
        lambda entries, style: ([Entry("a", "", "bc"), *entries[1:]], style),
        lambda entries, style: ([Entry("ab", "c", ""), *entries[1:]], style),
        lambda entries, style: (entries, dataclasses.replace(style, header=">>")),
        lambda entries, style: (entries, dataclasses.replace(style, end="")),
        lambda entries, style: (entries, dataclasses.replace(style, header_in_prompt=False)),
    ],
    ids=["order", "number", "boundary", "field", "header", "end", "side of the header"],
)
def test_what_changes_the_rows_changes_the_file(cache, change: Change):
    tokenizer = CountingTokenizer()
    tokenize_entries(SET, TERSE, tokenizer)
    tokenize_entries(SET, NAMED, tokenizer)  # a name says nothing about the text
    assert len(folders(cache)) == 1
    entries, style = change(SET, TERSE)
    expected = [tokenize(entry, style, tokenizer, index) for index, entry in enumerate(entries)]
    actual = tokenize_entries(entries, style, tokenizer)
    assert as_tuples(actual) == [(row.ids, row.prompt_length, row.index) for row in expected]
    assert len(folders(cache)) == 2


def test_another_tokenizer_has_its_own_file(cache):
    tokenizer = CountingTokenizer()
    tokenize_entries(SET, TERSE, tokenizer)
    rows = tokenize_entries(SET, TERSE, gpt2_tokenizer())
    assert list(rows[0].ids) == gpt2_tokenizer().encode("ab>") + gpt2_tokenizer().encode("c.")
    assert len(folders(cache)) == 2


class SlowTokenizer(CountingTokenizer):
    """Notes in a file that processes share when it is asked, and takes its time."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes

    def encode(self, text: str) -> list[int]:
        with self.notes.open("a") as file:
            file.write("asked\n")
        time.sleep(0.05)
        return super().encode(text)


def tokenize_slowly(notes: Path) -> str:
    token_cache.CACHE_FROM_ENTRIES = 2  # in a process of its own, where the fixture has not been
    return tokenize_entries(SET, TERSE, SlowTokenizer(notes)).fingerprint()


def test_of_processes_at_once_one_tokenizes(cache, tmp_path):
    # Not forked: another thread of this process may hold a lock, which a copy would wait for.
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        prints = pool.map(tokenize_slowly, [tmp_path / "notes"] * 4, chunksize=1)
    assert (tmp_path / "notes").read_text().count("asked") == 6  # two texts an entry
    expected = [tokenize(entry, TERSE, CountingTokenizer(), i) for i, entry in enumerate(SET)]
    assert prints == [TokenRows.from_rows(expected).fingerprint()] * 4
    assert len(folders(cache)) == 1
