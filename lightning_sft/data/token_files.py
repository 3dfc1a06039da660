"""Token rows written to disk as they are made, so that they never are in memory together.

One `.npy` file an array, whose length stands in its header once the last row is written; numpy
leaves room for it. The files take their names only then.

    >>> with writing(folder) as writer:
    ...     writer.append(rows)

This module does not import torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lightning_sft.common import files
from lightning_sft.data.rows import TokenRows

# The arrays of `TokenRows`, each with its type and the shape of one element.
ARRAYS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "ids": (np.int32, ()),
    "offsets": (np.int64, ()),
    "prompt_lengths": (np.int32, ()),
    "indices": (np.int32, ()),
    "spans": (np.int32, (2,)),
    "span_weights": (np.float32, ()),
    "span_offsets": (np.int64, ()),
}
# What each part counts from 0, and the array whose elements are counted.
COUNTED = {"offsets": "ids", "span_offsets": "spans"}


def array_path(folder: Path, name: str) -> Path:
    """Where one of the arrays is."""
    return folder / f"{name}.npy"


class TokenWriter:
    """Takes the rows of a split part by part.

    Args:
        opened: A file for each array, open for writing.
    """

    def __init__(self, opened: dict[str, IO[bytes]]) -> None:
        self._files = opened
        self.lengths = dict.fromkeys(ARRAYS, 0)
        for name in ARRAYS:
            self._write_header(name)
        for name in COUNTED:
            self._append(name, np.zeros(1, np.int64))

    def append(self, rows: TokenRows) -> None:
        """Add rows behind those that are there."""
        begins = {name: self.lengths[counted] for name, counted in COUNTED.items()}
        for name in ARRAYS:
            array = getattr(rows, name)
            self._append(name, array[1:] + begins[name] if name in COUNTED else array)

    def finish(self) -> None:
        """Write how long the arrays have become."""
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name)

    def _append(self, name: str, array: npt.NDArray[Any]) -> None:
        kind, _ = ARRAYS[name]
        self._files[name].write(np.ascontiguousarray(array, kind).tobytes())
        self.lengths[name] += len(array)

    def _write_header(self, name: str) -> None:
        kind, element = ARRAYS[name]
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(kind)),
            "fortran_order": False,
            "shape": (self.lengths[name], *element),
        }
        np.lib.format.write_array_header_1_0(self._files[name], header)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[TokenWriter]:
    """A writer of a folder's arrays, which have their names when the block ends without an error.

    Raises:
        ServiceError: The disk is full, or the folder cannot be written.
    """
    for stale in folder.glob(".*.npy.*.tmp"):  # of a process that was killed
        stale.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        opened = {
            name: stack.enter_context(files.atomic_write(array_path(folder, name), "wb"))
            for name in ARRAYS
        }
        writer = TokenWriter(opened)
        yield writer
        writer.finish()
