"""The three ways a command can fail, and the exit code each stands for.

A message is one line: what is wrong, where, and what is allowed. `__main__.py` prints it as
`error: …` without a traceback (`--debug` shows the traceback).
"""

from __future__ import annotations

import re

# What API keys of the usual providers look like.
KEY_SHAPE = re.compile(r"\b(?:sk-|hf_|gsk_|AIza)[A-Za-z0-9_-]{12,}")


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


def hide_keys(text: str) -> str:
    """`text` with whatever looks like an API key starred out; messages end up in logs."""
    return KEY_SHAPE.sub("***", text)


def printable(text: str) -> str:
    """`text` with its control characters spelled out, so that a terminal shows and obeys none."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
