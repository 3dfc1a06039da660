"""A JSONL file that is read line by line, for files that are too large to be held.

`LineRecords` reads the records one after another; what is wrong with the first bad line is said as
for a small file. `LineEntries` are the entries of such a file: 8 bytes each, the place where its
line begins, from which the text is read when it is asked for.

    >>> records = LineRecords(Path("large.jsonl"))
    >>> next(iter(records))
    {'instruction': 'Spell it right.', 'input': 'freind', 'output': 'friend'}

This module does not import torch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.compressed import not_utf8
from lightning_sft.data.conversation import Example
from lightning_sft.data.records import (
    KeysOnce,
    check_lone_record,
    parse_line,
    read_records,
)
from lightning_sft.data.shapes import shape
from lightning_sft.data.tables import is_table

STREAM_FROM = 64 * 1024**2  # bytes; a smaller file's entries are held, which takes 1 KB each
_BOM = b"\xef\xbb\xbf"


def is_streamed(path: Path) -> bool:
    """Whether a file is JSONL, not packed, and large enough to be read line by line."""
    if is_table(path) or not path.is_file() or path.stat().st_size < STREAM_FROM:
        return False
    with files.open_regular(path) as file:
        begin = file.read(4096).removeprefix(_BOM).lstrip()
    return begin.startswith(b"{")


class LineRecords:
    """The records of a JSONL file in order, not validated, one at a time.

    Raises:
        InputError: From a pass, at the first bad line: as `read_records`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = _stamp(os.stat(path))  # noqa: PTH116 - as of an open file

    def __iter__(self) -> Iterator[Any]:
        return (record for _, record in self.located(is_shown=False))

    def located(self, *, is_shown: bool = True) -> Iterator[tuple[int, Any]]:
        """Each record with the byte that its line begins with; a bar at a terminal."""
        from tqdm import tqdm

        count = 0
        hide = None if is_shown else True  # None: where there is no terminal
        with (
            files.open_regular(self.path) as file,
            tqdm(None, "Reading", self._stamp[0], unit="B", unit_scale=True, disable=hide) as bar,
        ):
            for number, (begin, line) in enumerate(_lines(file), start=1):
                bar.update(len(line) + 1)
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise not_utf8(self.path, begin + error.start) from None
                if not text.strip():
                    continue
                keys = KeysOnce()
                try:
                    record = parse_line(text, number, self.path, keys)
                except InputError:
                    if not count:  # no JSONL at all: said of the file as a whole
                        read_records(self.path)
                    raise
                keys.check(self.path, [record], count)
                yield begin, record
                count += 1
        if count == 1:
            check_lone_record(record, self.path)

    def entries(
        self, begins: Sequence[int], format: str, names: dict[str, str], may_lack_answer: bool
    ) -> LineEntries:
        """The records that begin in these places, which a pass has found good, as entries."""
        source = _Source(self.path, self._stamp, format, names, may_lack_answer)
        return LineEntries(source, np.array(begins, np.int64))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each line with where it begins. Only "\\n" ends one."""
    begin = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(begin)
    for line in file:
        yield begin, line.removesuffix(b"\n")
        begin += len(line)


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class _Source:
    """A file and how its lines are read; `stamp` shows whether it is still the same file."""

    path: Path
    stamp: tuple[int, int]
    format: str
    names: dict[str, str]
    may_lack_answer: bool

    def connect(self) -> BinaryIO:
        try:
            file = files.open_regular(self.path)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
        if _stamp(os.fstat(file.fileno())) != self.stamp:
            file.close()
            raise InputError(f"{self.path}: was changed while it was in use; start again")
        return file

    def read(self, file: BinaryIO, begin: int) -> Example:
        file.seek(begin)
        where = f"{self.path}: byte {begin}"
        return shape(
            json.loads(file.readline()), self.format, self.names, where, self.may_lack_answer
        )


class LineEntries(Sequence[Example]):
    """Entries that stay in their file until they are asked for; a slice of them does, too.

    Raises:
        InputError: From reading, where the file was changed meanwhile.
    """

    def __init__(self, source: _Source, begins: npt.NDArray[np.int64]) -> None:
        self._source, self._begins = source, begins

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> LineEntries: ...
    def __getitem__(self, place: int | slice) -> Example | LineEntries:
        if isinstance(place, slice):
            return LineEntries(self._source, self._begins[place])
        with self._source.connect() as file:
            return self._source.read(file, int(self._begins[place]))

    def __iter__(self) -> Iterator[Example]:
        with self._source.connect() as file:
            for begin in self._begins:
                yield self._source.read(file, int(begin))

    def fingerprint(self) -> str:
        """A digest of all that the entries depend on, without reading each."""
        source = self._source
        content = _digest(source.path, source.stamp)
        places = hashlib.sha256(self._begins.tobytes()).hexdigest()
        return repr((content, places, source.format, source.names, source.may_lack_answer))


@functools.lru_cache(maxsize=16)
def _digest(path: Path, stamp: tuple[int, int]) -> str:
    return files.sha256_of(path)


class JoinedEntries(Sequence[Example]):
    """The entries of several sequences, one behind the other, without holding them."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            begin, end, step = place.indices(len(self))
            if step != 1:
                raise ValueError("only slices of neighbours")
            starts = [0, *self._ends]
            cut = [
                part[max(begin - start, 0) : max(end - start, 0)]
                for part, start in zip(self.parts, starts, strict=False)
            ]
            return join_entries(cut)
        place = range(len(self))[place]
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self.parts[number][place - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[Example]:
        return itertools.chain.from_iterable(self.parts)


def join_entries(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """One sequence of several: a list if all of them are, else one that reads when asked."""
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):
        return [entry for part in parts for entry in part]
    return JoinedEntries(parts)
