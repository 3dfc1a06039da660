"""Seconds and tokens of a training loop, ours or a peer's, in rounds of some steps.

The device is waited for only where a round begins or ends: a clock that waits at every step would
hide whether the loop itself does.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class DoneError(Exception):
    """Ends a loop that runs on by itself once its rounds are over."""


class Stopwatch:
    """Some steps to warm up, then rounds.

    Args:
        device: `cuda` or `cpu`.
        warm: Steps before the first round.
        steps: Of a round.
        rounds: How many.
    """

    def __init__(self, device: str, warm: int, steps: int, rounds: int = 3) -> None:
        self.device, self.warm, self.steps, self.rounds = device, warm, steps, rounds
        self.done = 0
        self.begun = time.perf_counter()
        self.first_step = 0.0  # seconds from here to the end of the first step
        self._tokens: Any = 0
        self._targets: Any = 0
        self._marks: list[tuple[float, float, float]] = []
        if warm == 0:
            self._mark()

    @property
    def total(self) -> int:
        """Steps until all rounds are over."""
        return self.warm + self.steps * self.rounds

    @property
    def is_over(self) -> bool:
        return self.done >= self.total

    def step(self, tokens: Any, targets: Any) -> None:
        """A step is over, as far as the host knows.

        Args:
            tokens, targets: Input tokens and supervised ones of it: numbers, or tensors that are
                read when a round ends.
        """
        self.done += 1
        self._tokens, self._targets = self._tokens + tokens, self._targets + targets
        if self.done == 1:
            wait_for(self.device)
            self.first_step = time.perf_counter() - self.begun
        if self.done >= self.warm and (self.done - self.warm) % self.steps == 0:
            self._mark()

    def _mark(self) -> None:
        wait_for(self.device)
        self._marks.append((time.perf_counter(), float(self._tokens), float(self._targets)))

    def results(self) -> list[dict[str, float]]:
        """Of each round that was finished: its number, seconds a step, tokens a second."""
        found = []
        for number in range(1, len(self._marks)):
            before, after = self._marks[number - 1 : number + 1]
            seconds, tokens, targets = (b - a for a, b in zip(before, after, strict=True))
            found.append(
                {
                    "round": number,
                    "step_seconds": seconds / self.steps,
                    "tokens_per_second": tokens / seconds,
                    "supervised_per_second": targets / seconds,
                }
            )
        return found


def wait_for(device: str) -> None:
    """Until all that was handed to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_gb(device: str) -> float | None:
    """Most memory that tensors took on the GPU since it was last reset; None elsewhere."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
