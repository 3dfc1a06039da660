"""What a GGUF file says of itself: its facts, and where its tensors lie.

    >>> read_gguf_header(Path("SmolLM2-135M-Instruct.Q4_1.gguf")).facts["general.architecture"]
    'llama'

The package gguf has a reader too, which makes three arrays for each of a vocabulary's tokens and
merges and takes seconds where this takes a fraction of one. A file is a small header (magic,
version, counts), key-value pairs, a description of each tensor, and the tensors' bytes.

Source: docs/gguf.md of github.com/ggml-org/ggml. This module does not import torch.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_sft.common import files
from lightning_sft.common.errors import InputError

_STRING, _ARRAY = 8, 9
# GGUF's numbers for types of values, as little-endian numpy types.
_NUMBERS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_MOST_DEPTH = 4  # of arrays in arrays; no known file has any


class GGUFTensor(NamedTuple):
    """Where one tensor lies.

    shape: As numpy has it, rows first; the file has it the other way round.
    kind: GGML's number of the type of its elements.
    begin: Its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    begin: int


class GGUFHeader(NamedTuple):
    """All of a file but its tensors' bytes; arrays among the facts are lists."""

    facts: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read facts and places; nothing of the tensors is read.

    Raises:
        InputError: Not a GGUF file of version 2 or 3, or one that ends too early.
    """
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    try:
        with (
            files.open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[:4] != b"GGUF":
                raise InputError(f"{path}: not a GGUF file")
            return _Reader(data).read_header()
    except InputError:
        raise
    except (OSError, ValueError, LookupError, ArithmeticError, TypeError, struct.error) as error:
        raise InputError(f"{path}: not a whole GGUF file ({error})") from None


class _Reader:
    """Walks through the header; `place` is the next byte."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 4

    def read_header(self) -> GGUFHeader:
        version = self._number("<I")
        if version not in (2, 3):  # 1 had shorter counts; a big-endian 3 reads as a large number
            raise ValueError(f"version {version}; allowed: 2, 3, little-endian")
        num_tensors, num_facts = self._number("<Q"), self._number("<Q")
        facts = {}
        for _ in range(num_facts):
            key = self._string()
            facts[key] = self._value(self._number("<I"))
        places = {}
        for _ in range(num_tensors):
            name = self._string()
            shape = tuple(self._number("<Q") for _ in range(self._number("<I")))
            places[name] = (shape[::-1], self._number("<I"), self._number("<Q"))
        alignment = facts.get("general.alignment", 32)
        start = -(-self.place // alignment) * alignment  # rounded up
        return GGUFHeader(
            facts,
            {name: GGUFTensor(s, kind, start + at) for name, (s, kind, at) in places.items()},
        )

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return value

    def _string(self) -> str:
        size = self._number("<Q")
        content = self.data[self.place : self.place + size]
        if len(content) != size:
            raise ValueError("a text goes beyond its end")
        self.place += size
        return content.decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < _MOST_DEPTH:
            kind, count = self._number("<I"), self._number("<Q")
            if kind in _NUMBERS:
                return self._numbers(kind, count).tolist()
            return [self._value(kind, depth + 1) for _ in range(count)]
        return self._numbers(kind, 1)[0].item()

    def _numbers(self, kind: int, count: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_NUMBERS[kind])
        found = np.frombuffer(self.data[self.place : self.place + count * dtype.itemsize], dtype)
        if len(found) != count:
            raise ValueError("an array goes beyond its end")
        self.place += count * dtype.itemsize
        return found
