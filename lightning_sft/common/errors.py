"""The ways a command can fail, the exit code of each, and what is kept of one nobody foresaw.

A message is one line: what is wrong, where, and what is allowed. `__main__.py` prints it as
`error: …` without a traceback (`--debug` shows the traceback).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

# What API keys of the usual providers look like.
KEY_SHAPE = re.compile(r"\b(?:sk-|hf_|gsk_|AIza)[A-Za-z0-9_-]{12,}")

# How torch says so, on the CPU and on a GPU.
OUT_OF_MEMORY = r"DefaultCPUAllocator: can't allocate memory|not enough memory|out of memory"


class LightningSFTError(Exception):
    """Base of the errors that a user can act on."""

    exit_code = 1


class InputError(LightningSFTError, ValueError):
    """Bad data, weights, configuration or command line."""

    exit_code = 2


class ServiceError(LightningSFTError, OSError):
    """Disk, network or server failed; the same command may work later."""

    exit_code = 3


class IncompleteError(LightningSFTError):
    """The command finished, but part of the work is missing (for example unscored answers)."""

    exit_code = 4


class StoppedError(LightningSFTError):
    """The command was asked to stop and did; 128 + the signal's number, as shells count."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def known_cause(error: BaseException) -> LightningSFTError | None:
    """The error that a user can act on behind one of Python's or torch's own; None for the rest.

    For causes that can come up anywhere: each place that opens a file would have to know them.
    """
    text = " ".join(str(error).split())
    if isinstance(error, LightningSFTError):
        return error
    if isinstance(error, RuntimeError) and "determine home directory" in text:  # of expanduser
        return InputError("a path begins with ~ and the name of no user here")
    if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, text):
        return ServiceError(
            f"not enough memory ({text[:150] or 'MemoryError'}); `plan` says what a configuration "
            "takes"
        )
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return ServiceError(f"{error.strerror or error}{where}")
    return None


def write_crash(error: BaseException, folder: Path | None, command: Sequence[str]) -> Path:
    """Write an unexpected error whole, with keys starred out.

    Args:
        folder: The run's; without one, or where it cannot be written to, the temporary folder.

    Returns:
        The file.
    """
    lines = [
        f"command: {' '.join(command)}",
        f"python {sys.version}",
        *traceback.format_exception(error),
    ]
    text = hide_keys("\n".join(lines))
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return folder / name
    path = Path(tempfile.mkdtemp(prefix="lightning_sft-")) / name
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def hide_keys(text: str) -> str:
    """`text` with whatever looks like an API key starred out; messages end up in logs."""
    return KEY_SHAPE.sub("***", text)


def printable(text: str) -> str:
    """`text` with its control characters spelled out, so that a terminal shows and obeys none."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
