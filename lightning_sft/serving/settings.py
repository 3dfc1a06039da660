"""What the server does where a request does not say, and what its clients may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_sft.common.errors import InputError


def _check(group: str, settings: object, **lowest: int) -> None:
    for name, low in lowest.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise InputError(f"{group}.{name}: {value} is not allowed; it must be >= {low}")


@dataclass(frozen=True)
class Answers:
    """How answers are written where a request does not say.

    Args:
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        top_k: Sample among the k likeliest tokens only.
        top_p: Sample among the fewest tokens whose probabilities sum to p, in (0, 1].
        seed: Of sampling; a new one for every request by default.

    Raises:
        InputError: A value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("generation", self, max_new_tokens=1, top_k=1)
        if not 0.0 <= self.temperature <= 2.0:
            raise InputError(f"generation.temperature: {self.temperature} is outside [0, 2]")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"generation.top_p: {self.top_p} is outside (0, 1]")


@dataclass(frozen=True)
class Limits:
    """What one client, or all of them together, may cost.

    Args:
        batch_size: Most answers computed side by side, of each model.
        queue: Most prompts that wait for a place beside them; more get status 429.
        body_bytes: Longest request.
        prompt_tokens: Longest prompt; the model's context limits it as well.
        max_tokens: Longest answer that a request may ask for.
        prompts: Most prompts of one request to /v1/completions.
        seconds: Time for a request, waiting included; then the answer ends where it is.
        grace: Seconds for running answers after SIGTERM or Ctrl-C.

    Raises:
        InputError: A value is out of range.
    """

    batch_size: int = 32
    queue: int = 128
    body_bytes: int = 1_000_000
    prompt_tokens: int = 1024
    max_tokens: int = 1024
    prompts: int = 32
    seconds: float = 300.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        _check("limits", self, batch_size=1, queue=0, body_bytes=1, prompt_tokens=1)
        _check("limits", self, max_tokens=1, prompts=1)
        if not 0.0 < self.seconds < math.inf:
            raise InputError(f"limits.seconds: {self.seconds} must be > 0 and finite")
        if not 0.0 <= self.grace < math.inf:
            raise InputError(f"limits.grace: {self.grace} must be >= 0 and finite")


DEFAULT_ANSWERS, DEFAULT_LIMITS = Answers(), Limits()
