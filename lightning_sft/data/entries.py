"""Files → `Entry` and `Conversation` objects, and the three splits of them.

An entry is one instruction-response pair of the chapter's file: `instruction`, an optional `input`
and the wanted `output`. Whatever is wrong with a record is said in one line that names the file,
the record and what is allowed; nothing is skipped silently.

    >>> entries = read_entries("instruction-data.json")
    >>> train, test, val = split_entries(entries)

Source: listings 7.1 (load) and 7.3 (partition) of "Build a Large Language Model (From Scratch)".
This module does not import torch.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Entry, Example, as_entry
from lightning_sft.data.formats import (
    FORMATS,
    check_input_name,
    describe_format,
    recognise,
    settle_names,
)
from lightning_sft.data.hub_dataset import is_dataset
from lightning_sft.data.jsonl_lines import LineRecords, is_streamed
from lightning_sft.data.records import (
    BOOK_DATA_URL,
    KNOWN_SHA256,
    is_url,
    local_path,
    read_records,
)
from lightning_sft.data.shapes import is_answered, shape

__all__ = [
    "BOOK_DATA_URL",
    "KNOWN_SHA256",
    "Entry",
    "EntryFile",
    "Splits",
    "is_url",
    "local_path",
    "read_entries",
    "read_entry_file",
    "read_records",
    "split_entries",
]


_PLAIN_SUFFIXES = (".json", ".jsonl")  # instruction data in such a file needs no line about it


class Splits(NamedTuple):
    """The three parts of a data set, each in file order."""

    train: Sequence[Example]
    test: Sequence[Example]
    val: Sequence[Example]


class EntryFile(NamedTuple):
    """What one file holds: its entries, and the places in the file of those left out.

    Those of a large JSONL file are read when they are asked for.
    """

    entries: Sequence[Example]
    skipped: list[int]


def read_entries(
    path: str | Path,
    *,
    field_names: Mapping[str, str] | None = None,
    require_output: bool = True,
) -> list[Entry]:
    """Read instruction data from a file or table whose records are entries.

    Args:
        path: A file, or an http(s) URL that is downloaded once into the cache.
        field_names: Where the file calls a field otherwise, the file's name for it, for example
            `{"input": "context", "output": "response"}` for Dolly.
        require_output: Refuse empty outputs, as training needs. Answering does not.

    Raises:
        InputError: The file is missing, empty or malformed, or a record is; names the record.
        ServiceError: The URL could not be fetched.
    """
    empty_output: Literal["error", "keep"] = "error" if require_output else "keep"
    read = read_entry_file(path, field_names=field_names, empty_output=empty_output)
    return [as_entry(entry) for entry in read.entries]


def read_entry_file(
    path: str | Path,
    *,
    field_names: Mapping[str, str] | None = None,
    empty_output: Literal["error", "skip", "keep"] = "error",
    format: str = "instruction",
    say: Callable[[str], None] | None = None,
) -> EntryFile:
    """`read_entries` for any format, with a choice of what becomes of entries without an answer.

    Args:
        empty_output: Refuse them, leave them out and say where they were, or keep them; only with
            `keep` may a record lack the field altogether.
        format: One of `FORMATS`; with auto the records say it.
        say: Told in one line what the file was taken for, where that is not plain instruction data.

    Raises:
        InputError: As `read_entries`; also where every entry was left out, or the file holds
            preferences.
    """
    if format not in FORMATS:
        raise InputError(f"data.format: unknown {format!r}; allowed: {', '.join(FORMATS)}")
    # Names that no format has are refused before anything is fetched.
    if format == "instruction":
        settle_names(format, (), field_names)
    source = local_path(path)
    records = LineRecords(source) if is_streamed(source) else read_records(source)
    shown = path if is_dataset(path) else source  # a folder of the cache says nothing to anybody
    is_told = format != "auto"
    format = format if is_told else recognise(records, field_names)
    if format == "preference":
        raise InputError(
            f"{shown}: holds preferences (chosen and rejected), which supervised fine-tuning does "
            "not learn from; --config dpo.yaml does, and data.format: instruction takes the "
            "instruction, input and output"
        )
    names = settle_names(format, records, field_names)
    if "input" in names:
        check_input_name(records, names["input"], source)

    def tell(count: int) -> None:
        if say is not None and (format != "instruction" or source.suffix not in _PLAIN_SUFFIXES):
            say(f"{shown}: {describe_format(source, count, format, is_told)}")

    if not isinstance(records, LineRecords):
        tell(len(records))  # before anything is found wrong with one of them
    # Entries are numbered by their place in the file, those that are left out included.
    entries: list[Example] = []
    begins = array("q")  # of a large file the place of each entry is kept instead
    skipped: list[int] = []
    index, keep, may_be_blank = -1, empty_output == "keep", empty_output != "error"
    for index, (begin, record) in enumerate(_located(records)):
        where = f"{shown}: entry {index}"
        entry = shape(record, format, names, where, may_lack_answer=keep, may_be_blank=may_be_blank)
        if is_answered(entry) or keep:
            if isinstance(records, LineRecords):
                begins.append(begin)
            else:
                entries.append(entry)
        elif empty_output == "skip":
            skipped.append(index)
        else:
            raise InputError(
                f"{where}: {_lack(format, names)}; training needs an answer "
                "(data.empty_output: skip leaves such entries out)"
            )
    if not entries and not begins:
        raise InputError(f"{shown}: {_lack(format, names, every=True)}")
    if isinstance(records, LineRecords):
        tell(index + 1)
        return EntryFile(records.entries(begins, format, names, keep), skipped)
    return EntryFile(entries, skipped)


def _located(records: Sequence[Any] | LineRecords) -> Iterable[tuple[int, Any]]:
    """Each record with its place: in a large file where it begins, else its number."""
    return records.located() if isinstance(records, LineRecords) else enumerate(records)


def _lack(format: str, names: Mapping[str, str], *, every: bool = False) -> str:
    """What is missing of an entry without an answer, or of every entry."""
    key = {"instruction": "output", "prompt_completion": "completion"}.get(format)
    if key is None:
        return "no entry has an assistant's message" if every else "has no assistant's message"
    return f"the {names[key]!r} of every entry is blank" if every else f"{names[key]!r} is blank"


def split_entries(
    entries: Sequence[Example],
    fractions: Sequence[float] = (0.85, 0.10, 0.05),
    may_be_empty: Collection[str] = (),
) -> Splits:
    """Cut entries, in file order, into train, test and validation parts.

    The first two sizes are rounded down and validation takes the rest, as in the chapter: 1,100
    entries give 935, 110 and 55.

    Args:
        fractions: Shares of train, test and validation; they sum to 1.
        may_be_empty: Splits that have a file of their own and need no share.

    Raises:
        InputError: The fractions are not three shares that sum to 1, or a split stays empty.
    """
    # Not even 0 is a share: each split is asked for somewhere, the last one by the sample answers.
    if len(fractions) != 3 or not all(0 < share < 1 for share in fractions):
        raise InputError(f"fractions: {list(fractions)} is not three numbers between 0 and 1")
    if not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise InputError(f"fractions: {list(fractions)} sum to {sum(fractions):g}, not to 1")
    # Listing 7.3: no shuffling, so that the same file gives everyone the same three parts.
    num_train = int(len(entries) * fractions[0])
    num_test = int(len(entries) * fractions[1])
    splits = Splits(
        train=entries[:num_train],
        test=entries[num_train : num_train + num_test],
        val=entries[num_train + num_test :],  # with what the rounding left
    )
    for name, part in zip(Splits._fields, splits, strict=True):
        if not part and name not in may_be_empty:
            raise InputError(
                f"fractions: {list(fractions)} of {len(entries)} entries leave the {name} split "
                "empty; give more entries or other fractions"
            )
    return splits
