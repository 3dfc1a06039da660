"""A chat template that is rendered elsewhere: this process asks, `template_worker.py` answers.

    >>> TemplateProcess("{{ messages[0].content }}").render([{"role": "user", "content": "Hi"}], [])

This module does not import torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sft.common.errors import InputError, printable

WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 60.0  # by the clock, where the system cannot bound a process's own time


class TemplateProcess:
    """Renders one template for as long as it is kept; started when first asked.

    Args:
        source: Of the template, in Jinja.

    Raises:
        InputError: From `render`, where the template is wrong, or takes too much time or memory.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(
        self, messages: Sequence[dict[str, str]], renders: Sequence[tuple[int, bool]]
    ) -> list[str]:
        """The texts of the first so many messages, each with the next answer's header or without.

        Raises:
            InputError: The template refuses the messages, or is stopped; says why.
        """
        with self._lock:
            if self._process is None:
                self._start()
            return self._ask({"messages": list(messages), "renders": list(renders)})

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __del__(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _start(self) -> None:
        # Isolated: neither the working directory nor the environment says what is imported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        try:
            self._ask({"template": self._source})
        except InputError:
            self.close()  # whoever asks again is told again
            raise

    def _ask(self, request: dict[str, Any]) -> list[str]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.close()
            raise InputError(
                "chat template: was stopped: it takes too much time or memory for a conversation"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(f"chat template: {printable(str(answer['error']))}")
        return answer["texts"]
