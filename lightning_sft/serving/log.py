"""What the server says on stderr: single lines, and at most one a second of each kind.

A client that does something wrong ten thousand times a second fills no disk. The server's own
messages and those of uvicorn and asyncio, which bring tracebacks, go through here.

This module does not import torch.
"""

from __future__ import annotations

import logging
import sys
import threading
import time

from lightning_sft.common.errors import hide_keys

SECONDS_BETWEEN = 1.0
MOST_KINDS = 1000  # remembered; beyond them, kinds whose time is over are forgotten

_said: dict[str, tuple[float, int]] = {}  # kind → when it was last said, and how often not since
_lock = threading.Lock()


def log_line(text: str, kind: str | None = None) -> None:
    """Say something, unless the same was said less than a second ago.

    Args:
        text: Becomes one line; what looks like a key is starred out.
        kind: What counts as the same; the text itself by default.
    """
    kind = text if kind is None else kind
    with _lock:
        now = time.monotonic()
        last, silent = _said.get(kind, (-SECONDS_BETWEEN, 0))
        if now - last < SECONDS_BETWEEN:
            _said[kind] = (last, silent + 1)
            return
        if len(_said) >= MOST_KINDS:
            for old in [one for one, (at, _) in _said.items() if now - at >= SECONDS_BETWEEN]:
                del _said[old]
        _said[kind] = (now, 0)
    more = f" ({silent} more like it since the last such line)" if silent else ""
    print(hide_keys(" ".join(text.split())) + more, file=sys.stderr, flush=True)


def log_error(error: BaseException, what: str = "") -> None:
    """An exception in one line."""
    name = type(error).__name__
    log_line(f"error: {what}{name}: {error}"[:500], kind=f"{what}{name}")


class LineHandler(logging.Handler):
    """Takes the records of other packages; without tracebacks, and of each its first line."""

    def emit(self, record: logging.LogRecord) -> None:
        first = record.getMessage().strip().partition("\n")[0][:500]
        cause = record.exc_info[1] if record.exc_info else None
        reason = f" ({type(cause).__name__}: {cause})"[:500] if cause is not None else ""
        log_line(f"{record.levelname.lower()}: {first}{reason}", kind=str(record.msg)[:100])


# For `logging.config.dictConfig`: whose records are taken.
LOG_CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"line": {"()": LineHandler}},
    "loggers": {
        name: {"handlers": ["line"], "level": "WARNING", "propagate": False}
        for name in ("uvicorn", "asyncio")
    },
}
