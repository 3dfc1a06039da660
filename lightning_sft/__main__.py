"""`python -m lightning_sft COMMAND …`: runs a command and turns its outcome into an exit code.

0 done · 2 bad input or config · 3 disk, network or server · 4 finished but incomplete ·
70 a fault of this program · 130 SIGINT · 143 SIGTERM. An error is one line on stderr; `--debug`
shows its traceback. What nobody foresaw is written whole to a file that the line names.
"""

from __future__ import annotations

import signal
import sys
import threading

from lightning_sft.commands.cli import run_command
from lightning_sft.common.errors import StoppedError, hide_keys, known_cause, write_crash

FAULT = 70  # EX_SOFTWARE of sysexits.h


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's own arguments) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    try:
        return run_command([argument for argument in argv if argument != "--debug"])
    except BrokenPipeError:
        # The reader of our output left (`… | head`): nothing went wrong here.
        sys.stderr.close()
        return 0
    except (KeyboardInterrupt, Exception) as error:
        if "--debug" in argv:
            raise
        code, line = _describe(error, argv)
        print(hide_keys(" ".join(line.split())), file=sys.stderr)
        return code


def _describe(error: BaseException, argv: list[str]) -> tuple[int, str]:
    """An error's exit code, and the line that tells it."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, StoppedError):  # as asked: no error
        return error.exit_code, str(error)
    if (known := known_cause(error)) is not None:
        return known.exit_code, f"error: {known}"
    path = write_crash(error, getattr(error, "run_folder", None), argv)
    summary = " ".join(f"{type(error).__name__}: {error}".split())
    return FAULT, f"error: unexpected {summary[:200]}; all of it is in {path}; please report it"


def _stop(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
