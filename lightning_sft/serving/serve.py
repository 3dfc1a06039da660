"""Serve one or two fine-tuned models over OpenAI's API, with a page to talk to them.

    python -m lightning_sft serve --ckpt_path runs/quickstart/version_0/gpt2-7M-sft.pth

Then open http://127.0.0.1:8000, or point any OpenAI client at http://127.0.0.1:8000/v1. Only this
machine can reach it, unless `--host` says otherwise, and that needs a token in the environment.
SIGTERM and Ctrl-C let running answers finish; the exit code is 143 or 130.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.decoding.settings import GenerationConfig
from lightning_sft.serving.settings import (
    DEFAULT_GENERATION,
    DEFAULT_LIMITS,
    Limits,
    check_generation,
)

TOKEN_VARIABLE = "LIGHTNING_SFT_SERVE_TOKEN"
SHORTEST_TOKEN = 16


def serve(
    *,
    ckpt_path: str,
    compare_ckpt_path: str | None = None,
    name: str | None = None,
    compare_name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    generation: GenerationConfig = DEFAULT_GENERATION,
    limits: Limits = DEFAULT_LIMITS,
    architecture: str | dict[str, Any] | None = None,
    prompt_style: str | dict[str, str] | None = None,
    header_in_prompt: bool | None = None,
    weights: str | None = None,
    compare_weights: str | None = None,
    device: str = "auto",
) -> int:
    """Serve a model over OpenAI's API, with a page at /.

    Args:
        ckpt_path: A checkpoint, a run folder, or weights (.pth, .safetensors, folder, or a name
            such as gpt2-medium or the hub's owner/name).
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
        weights: Where the base of a LoRA checkpoint is now, if it was moved.
        compare_weights: Likewise, for the second.
        device: auto, cpu, cuda or mps.
    """
    loopback, token = check_address(host)
    check_generation(generation)
    paths = [ckpt_path, *([compare_ckpt_path] if compare_ckpt_path else [])]
    names = choose_names(paths, [name, compare_name])
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"serve: {package} is not installed; {files.install_command('serve')}")
    with listen(host, port) as listener:
        # Imported here: `serve --help` and a refusal need no torch.
        from lightning_sft.decoding.answering import load_model
        from lightning_sft.serving.server import build_server

        loaded = {}
        for one, path, base in zip(names, paths, [weights, compare_weights], strict=False):
            loaded[one] = load_model(
                path,
                device=device,
                architecture=architecture,
                prompt_style=prompt_style,
                header_in_prompt=header_in_prompt,
                weights=base,
            )
        server = build_server(loaded, generation, limits, token, loopback)
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {' and '.join(names)} on http://{shown}:{listener.getsockname()[1]} "
            "(the page is at /, the API under /v1; Ctrl-C ends)",
            flush=True,
        )
        server.run(sockets=[listener])
    # By now the signal has taken its usual course, unless whoever started us has us ignore it, as a
    # shell does with Ctrl-C for what runs in the background.
    return 128 + server.ended_by if server.ended_by else 0


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
    for depth in range(1, 4):
        found = ["-".join(level[:depth]) for level in levels]
        names = [name or own for name, own in zip(given, found, strict=False)]
        if len(set(names)) == len(names):
            break
    for name in names:
        if not name.isprintable() or " " in name or len(name) > 100:
            raise InputError(f"serve: name {name!r} must be up to 100 characters without spaces")
    if len(set(names)) < len(names):
        raise InputError(f"serve: both models are called {names[0]!r}; give --compare_name")
    return names


def _levels(path: Path) -> list[str]:
    """runs/NAME/version_0/checkpoints/step-9.ckpt → NAME, version_0, step-9.

    A run folder gives the first two.
    """
    path = path.resolve() if path.is_dir() else path
    if path.name.startswith("version_") and path.parent.name:
        return [path.parent.name, path.name]
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
