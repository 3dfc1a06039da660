"""The other end of `tokenizing.py`: a process that tokenizes the parts it is sent.

Both ends pickle: what comes in is the task (style, tokenizer, masking) and then parts of entries;
what goes out is the rows of each, or the error. Where the parent is gone, this process ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys

from lightning_sft.common.errors import LightningSFTError
from lightning_sft.data.tokenizing import tokenize_part


def serve() -> None:
    """Answer until there is nothing more to read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted as well, and says so
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library might print must not get between the answers
    try:
        task = pickle.load(requests)
        while True:
            entries, first = pickle.load(requests)
            try:
                answer: object = tokenize_part(entries, first, *task)
            except LightningSFTError as error:
                answer = error
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # without another try to write what nobody reads
