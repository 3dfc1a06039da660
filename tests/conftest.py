"""What all tests share: no network, a cache of their own, a toy tokenizer and tiny models.

The guards watch this process alone: a test that starts another one keeps it off the network
itself. Tests marked `network` are let through and use the real cache; those marked `unit`, as all
are that nothing else is said of, may start no process.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from lightning_sft.data.entries import Entry, read_entries
from lightning_sft.data.tokenizer import END_OF_TEXT
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from support import tiers
from support.runs import command_popen

# One thread: tiny models gain nothing from more, the processes that tests start have one too, and
# sums over another number of threads differ in their last bits.
torch.set_num_threads(1)
# The same examples in every run; on a busy machine one may take long.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tiers, and begin with the long tests, so that none is left over at the end."""
    for item in items:
        tiers.mark(item)
    items.sort(key=lambda item: item.get_closest_marker("unit") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Around each test and all its fixtures, whatever their scope."""
    is_unit = item.get_closest_marker("unit") is not None
    with (
        tiers.no_processes(item) if is_unit else contextlib.nullcontext(),
        pytest.MonkeyPatch.context() as patch,
    ):
        # It is for a power cut, which no test makes; a kill loses nothing that was written.
        patch.setattr(os, "fsync", lambda descriptor: None)
        if item.get_closest_marker("network") is None:
            cache = item.config._tmp_path_factory.getbasetemp() / "lightning_sft_cache"  # type: ignore[attr-defined]
            patch.setenv("LIGHTNING_SFT_CACHE", str(cache))
            for name in ("connect", "connect_ex"):
                patch.setattr(socket.socket, name, _guard(getattr(socket.socket, name)))
            patch.setattr(socket, "getaddrinfo", _guard_lookup(socket.getaddrinfo))
        return (yield)


def _guard(connect: Callable[..., Any]) -> Callable[..., Any]:
    def connect_to_loopback(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _demand_loopback(address[0])
        return connect(self, address)

    return connect_to_loopback


def _guard_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
    def look_up_loopback(host: Any, *args: Any, **kwargs: Any) -> Any:
        _demand_loopback(host)
        return lookup(host, *args, **kwargs)

    return look_up_loopback


def _demand_loopback(host: str | bytes | None) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return
    try:
        if ipaddress.ip_address(name).is_loopback:
            return
    except ValueError:
        pass
    # No OSError: code under test would take it for a fault of the network and go on.
    pytest.fail(f"the test reaches for {name}; without the marker `network` only loopback is open")


@pytest.fixture
def forked_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that this process starts are forked, where that is possible; see `fork_server`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(subprocess, "Popen", command_popen())


@pytest.fixture(scope="session")
def book_data_path() -> Path:
    """The chapter's instruction-data.json; its sibling files are in the same folder."""
    path = os.environ.get("LIGHTNING_SFT_BOOK_DATA")
    if not path:
        pytest.skip("LIGHTNING_SFT_BOOK_DATA does not name the chapter's instruction-data.json")
    return Path(path)


@pytest.fixture(scope="session")
def book_entries(book_data_path: Path) -> list[Entry]:
    """The chapter's 1,100 entries."""
    return read_entries(book_data_path)


class CharTokenizer:
    """One character is one id, its code point, so that expected ids can be read off the text."""

    name = "characters"
    eos_token_id = END_OF_TEXT
    vocab_size = END_OF_TEXT + 1

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def char_tokenizer() -> CharTokenizer:
    return CharTokenizer()


TINY = GPTConfig(vocab_size=61, context_length=32, emb_dim=32, n_heads=4, n_layers=2)


@pytest.fixture(scope="session")
def tiny_config() -> GPTConfig:
    """2 layers, 4 heads, 32 dimensions, 61 tokens, a context of 32."""
    return TINY


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GPTModel]:
    """`make_model(config=…, seed=0, dtype=torch.float32)`: every parameter random, in eval mode.

    GPT-2's own initialisation has zero biases and logits close to 0, which would hide mistakes.
    """

    def make(
        config: GPTConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> GPTModel:
        model = GPTModel(config).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model.eval()

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., GPTModel]) -> GPTModel:
    """A new random `tiny_config` model in eval mode."""
    return make_model()
