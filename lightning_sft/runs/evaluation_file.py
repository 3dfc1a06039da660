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


def merge(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier rows of a results file, but for those that are measured again, and the new ones."""

    again = [_key(row) for row in rows]
    earlier = read_evaluation(path) if path.exists() else []
    return [row for row in earlier if _key(row) not in again] + rows


def read_evaluation(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file.

    Raises:
        InputError: It is none.
    """
    try:
        rows = files.read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a file of results ({error})") from None
    wanted = {"task", "metric", "value", "stderr", "samples", "shots"}
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and wanted <= set(r) for r in rows
    ):
        raise InputError(f"{path}: not a file of results; `lightning_sft evaluate` writes them")
    return rows


def _key(row: dict[str, Any]) -> list[Any]:
    return [row.get(name) for name in KEY]
