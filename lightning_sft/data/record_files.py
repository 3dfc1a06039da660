"""New data files: a name that is free, and records written whole or not at all.

    >>> path = check_new_file("new.json", "output", ["instruction-data.json"])
    >>> write_records(path, records)

This module does not import torch.
"""

from __future__ import annotations

import datetime
import decimal
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import local_path


def write_records(path: Path, records: Sequence[Any]) -> None:
    """A JSON list, as the chapter's file is laid out, or JSONL where the name ends in .jsonl.

    Raises:
        InputError: A record of a table holds what JSON cannot; there is no file then.
        ServiceError: The disk refused; likewise.
    """

    def spell(value: Any) -> str:
        return _spell(value, path)

    with files.atomic_write(path) as file:
        if path.suffix == ".jsonl":
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, default=spell) + "\n")
        else:
            json.dump(list(records), file, indent=4, ensure_ascii=False, default=spell)


def _spell(value: Any, path: Path) -> str:
    """A value of a Parquet column that JSON has no type for, as text.

    Raises:
        InputError: It is no such value: bytes, as of an image.
    """
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    raise InputError(
        f"{path}: a record holds {type(value).__name__}, which JSON has no place for; leave that "
        "column out of the data"
    )


def check_new_file(path: str | Path, option: str, sources: Sequence[str]) -> Path:
    """The path, if a new data file can be written there.

    Args:
        option: What a complaint calls it.
        sources: The files and URLs that its records come from.

    Raises:
        InputError: Another ending than .json or .jsonl, one of the sources, or it is there already.
    """
    path = files.expand_user(path, option)
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{option}: {path} must end in .json or .jsonl")
    keep_from_data(path, option, sources)
    if os.path.lexists(path):
        raise InputError(f"{option}: {path} is already there; give a name that does not exist yet")
    return path


def keep_from_data(path: Path, option: str, sources: Sequence[str]) -> None:
    """Refuse to write over one of the sources, by whatever name or link it is reached.

    Raises:
        InputError: It is one.
    """
    for source in sources:
        data = local_path(source)
        if path.exists() and path.samefile(data):
            raise InputError(f"{option}: {path} is the data itself, {data}; it is never changed")
