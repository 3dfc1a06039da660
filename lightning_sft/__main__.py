"""`python -m lightning_sft COMMAND …`: runs a command and turns its outcome into an exit code.

0 done · 2 bad input or config · 3 disk, network or server · 4 finished but incomplete ·
130 SIGINT · 143 SIGTERM. An error is one line on stderr; `--debug` shows its traceback.
"""

from __future__ import annotations

import signal
import sys
import threading

from lightning_sft.commands.cli import run_command
from lightning_sft.common.errors import LightningSFTError, hide_keys


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's own arguments) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    try:
        return run_command([argument for argument in argv if argument != "--debug"])
    except LightningSFTError as error:
        if debug:
            raise
        print(f"error: {hide_keys(' '.join(str(error).split()))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`… | head`): nothing went wrong here.
        sys.stderr.close()
        return 0
    except OSError as error:
        if debug:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 3


def _stop(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
