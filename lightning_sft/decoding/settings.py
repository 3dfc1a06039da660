"""How answers are written: the settings that training, `chat`, `predict` and `serve` share.

This module does not import torch, so that `serve --help` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_sft.common.errors import InputError

# Below it, logits divided by the temperature leave float32's range (3e38), and nothing but the
# likeliest token would be drawn anyway.
SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are written.

    Args:
        max_new_tokens: Most tokens of an answer; the prompt does not count.
        temperature: 0 (as anything below 1e-5) takes the likeliest token; above, logits are divided
            by it and sampled.
        top_k: Sample among the k likeliest tokens only.
        top_p: Sample among the fewest tokens whose probabilities sum to p, in (0, 1].
        batch_size: Prompts answered side by side.
        seed: Of sampling; null draws a new one each time.

    Raises:
        InputError: A value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    batch_size: int = 32
    seed: int | None = 123

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("batch_size", 1), ("top_k", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"generation.{name}: {value} is not allowed; it must be >= {low}")
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(f"generation.temperature: {self.temperature} must be >= 0")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"generation.top_p: {self.top_p} is outside (0, 1]")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken and nothing is drawn."""
        return self.temperature < SMALLEST_TEMPERATURE
