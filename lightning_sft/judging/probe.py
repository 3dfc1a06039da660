"""A look at the judge before the first question, so that nothing is started in vain.

Tells apart, within ten seconds, no server, another protocol, a refused key, no such model, and a
model that is still loading, which is waited for.

    >>> probe(Judge(JudgeConfig(model="llama3")))

Sources: Ollama's docs/api.md (GET /api/tags; a chat without messages loads the model); OpenAI's
reference (GET /v1/models); llama.cpp's tools/server/README.md (GET /health).
"""

from __future__ import annotations

import json
import time

from lightning_sft.common.errors import ServiceError
from lightning_sft.judging.client import CONNECT_TIMEOUT, Judge
from lightning_sft.judging.protocol import PassingError, RefusedError, chat_path, model_names


def probe(judge: Judge) -> None:
    """Check that the judge is there and has its model; wait for a model that is loading.

    Raises:
        ServiceError: It is not, has not, or still loads it after `load_timeout`.
    """
    if judge.config.protocol == "ollama":
        _check_model(judge, _get(judge, "/api/tags"), "/api/tags")
        _load_model(judge)
        return
    # llama.cpp lists its model while it still loads it; /health tells.
    root = judge.address.removesuffix("/v1")
    _get(judge, "/health", root, optional=True)
    # Not every server that speaks OpenAI's protocol lists its models.
    content = _get(judge, "/models", optional=True)
    if content is not None:
        _check_model(judge, content, "/models")


def _get(judge: Judge, path: str, root: str = "", optional: bool = False) -> bytes | None:
    """What is found at `path`; None where it is `optional` and refused or not there.

    A server that answers but is not ready gets until `load_timeout`.
    """
    deadline = time.monotonic() + judge.config.load_timeout
    while True:
        try:
            return judge.send("GET", (root or judge.address) + path, None, CONNECT_TIMEOUT)
        except PassingError as error:
            reason = str(error)
            if not reason.startswith("HTTP "):
                start = "; `ollama serve` starts one" * (judge.config.protocol == "ollama")
                raise ServiceError(f"no judge at {judge.address}: {reason}{start}") from None
            if time.monotonic() > deadline:
                if reason.startswith("HTTP 503"):
                    raise _still_loading(judge) from None
                raise ServiceError(f"the judge at {judge.address} fails: {reason}") from None
            judge.stopped.wait(min(1.0, judge.config.load_timeout / 4))
        except (RefusedError, ServiceError) as error:
            if optional and "HTTP 401" not in str(error):
                return None
            raise ServiceError(str(error)) from None


def _check_model(judge: Judge, content: bytes | None, path: str) -> None:
    try:
        names = model_names(judge.config, json.loads(content or b""))
    except (ValueError, RecursionError):
        names = None
    if names is None:
        raise ServiceError(
            f"{judge.address} answers, but not in {judge.config.protocol}'s protocol (GET {path} "
            "lists no models); check --judge.url and --judge.protocol"
        )
    wanted = judge.config.model
    # Ollama adds the tag `latest` to a name without one.
    if not {wanted, f"{wanted}:latest"} & set(names):
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "") or "none"
        raise ServiceError(
            f"the judge at {judge.address} has no model {wanted!r} (it has: {judge.clean(shown)}); "
            + judge.model_advice()
        )


def _load_model(judge: Judge) -> None:
    """A chat without messages makes Ollama load the model, and returns when it is there."""
    config = judge.config
    body = {"model": config.model, "messages": [], "stream": False}
    body["options"] = {"num_ctx": config.num_ctx}  # another context would load it twice
    try:
        judge.send("POST", judge.address + chat_path(config), body, config.load_timeout)
    except PassingError as error:
        if "no whole reply" in str(error):
            raise _still_loading(judge) from None
        raise ServiceError(
            f"the judge at {judge.address} cannot load {config.model!r}: {error}"
        ) from None
    except RefusedError as error:
        raise ServiceError(f"the judge at {judge.address} refuses to load: {error}") from None


def _still_loading(judge: Judge) -> ServiceError:
    return ServiceError(
        f"the judge at {judge.address} is still loading its model after "
        f"{judge.config.load_timeout:g} s; try again later or raise --judge.load_timeout"
    )
