"""What a part found out, line by line, on disk as soon as it is known.

A part may be killed at its time limit, so every figure is appended to `rounds/PART.jsonl` at once.
An entry is a measurement, a check, or something that was skipped or failed; it says which by its
keys:

    {"name": "ours bf16", "round": 1, "tokens_per_second": 412345.0, "peak_gb": 12.3}
    {"name": "bf16 learns as fp32", "passed": true, "difference": 0.004, "allowed": 0.05}
    {"name": "TRL", "skipped": "trl is not installed"}
    {"name": "transformers", "error": "OutOfMemoryError: …"}

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_check.setting import Setting


class SkipError(Exception):
    """A measurement, or a whole part, that cannot be made here; its text says why."""


class Notebook:
    """The entries of one part.

    Args:
        part: Its name.
        setting: Of the check.
    """

    def __init__(self, part: str, setting: Setting) -> None:
        self.part, self.setting = part, setting
        self.path = setting.folder("rounds") / f"{part}.jsonl"
        # Lightning starts the other ranks of a sharded run with the same command line.
        self.is_first_rank = os.environ.get("LOCAL_RANK", "0") == "0"

    def write(self, name: str, **facts: Any) -> None:
        """Append an entry."""
        entry = {"name": name, **{key: _plain(value) for key, value in facts.items()}}
        if self.is_first_rank:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        print(f"{self.part}: {entry}", flush=True)

    def check(self, name: str, difference: float, allowed: float, **facts: Any) -> bool:
        """A check that is passed by a difference of at most so much; NaN fails."""
        passed = difference <= allowed
        self.write(name, passed=passed, difference=difference, allowed=allowed, **facts)
        return passed

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails or cannot be had inside is written down, and the part goes on."""
        try:
            yield
        except SkipError as reason:
            self.write(name, skipped=str(reason))
        except ModuleNotFoundError as error:
            self.write(name, skipped=f"{error.name} is not installed")
        except Exception as error:
            traceback.print_exc()
            self.write(name, error=describe(error))
        finally:
            _free_memory()


def describe(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a part so far; a last line that was cut off is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def _plain(value: Any) -> Any:
    """Numbers short enough to read, and none that JSON has no word for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _free_memory() -> None:
    """The next measurement begins with an empty device, as if it were the first."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
