"""What every request is answered with: the models, their engine, its events, what is allowed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_sft.decoding.answering import AnsweringModel
from lightning_sft.serving.engine import Engine
from lightning_sft.serving.job import Job, TokenEvent
from lightning_sft.serving.openai_request import Rules
from lightning_sft.serving.settings import Limits


class Hub:
    """Carries the engine's events from its thread to whoever waits for them in the event loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.listeners: dict[Job, Callable[[TokenEvent], None]] = {}

    def deliver(self, events: list[tuple[Job, TokenEvent]]) -> None:
        """Called in the engine's thread, once a step."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self.loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: list[tuple[Job, TokenEvent]]) -> None:
        for job, event in events:
            listener = self.listeners.get(job)
            if listener is not None:
                listener(event)


@dataclass(frozen=True)
class Context:
    """One server's, made once.

    Args:
        engine: Computes all answers.
        hub: Brings its events to the requests.
        models: By the names that the API gives them.
        rules: What a request may ask for.
        created: When the server began, in seconds of the epoch.
    """

    engine: Engine
    hub: Hub
    models: Mapping[str, AnsweringModel]
    rules: Rules
    created: int

    @property
    def limits(self) -> Limits:
        """What clients may cost."""
        return self.rules.limits
