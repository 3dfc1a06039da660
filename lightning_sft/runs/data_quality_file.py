"""`data-quality.json`: what `prepare` found in the data, and `report` reads of it.

Beside counts for people it holds one record for each test and validation entry: whether training
has a near-twin of it. An entry is known there by a hash of its prompt, so that answers find theirs
whatever the order, and a file of other data fits none. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import Entry

DATA_QUALITY_NAME = "data-quality.json"
FORMAT = "lightning_sft data quality 1"


class NearTwins(NamedTuple):
    """Which evaluation entries training has a near-twin of.

    threshold: The least cosine of twins.
    similarity: For each entry's key its cosine to the nearest training entry; None below threshold.
    """

    threshold: float
    similarity: dict[str, float | None]


def entry_key(entry: Entry) -> str:
    """Name of an entry's prompt in the file; 16 hexadecimal digits."""
    prompt = json.dumps([entry.instruction, entry.input])
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def read_data_quality(path: Path) -> dict[str, Any]:
    """The whole file.

    Raises:
        InputError: `prepare` did not write it.
    """
    try:
        found = files.read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a file that `prepare` wrote ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path}: not a file that `prepare` wrote")
    return found


def read_near_twins(path: Path) -> NearTwins:
    """What the file says of each evaluation entry.

    Raises:
        InputError: `prepare` did not write it, or it was changed since.
    """
    found = read_data_quality(path)
    threshold, records = found.get("threshold", ""), found.get("evaluated")
    if not _is_number(threshold) or not isinstance(records, list) or not all(map(_is_one, records)):
        raise InputError(f"{path}: 'threshold' or 'evaluated' is not what `prepare` writes")
    return NearTwins(threshold, {record["key"]: record["similarity"] for record in records})


def _is_one(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        return False
    similarity = record.get("similarity", "missing")
    return similarity is None or _is_number(similarity)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
