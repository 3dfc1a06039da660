"""New data files: a name that is free, and records written whole or not at all.

    >>> path = check_new_file("new.json", "output", ["instruction-data.json"])
    >>> write_records(path, records)

This module does not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import local_path


def write_records(path: Path, records: Sequence[Any]) -> None:
    """A JSON list, as the chapter's file is laid out, or JSONL where the name ends in .jsonl.

    Raises:
        ServiceError: The disk refused; there is no file then.
    """
    with files.atomic_write(path) as file:
        if path.suffix == ".jsonl":
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            json.dump(list(records), file, indent=4, ensure_ascii=False)


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
