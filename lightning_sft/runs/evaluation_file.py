"""`evaluation.json` of a run folder: what `evaluate` measured, and `report` shows.

A list of rows, one for each task, metric and setting. Measuring other tasks adds rows, the same
again replaces its own. This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError

EVALUATION_NAME = "evaluation.json"
# What makes two rows one measurement.
KEY = ("model", "task", "metric", "filter", "shots", "chat_template", "limit")


def add_rows(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a results file with `rows` in place of what they measure again.

    Raises:
        InputError: The file is there and holds no results.
    """
    again = [_key(row) for row in rows]
    earlier = read_evaluation(path) if path.exists() else []
    return [row for row in earlier if _key(row) not in again] + rows


def read_evaluation(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file.

    Raises:
        InputError: It holds no results.
    """
    try:
        rows = files.read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a file of results ({error})") from None
    if not isinstance(rows, list) or not all(map(_is_result, rows)):
        raise InputError(f"{path}: not a file of results; `lightning_sft evaluate` writes them")
    return rows


def _is_result(row: Any) -> bool:
    if not isinstance(row, dict) or not {"task", "metric", "samples", "shots"} <= row.keys():
        return False
    error = row.get("stderr", "missing")
    return isinstance(row.get("value"), int | float) and isinstance(error, int | float | None)


def _key(row: dict[str, Any]) -> list[Any]:
    return [row.get(name) for name in KEY]
