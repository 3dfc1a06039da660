"""A new data file from old ones: the same records in other splits, some of them left out.

Records are written as they were read, with whatever keys they have besides those of an entry, so
that answers of preference data or a source's name are not lost. The old files are only read.

    >>> written = write_splits(Path("new.json"), config, data, split_of)
    >>> print(written.config)  # what a config says to use it

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig, DataSet
from lightning_sft.data.conversation import Example
from lightning_sft.data.entries import Splits, local_path, split_entries
from lightning_sft.data.formats import recognise
from lightning_sft.data.near_duplicates import Places
from lightning_sft.data.record_files import write_records
from lightning_sft.data.records import read_records


class Written(NamedTuple):
    """The new file: its path, the sizes of its splits, and what a config must say to use it."""

    path: Path
    sizes: dict[str, int]
    config: str


def write_splits(path: Path, config: DataConfig, data: DataSet, split_of: Places) -> Written:
    """Write the records of a new split, train first, then test, then validation.

    Args:
        path: Ends in .json or .jsonl.
        config: Of the data.
        data: As it was read.
        split_of: For each entry of train, test and validation, in a row, the number of the split
            that it goes to; negative leaves it out.

    Raises:
        InputError: One file cannot hold these records, or theirs was changed meanwhile.
        ServiceError: The disk refused; there is no file then.
    """
    entries = [entry for part in data.splits for entry in part]
    records = _load_records(config, data.skipped)
    if len(records) != len(entries):
        raise InputError(f"{', '.join(config.files())}: changed while it was examined; start anew")
    parts = [np.flatnonzero(split_of == n).tolist() for n in range(len(Splits._fields))]
    places = [place for part in parts for place in part]
    write_records(path, [records[place] for place in places])
    sizes = {name: len(part) for name, part in zip(Splits._fields, parts, strict=True)}
    lines = _describe_config(path, config, [entries[place] for place in places], sizes)
    return Written(path, sizes, "data:\n" + "\n".join(f"  {line}" for line in lines))


def check_one_file(config: DataConfig) -> None:
    """Refuse data of which one file would not say all: each part of a mixture has a weight.

    Raises:
        InputError: It is a mixture.
    """
    if config.mixture is not None:
        raise InputError(
            "data.mixture: one file is written, which has no weights; give each file by itself as "
            "data.path"
        )


def _load_records(config: DataConfig, skipped: Mapping[str, Sequence[int]]) -> list[Any]:
    """The record in a file behind each entry of the splits, in their order.

    The files are cut as their entries were, so that no record need be looked for.

    Args:
        skipped: For each file the places of records that are no entry.
    """
    formats: dict[str, str] = {}

    def read(path: str | None) -> list[Any]:
        if path is None:
            return []
        records, left_out = read_records(local_path(path)), set(skipped.get(path, ()))
        formats[recognise(records, config.field_names)] = path
        return [record for place, record in enumerate(records) if place not in left_out]

    files = [read(source.path) for source in config.sources()]
    splits, _ = config.cut(files, read(config.val_path), read(config.test_path))
    if config.format == "auto" and len(formats) > 1:
        found = ", ".join(f"{path} is in the format {name}" for name, path in formats.items())
        raise InputError(f"output: one file cannot hold records of several formats: {found}")
    return [record for part in splits for record in part]


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
