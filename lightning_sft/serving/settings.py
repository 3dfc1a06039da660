"""What the server does where a request does not say, and what its clients may cost.

This module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_sft.common.errors import InputError
from lightning_sft.decoding.settings import GenerationConfig

MAX_TEMPERATURE = 2.0  # OpenAI's bound


@dataclass(frozen=True)
class Limits:
    """What one client, or all of them together, may cost.

    Args:
        batch_size: Most answers computed side by side, of each model.
        queue: Most prompts that wait for a place beside them; more get status 429.
        body_bytes: Longest request.
        prompt_tokens: Longest prompt; the model's context limits it as well.
        max_tokens: Longest answer that a request may ask for.
        kept_bytes: Memory for what finished answers have seen, of each model, so that the next
            turns of their conversations need not be read from the beginning; 0 keeps nothing.
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
    kept_bytes: int = 500_000_000
    prompts: int = 32
    seconds: float = 300.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        at_least = {"queue": 0, "kept_bytes": 0, "batch_size": 1, "body_bytes": 1, "prompts": 1}
        for name, low in (at_least | {"prompt_tokens": 1, "max_tokens": 1}).items():
            value = getattr(self, name)
            if value < low:
                raise InputError(f"limits.{name}: {value} is not allowed; it must be >= {low}")
        if not 0.0 < self.seconds < math.inf:
            raise InputError(f"limits.seconds: {self.seconds} must be > 0 and finite")
        if not 0.0 <= self.grace < math.inf:
            raise InputError(f"limits.grace: {self.grace} must be >= 0 and finite")


# A request that gives no seed is sampled anew each time.
DEFAULT_GENERATION, DEFAULT_LIMITS = GenerationConfig(seed=None), Limits()


def check_generation(generation: GenerationConfig) -> None:
    """Refuse defaults that a request could not ask for, or that mean nothing here.

    Raises:
        InputError: Names the option.
    """
    if generation.temperature > MAX_TEMPERATURE:
        raise InputError(
            f"generation.temperature: {generation.temperature} is outside [0, {MAX_TEMPERATURE:g}]"
        )
    if generation.batch_size != DEFAULT_GENERATION.batch_size:
        raise InputError("generation.batch_size: it is limits.batch_size for a server")
