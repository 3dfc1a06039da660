"""Models, engine, routes and gate put together, and the orderly end of it all.

Uvicorn keeps the connections. On SIGTERM or Ctrl-C nothing new is taken, those who wait are sent
away, running answers finish within the grace time, and the signal then takes its usual course:
exit code 143 or 130. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import asyncio
import functools
import math
import signal
import socket
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import uvicorn

from lightning_sft.decoding.answering import AnsweringModel
from lightning_sft.decoding.settings import GenerationConfig
from lightning_sft.serving.app import Service
from lightning_sft.serving.chat_page import build_chat_page
from lightning_sft.serving.connections import (
    ACCEPTED_AT_ONCE,
    Connection,
    count_affordable,
    lengthen_queue,
)
from lightning_sft.serving.context import Context, Hub
from lightning_sft.serving.engine import Engine
from lightning_sft.serving.gate import Gate
from lightning_sft.serving.log import LOG_CONFIG
from lightning_sft.serving.openai_request import Rules
from lightning_sft.serving.settings import DEFAULT_GENERATION, DEFAULT_LIMITS, Limits


class Server(uvicorn.Server):
    """Uvicorn with an engine that starts, drains and ends with it."""

    def __init__(self, config: uvicorn.Config, engine: Engine, hub: Hub, grace: float) -> None:
        super().__init__(config)
        self.engine, self.hub, self.grace = engine, hub, grace
        self.ended_by = 0  # the signal that ended it

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.hub.loop = asyncio.get_running_loop()
        self.engine.start()
        await super().startup(sockets)
        for listener in sockets or []:
            lengthen_queue(listener)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.drain(self.grace)
        if self.engine.running:
            print(
                f"stopping: {self.engine.running} answers are being finished; Ctrl-C does not wait",
                file=sys.stderr,
                flush=True,
            )
        await super().shutdown(sockets)
        await asyncio.to_thread(self.engine.close)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.drain(0 if self.should_exit and sig == signal.SIGINT else self.grace)
        self.ended_by = sig
        super().handle_exit(sig, frame)


def build_server(
    models: Mapping[str, AnsweringModel],
    generation: GenerationConfig = DEFAULT_GENERATION,
    limits: Limits = DEFAULT_LIMITS,
    token: str | None = None,
    loopback: bool = True,
) -> Server:
    """A server that is ready to run.

    Args:
        models: By the names that the API gives them.
        generation: How answers are written where a request does not say.
        token: Every request to the API needs it; None needs none.
        loopback: Answer only to requests that name this machine.
    """
    hub = Hub()
    engine = Engine(
        {name: loaded.model for name, loaded in models.items()},
        hub.deliver,
        eos_token_ids={name: loaded.tokenizer.eos_token_id for name, loaded in models.items()},
        batch_size=limits.batch_size,
        queue=limits.queue,
        kept_bytes=limits.kept_bytes,
    )
    rules = Rules({name: loaded.style for name, loaded in models.items()}, generation, limits)
    service = Service(Context(engine, hub, models, rules, int(time.time())), build_chat_page())
    connection: Any = functools.partial(Connection, most=count_affordable())
    config = uvicorn.Config(
        Gate(service.app(), token, loopback),
        http=connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=LOG_CONFIG,
        access_log=False,
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=math.ceil(limits.grace) + 5,
    )
    return Server(config, engine, hub, limits.grace)
