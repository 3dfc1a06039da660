"""A Hugging Face hub on 127.0.0.1, and a second server where it keeps large files.

    >>> with ModelHub(monkeypatch, tmp_path / "cache") as hub:
    ...     hub.add("owner/name", {"config.json": b"{}", "model.safetensors": weights})
    ...     fetch("owner/name")

As the real one does, it answers for a large file with a redirect to another host, which is told the
size and sha256 of the file and not the token.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from lightning_sft.common.hub import CONFIG, EXTRAS, INDEX, TOKENIZER, WEIGHTS
from support.hub import Hub, Reply, Request

COMMIT, OTHER_COMMIT = "c0" * 20, "d1" * 20
TOKEN = "hf_plantedPlantedPlantedPlanted123"


class ModelHub:
    """Both servers, with an empty cache and no token; a context manager.

    Args:
        cache: The folder that stands for HF_HUB_CACHE.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.server, self.storage, self.cache = Hub(), Hub(), cache
        self.monkeypatch = monkeypatch
        self.tokens: dict[str, str] = {}  # who may read a gated repository

    def __enter__(self) -> ModelHub:
        with contextlib.ExitStack() as stack:
            for server in (self.server, self.storage):
                stack.enter_context(server)
            self._stack = stack.pop_all()
        self.move(self.server.address)
        for name, value in {
            "HF_HUB_CACHE": str(self.cache),
            "HF_TOKEN_PATH": str(self.cache / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            self.monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            self.monkeypatch.delenv(name, raising=False)
        huggingface_hub.close_session()
        return self

    def __exit__(self, *error: object) -> None:
        huggingface_hub.close_session()
        self._stack.close()

    @property
    def requests(self) -> list[Request]:
        """Whatever either server was asked."""
        return [*self.server.requests, *self.storage.requests]

    def forget(self) -> None:
        """Forget the requests so far."""
        self.server.requests.clear()
        self.storage.requests.clear()

    def asked_for(self) -> set[str]:
        """The names of the files that the hub was asked for."""
        return {request.path.rpartition("/")[2] for request in self.server.requests}

    def move(self, address: str) -> None:
        """Have the library look for the hub elsewhere, as HF_ENDPOINT does."""
        self.set("ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        self.set("HUGGINGFACE_CO_URL_TEMPLATE", template)

    def set(self, name: str, value: Any) -> None:
        """Change one of huggingface_hub's constants."""
        self.monkeypatch.setattr(constants, name, value)

    def add(
        self,
        name: str,
        content: Path | Mapping[str, bytes],
        *,
        revision: str = "main",
        commit: str = COMMIT,
        token: str | None = None,
    ) -> None:
        """Put a repository on the hub.

        Args:
            content: A folder, or files by name.
            token: Whoever has another, or none, is sent away: the repository is gated.
        """
        if isinstance(content, Path):
            content = {path.name: path.read_bytes() for path in content.iterdir()}
        absent = {CONFIG, *TOKENIZER, *EXTRAS, WEIGHTS, INDEX} - content.keys()
        for place in (revision, commit):
            folder = f"/{name}/resolve/{place}"
            for file, body in content.items():
                self.server.default[f"{folder}/{file}"] = self._answer(file, body, commit, token)
            for file in absent:
                error = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
                self.server.default[f"{folder}/{file}"] = Reply(404, b"", error)

    def storage_path(self, body: bytes) -> str:
        """Where a large file lies on the second server."""
        return f"/blobs/{hashlib.sha256(body).hexdigest()}"

    def _answer(self, file: str, body: bytes, commit: str, token: str | None) -> Any:
        headers = {"X-Repo-Commit": commit}
        if file.endswith(".safetensors"):
            digest = hashlib.sha256(body).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
            headers["Location"] = self.storage.serve(self.storage_path(body), body)
            reply = Reply(302, b"", headers)
        else:
            digest = hashlib.sha1(b"blob %d\x00" % len(body) + body).hexdigest()
            reply = Reply(200, body, headers | {"ETag": f'"{digest}"'})
        gate = Reply(403, b"", {"X-Error-Code": "GatedRepo"})

        def answer(request: Request) -> Reply:
            is_let_in = token is None or request.headers.get("authorization") == f"Bearer {token}"
            return reply if is_let_in else gate

        return answer


def damage(path: Path) -> None:
    """Flip a bit of a file in the cache, some time after it was fetched."""
    blob = path.resolve()
    body = bytearray(blob.read_bytes())
    body[-1] ^= 1
    changed = blob.stat().st_mtime_ns + 10**9  # clocks of files tick slower than tests run
    blob.write_bytes(bytes(body))
    os.utime(blob, ns=(changed, changed))
