"""What every request is answered with: the engine, who hears of its news, and what is allowed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import GPT2Tokenizer
from lightning_sft.serving.engine import Engine, Job, News
from lightning_sft.serving.openai_request import Rules
from lightning_sft.serving.settings import Limits


@dataclass(frozen=True)
class Served:
    """One model of the server."""

    style: PromptStyle
    context_length: int
    created: int


class Hub:
    """Carries the engine's news from its thread to whoever waits for them in the event loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.listeners: dict[Job, Callable[[News], None]] = {}

    def deliver(self, news: list[tuple[Job, News]]) -> None:
        """Called in the engine's thread, once a step."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self.loop.call_soon_threadsafe(self._hand_out, news)

    def _hand_out(self, news: list[tuple[Job, News]]) -> None:
        for job, item in news:
            listener = self.listeners.get(job)
            if listener is not None:
                listener(item)


@dataclass(frozen=True)
class Context:
    """One server's, made once.

    Args:
        engine: Computes all answers.
        hub: Brings its news to the requests.
        models: By the names that the API gives them.
        rules, limits: What a request may ask for, and what clients may cost.
        tokenizer: Of all models.
        new_seed: Makes one for a request that has none.
    """

    engine: Engine
    hub: Hub
    models: Mapping[str, Served]
    rules: Rules
    limits: Limits
    tokenizer: GPT2Tokenizer
    new_seed: Callable[[], int]
