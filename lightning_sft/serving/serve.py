"""Serve one or two fine-tuned models over OpenAI's API, with a page to talk to them.

    python -m lightning_sft serve --ckpt_path runs/quickstart/version_0/gpt2-7M-sft.pth

Then open http://127.0.0.1:8000, or point any OpenAI client at http://127.0.0.1:8000/v1. Only this
machine can reach it, unless `--host` says otherwise, and that needs a token in the environment.
SIGTERM and Ctrl-C let running answers finish; the exit code is 143 or 130.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sft.common.errors import InputError, ServiceError

TOKEN_VARIABLE = "LIGHTNING_SFT_SERVE_TOKEN"
SHORTEST_TOKEN = 16


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


def serve(
    *,
    ckpt_path: str,
    compare_ckpt_path: str | None = None,
    name: str | None = None,
    compare_name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    generation: Answers = DEFAULT_ANSWERS,
    limits: Limits = DEFAULT_LIMITS,
    architecture: str | dict[str, Any] | None = None,
    prompt_style: str | dict[str, str] | None = None,
    header_in_prompt: bool | None = None,
    device: str = "auto",
) -> None:
    """Serve a model over OpenAI's API, with a page at /.

    Args:
        ckpt_path: A checkpoint, or weights (.pth, .safetensors, folder, or a name such as
            gpt2-medium), which also need an architecture.
        compare_ckpt_path: A second one, to compare on the page; a model of its own in the API.
        name: What the API calls the model; by default the run's name.
        compare_name: Likewise, for the second.
        host: Address to listen on. Anything but this machine's own needs a token of at least 16
            characters in LIGHTNING_SFT_SERVE_TOKEN.
        port: 0 takes a free one.
        generation: How answers are written where a request does not say.
        limits: What clients may cost.
        architecture: For weights that do not say it themselves.
        prompt_style: For weights away from their run folder; alpaca by default.
        header_in_prompt: Likewise.
        device: auto, cpu, cuda or mps.
    """
    loopback, token = check_address(host)
    paths = [ckpt_path, *([compare_ckpt_path] if compare_ckpt_path else [])]
    names = choose_names(paths, [name, compare_name])
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"serve: {package} is not installed; pip install 'lightning-sft[serve]'"
            )
    with listen(host, port) as listener:
        # Imported here: `serve --help` and a refusal need no torch.
        from lightning_sft.commands.chat import choose_device, load_for_answers
        from lightning_sft.serving.server import build_server

        place = choose_device(device)
        loaded = {}
        for one, path in zip(names, paths, strict=True):
            model, style = load_for_answers(path, architecture, prompt_style, header_in_prompt)
            loaded[one] = (model.to(place), style)
        server = build_server(loaded, generation, limits, token, loopback)
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {' and '.join(names)} on http://{shown}:{listener.getsockname()[1]} "
            "(the page is at /, the API under /v1; Ctrl-C ends)",
            flush=True,
        )
        server.run(sockets=[listener])


def check_address(host: str) -> tuple[bool, str | None]:
    """Whether `host` is this machine's own, and the token that the environment holds.

    Raises:
        InputError: Others could reach the server and there is no token, or a weak one.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False  # a name; where it leads may change
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not loopback:
        raise InputError(
            f"serve: on {host} others can reach the server; put a token of at least "
            f"{SHORTEST_TOKEN} characters into {TOKEN_VARIABLE}, or leave --host at 127.0.0.1"
        )
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or " " in token):
        raise InputError(
            f"serve: the token in {TOKEN_VARIABLE} must be at least {SHORTEST_TOKEN} ASCII "
            "characters without spaces"
        )
    return loopback, token


def choose_names(paths: Sequence[str], given: Sequence[str | None]) -> list[str]:
    """What the API calls each model: the run's name, with as much more as tells two apart.

    Raises:
        InputError: Two models would have one name, or a name is none.
    """
    levels = [_levels(Path(path)) for path in paths]
    names = [level[0] for level in levels]
    for depth in range(1, 3):
        if len(set(names)) < len(names):
            names = ["-".join(level[: depth + 1]) for level in levels]
    names = [name or found for name, found in zip(given, names, strict=False)]
    for name in names:
        if not name.isprintable() or " " in name or len(name) > 100:
            raise InputError(f"serve: name {name!r} must be up to 100 characters without spaces")
    if len(set(names)) < len(names):
        raise InputError(f"serve: both models are called {names[0]!r}; give --compare_name")
    return names


def _levels(path: Path) -> list[str]:
    """runs/NAME/version_0/checkpoints/step-9.ckpt → NAME, version_0, step-9."""
    stem = path.stem if path.suffix in (".ckpt", ".pth", ".safetensors") else path.name
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if folder.name.startswith("version_") and folder.parent.name:
        return [folder.parent.name, folder.name, stem]
    return [stem or str(path)]


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a taken port is known before a model is read.

    Raises:
        InputError: There is no such port or address.
        ServiceError: It is taken, or not ours to take.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port: {port} is outside 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise InputError(f"host: {host} is no address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServiceError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener
