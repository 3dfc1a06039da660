"""Many entries → token rows, part by part, on all cores where that pays.

Each process takes the parts in turn and their rows come back in order, so that the ids do not
depend on how many processes there are. The processes are started afresh, not forked, since the
caller may have threads, and run `token_worker.py`, not the caller's own program. Of entries that
stay in their file only the places are sent.

    >>> for rows in tokenize_parts(entries, get_style("alpaca"), gpt2_tokenizer(), Masking()):
    ...     print(len(rows))

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.data.conversation import Example
from lightning_sft.data.conversation_rows import tokenize_example
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.rows import Row, TokenRows
from lightning_sft.data.segments import Masking
from lightning_sft.data.tokenizer import GPT2Tokenizer, Tokenizer, encode_together

PART = 2_048  # entries; what is held at a time is a few of these
# A process takes half a second to start, in which one alone tokenizes about as many entries.
PROCESSES_FROM_ENTRIES = 10_000
# Isolated: neither the working directory nor the environment says what is imported, but this
# process.
_PROGRAM = (
    "import pickle, sys; sys.path = pickle.load(sys.stdin.buffer); "
    "from lightning_sft.data.token_worker import serve; serve()"
)


def tokenize_parts(
    entries: Sequence[Example], style: PromptStyle, tokenizer: Tokenizer, masking: Masking
) -> Iterator[TokenRows]:
    """The rows of entries in order, of so many entries at a time.

    Raises:
        InputError: The style has no place for a conversation's message; names the first such entry.
        ServiceError: A process died.
    """
    cores = count_cores()
    # Others might not be there, or not the same, in another process.
    is_ours = type(tokenizer) in (GPT2Tokenizer, HFTokenizer)
    if len(entries) >= PROCESSES_FROM_ENTRIES and cores > 1 and is_ours:
        yield from _tokenize_in_processes(entries, (style, tokenizer, masking), cores)
        return
    for begin in range(0, len(entries), PART):
        part = entries[begin : begin + PART]
        yield tokenize_part(part, begin, style, tokenizer, masking)


def tokenize_part(
    entries: Sequence[Example],
    first: int,
    style: PromptStyle,
    tokenizer: Tokenizer,
    masking: Masking,
) -> TokenRows:
    """The rows of entries of which the first stands in place `first` of its split.

    Raises:
        InputError: As `tokenize_parts`.
    """

    def tokenize_one(index: int, entry: Example, one: Tokenizer) -> list[Row]:
        try:
            return tokenize_example(entry, style, one, masking, index)
        except InputError as error:
            raise InputError(f"entry {index}: {error}") from None

    def tokenize_all(one: Tokenizer) -> list[Row]:
        return [
            row
            for index, entry in enumerate(entries, first)
            for row in tokenize_one(index, entry, one)
        ]

    return TokenRows.from_rows(encode_together(tokenizer, tokenize_all))


def count_cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tokenize_in_processes(
    entries: Sequence[Example], task: tuple[Any, ...], count: int
) -> Iterator[TokenRows]:
    begins = iter(range(0, len(entries), PART))
    with contextlib.ExitStack() as stack:
        # The first to be asked is the first to be heard: parts come back in order.
        busy: deque[_Process] = deque()
        for begin in [*_take(begins, count)]:
            process = _Process(task)
            stack.callback(process.close)
            process.send(entries[begin : begin + PART], begin)
            busy.append(process)
        while busy:
            process = busy.popleft()
            rows = process.receive()
            for begin in _take(begins, 1):
                process.send(entries[begin : begin + PART], begin)
                busy.append(process)
            yield rows


def _take(begins: Iterator[int], count: int) -> Iterator[int]:
    return (begin for _, begin in zip(range(count), begins, strict=False))


class _Process:
    """A process that tokenizes what it is sent."""

    def __init__(self, task: tuple[Any, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The library's own threads would only be in the other processes' way.
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self._write(sys.path)
        self._write(task)

    def send(self, entries: Sequence[Example], first: int) -> None:
        self._write((entries, first))

    def receive(self) -> TokenRows:
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise _died() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _write(self, value: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(value, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError:
            raise _died() from None


def _died() -> ServiceError:
    return ServiceError("tokenizing: a process of it died, perhaps for want of memory")
