"""One prompt on its way through the engine, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lightning_sft.decoding.settings import GenerationConfig
from lightning_sft.serving.openai_reply import TokenLogprobs


class TokenEvent(NamedTuple):
    """What became of a job in one step.

    Args:
        token: The token it took; None when it took none.
        logprobs: The token's, where the job asked for them.
        end: Why it is over: `stop` (end-of-text), `length` (its most tokens, or the context is
            full), `time`, `stopping` (the engine ends) or `error`; None while it goes on.
    """

    token: int | None
    logprobs: TokenLogprobs | None = None
    end: str | None = None


@dataclass(eq=False)
class Job:
    """One prompt to be answered.

    Args:
        model: Name of the model that answers.
        prompt: Token ids.
        settings: Its `batch_size` is not used.
        key: Beside the seed, what sampling depends on, as in `generation.decode`.
        top_logprobs: Report tokens' log-probabilities with this many alternatives.
        seconds: How long it may take, waiting included.
    """

    model: str
    prompt: list[int]
    settings: GenerationConfig
    key: int = 0
    top_logprobs: int | None = None
    seconds: float = float("inf")
    # From here on the engine's own.
    cancelled: bool = False
    written: list[int] = field(default_factory=list)  # the answer's tokens so far
    reused: int = 0  # tokens of the prompt that an earlier row had read
    most: int = 0  # tokens it may write
    deadline: float = float("inf")  # on `time.monotonic`'s clock
    rng: torch.Generator = field(default_factory=torch.Generator)

    def cancel(self) -> None:
        """Nobody wants the answer any more; may be called from any thread."""
        self.cancelled = True
