"""A new data file from old ones: the same records in other splits, some of them left out.

Records are written as they were read, with whatever keys they have besides those of an entry, so
that answers of preference data or a source's name are not lost. The old files are only read.

    >>> written = write_splits(Path("new.json"), config, splits, split_of)
    >>> print(written.config)  # what a config says to use it

This module does not import torch.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig
from lightning_sft.data.conversation import Example
from lightning_sft.data.entries import Splits, local_path, read_entries, split_entries
from lightning_sft.data.near_duplicates import Places
from lightning_sft.data.record_files import write_records
from lightning_sft.data.records import read_records


class Written(NamedTuple):
    """The new file: its path, the sizes of its splits, and what a config must say to use it."""

    path: Path
    sizes: dict[str, int]
    config: str


def write_splits(path: Path, config: DataConfig, splits: Splits, split_of: Places) -> Written:
    """Write the records of a new split, train first, then test, then validation.

    Args:
        path: Ends in .json or .jsonl.
        config: Of the data that `splits` were read from.
        split_of: For each entry of train, test and validation, in a row, the number of the split
            that it goes to; negative leaves it out.

    Raises:
        ServiceError: The disk refused; there is no file then.
    """
    records = _load_records(config, splits)
    entries = [entry for part in splits for entry in part]
    parts = [np.flatnonzero(split_of == n).tolist() for n in range(len(Splits._fields))]
    places = [place for part in parts for place in part]
    write_records(path, [records[place] for place in places])
    sizes = {name: len(part) for name, part in zip(Splits._fields, parts, strict=True)}
    lines = _describe_config(path, config, [entries[place] for place in places], sizes)
    return Written(path, sizes, "data:\n" + "\n".join(f"  {line}" for line in lines))


def _load_records(config: DataConfig, splits: Splits) -> list[Any]:
    """The record in a file behind each entry of the splits, in their order."""
    found: dict[str, dict[Example, deque[Any]]] = {}
    for path in config.files():
        entries = read_entries(path, field_names=config.field_names, require_output=False)
        queues = found.setdefault(path, {})
        for entry, record in zip(entries, read_records(local_path(path)), strict=True):
            queues.setdefault(entry, deque()).append(record)
    sources = {"train": config.path, "test": config.test_path, "val": config.val_path}
    # Of equal entries the records come in the order of their file, as the splits do.
    return [
        found[sources[name] or config.path][entry].popleft()
        for name, part in splits._asdict().items()
        for entry in part
    ]


def _describe_config(
    path: Path, config: DataConfig, entries: list[Example], sizes: dict[str, int]
) -> list[str]:
    """The settings of `data` with which the new file is cut into just these splits."""
    lines = [f"path: {path}"]
    lines += [f"{key}: null" for key in ("val_path", "test_path") if getattr(config, key)]
    try:
        parts = split_entries(entries, config.fractions)
        as_before = {name: len(part) for name, part in parts._asdict().items()}
    except InputError:
        as_before = {}
    if as_before != sizes:
        # A quarter of an entry more than there are, because `split_entries` rounds down.
        train, test = (round((sizes[name] + 0.25) / len(entries), 12) for name in ("train", "test"))
        lines.append(f"fractions: [{train}, {test}, {round(1 - train - test, 12)}]")
    return lines
