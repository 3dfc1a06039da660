"""A real server in a thread of the test, around a tiny model with GPT-2's own tokenizer."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lightning_sft.data.prompts import PromptStyle, get_style
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.decoding.answering import AnsweringModel
from lightning_sft.decoding.generation import generate
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.serving.serve import listen
from lightning_sft.serving.server import Server, build_server

SMALL = GPTConfig(vocab_size=50257, context_length=256, emb_dim=32, n_heads=4, n_layers=2)


def make_talker(seed: int = 0, config: GPTConfig = SMALL) -> GPTModel:
    """A random model that says something else at every place and to every prompt."""
    model = GPTModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("scale") else 0.0))
        else:
            parameter.copy_(noise * (1.0 if "emb" in name else 0.4))
    return model


def answer_alone(model: GPTModel, prompt: str, **settings: Any) -> list[int]:
    """What `generate` says to this text with nobody else about."""
    return generate(model, [gpt2_tokenizer().encode(prompt)], **settings)[0]


class Served:
    """A running server: where it is, and what is in it."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url, self.engine = server, url, server.engine

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until nothing is being answered."""
        wait_for(lambda: not self.engine.running and not self.engine.waiting, seconds)

    def send(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON and headers of one request; `body` is JSON unless it is bytes."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read()), response.headers
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), error.headers


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(
    models: Mapping[str, GPTModel | AnsweringModel],
    style: str | PromptStyle = "alpaca",
    **settings: Any,
) -> Iterator[Served]:
    """Run a server around the models; `settings` are `build_server`'s.

    Args:
        style: Of the models that have none of their own.
    """
    loaded = {
        name: model
        if isinstance(model, AnsweringModel)
        else AnsweringModel(model, get_style(style))
        for name, model in models.items()
    }
    server = build_server(loaded, **settings)
    with listen("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield Served(server, url)
        finally:
            server.should_exit = True
            server.engine.drain(0)
            thread.join(timeout=60)
            assert not thread.is_alive()
            assert not server.engine.alive
