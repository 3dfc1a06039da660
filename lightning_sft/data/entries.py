"""Records → `Entry` objects, and the three splits of them.

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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_sft.common.arguments import nearest
from lightning_sft.common.errors import InputError
from lightning_sft.data.records import (
    BOOK_DATA_URL,
    KNOWN_SHA256,
    is_url,
    local_path,
    read_records,
    type_name,
)

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

FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True, slots=True)
class Entry:
    """One instruction-response pair. `input` may be empty; the other two say something."""

    instruction: str
    input: str
    output: str


class Splits(NamedTuple):
    """The three parts of a data set, each in file order."""

    train: list[Entry]
    test: list[Entry]
    val: list[Entry]


class EntryFile(NamedTuple):
    """What one file holds: its entries, and the places in the file of those left out."""

    entries: list[Entry]
    skipped: list[int]


def read_entries(
    path: str | Path,
    *,
    field_names: Mapping[str, str] | None = None,
    require_output: bool = True,
) -> list[Entry]:
    """Read instruction data from JSON (a list of objects) or JSONL (an object per line).

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
    return read_entry_file(path, field_names=field_names, empty_output=empty_output).entries


def read_entry_file(
    path: str | Path,
    *,
    field_names: Mapping[str, str] | None = None,
    empty_output: Literal["error", "skip", "keep"] = "error",
) -> EntryFile:
    """`read_entries`, with a choice of what becomes of entries whose output is empty.

    Args:
        empty_output: Refuse them, leave them out and say where they were, or keep them; only with
            `keep` may a record lack the field altogether.

    Raises:
        InputError: As `read_entries`; also where every entry was left out.
    """
    names = _field_names(field_names)
    source = local_path(path)
    records = read_records(source)
    _check_input_name(records, names["input"], source)
    # Entries are numbered by their place in the file, those that are left out included.
    entries: list[Entry] = []
    skipped: list[int] = []
    for index, record in enumerate(records):
        where = f"{source}: entry {index}"
        entry = _entry(record, names, where, may_lack_output=empty_output == "keep")
        if entry.output.strip() or empty_output == "keep":
            entries.append(entry)
        elif empty_output == "skip":
            skipped.append(index)
        else:
            raise InputError(
                f"{where}: {names['output']!r} is blank; training needs an answer "
                "(data.empty_output: skip leaves such entries out)"
            )
    if not entries:
        raise InputError(f"{source}: the {names['output']!r} of every entry is blank")
    return EntryFile(entries, skipped)


def split_entries(
    entries: Sequence[Entry],
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
        train=list(entries[:num_train]),
        test=list(entries[num_train : num_train + num_test]),
        val=list(entries[num_train + num_test :]),  # with what the rounding left
    )
    for name, part in zip(Splits._fields, splits, strict=True):
        if not part and name not in may_be_empty:
            raise InputError(
                f"fractions: {list(fractions)} of {len(entries)} entries leave the {name} split "
                "empty; give more entries or other fractions"
            )
    return splits


def _field_names(field_names: Mapping[str, str] | None) -> dict[str, str]:
    """The file's name of each of the three fields."""
    names = dict(zip(FIELDS, FIELDS, strict=True))
    for field, name in (field_names or {}).items():
        if field not in names:  # as {context: input}, the wrong way round
            raise InputError(f"field_names: unknown field {field!r}; allowed: {', '.join(FIELDS)}")
        names[field] = name
    return names


def _check_input_name(records: list[Any], name: str, source: Path) -> None:
    """A record may lack its input, so a misspelt name for it would empty all inputs silently."""
    objects = [record for record in records if isinstance(record, dict)]
    if name == "input" or not objects or any(name in record for record in objects):
        return
    keys = list(objects[0])
    raise InputError(
        f"{source}: data.field_names calls the input {name!r}, which no entry has"
        f"{nearest(name, keys)}; entry 0 has {', '.join(map(repr, keys[:6])) or 'no keys'}"
    )


def _entry(record: Any, names: dict[str, str], where: str, may_lack_output: bool) -> Entry:
    """One record, checked but for an empty output."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: is a {type_name(record)}; it must be an object")
    instruction = _text(record, names["instruction"], where)
    if not instruction.strip():
        raise InputError(f"{where}: {names['instruction']!r} is blank; it must hold text")
    lacks_output = may_lack_output and names["output"] not in record
    return Entry(
        instruction,
        input=_text(record, names["input"], where) if names["input"] in record else "",
        output="" if lacks_output else _text(record, names["output"], where),
    )


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        present = ", ".join(repr(name) for name in list(record)[:6]) or "no keys"
        raise InputError(
            f"{where}: {key!r} is missing (it has {present}); data.field_names maps other names"
        )
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is a {type_name(value)}; it must be text")
    try:
        # JSON can spell half a character, as in "\ud800"; no tokenizer or file can hold it.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {key!r} has a lone surrogate at character {error.start}, which no UTF-8 "
            "text can hold"
        ) from None
    return value
