"""Models, engine, routes and gate put together, and the orderly end of it all.

Uvicorn keeps the connections. On SIGTERM or Ctrl-C nothing new is taken, those who wait are sent
away, running answers finish within the grace time, and the signal then takes its usual course:
exit code 143 or 130. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping
from types import FrameType

import uvicorn

from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.serving.app import Service
from lightning_sft.serving.chat_page import build_chat_page
from lightning_sft.serving.context import Context, Hub, Served
from lightning_sft.serving.engine import Engine
from lightning_sft.serving.gate import Gate
from lightning_sft.serving.openai_request import Rules
from lightning_sft.serving.settings import DEFAULT_ANSWERS, DEFAULT_LIMITS, Answers, Limits


class Server(uvicorn.Server):
    """Uvicorn with an engine that starts, drains and ends with it."""

    def __init__(self, config: uvicorn.Config, engine: Engine, hub: Hub, grace: float) -> None:
        super().__init__(config)
        self.engine, self.hub, self.grace = engine, hub, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.hub.loop = asyncio.get_running_loop()
        self.engine.start()
        await super().startup(sockets)

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
        super().handle_exit(sig, frame)


def build_server(
    loaded: Mapping[str, tuple[GPTModel, PromptStyle]],
    generation: Answers = DEFAULT_ANSWERS,
    limits: Limits = DEFAULT_LIMITS,
    token: str | None = None,
    loopback: bool = True,
) -> Server:
    """A server that is ready to run.

    Args:
        loaded: Model and style by name.
        token: Demanded of every request to the API; None demands none.
        loopback: Answer only to requests that name this machine.
    """
    hub = Hub()
    engine = Engine(
        {name: model for name, (model, _) in loaded.items()},
        hub.deliver,
        batch_size=limits.batch_size,
        queue=limits.queue,
    )
    models = {
        name: Served(style, model.config.context_length, int(time.time()))
        for name, (model, style) in loaded.items()
    }
    rules = Rules(
        styles={name: style for name, (_, style) in loaded.items()},
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        seed=generation.seed,
        max_tokens=limits.max_tokens,
        max_prompts=limits.prompts,
    )
    context = Context(
        engine,
        hub,
        models,
        rules,
        limits,
        gpt2_tokenizer(),
        new_seed=lambda: secrets.randbits(62),
    )
    service = Service(context, page=build_chat_page())
    config = uvicorn.Config(
        Gate(service.app(), token, loopback),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.grace) + 5,
    )
    return Server(config, engine, hub, limits.grace)
