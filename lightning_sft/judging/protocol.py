"""The two languages judges speak, as pure functions: prompt → request body, reply body → text.

`ollama` is POST /api/chat (/api/generate for raw prompts), whose reply is one JSON object or one
per line; `openai` is POST /v1/chat/completions, one JSON object or server-sent events. A reply may
come streamed or whole whatever was asked for; both are understood. Nothing here touches the
network.

Sources: Ollama's docs/api.md; OpenAI's reference of chat completions.
"""

from __future__ import annotations

import json
from typing import Any

from lightning_sft.judging.judge import JudgeConfig

RAW_PATH = "/api/generate"  # Ollama's


class PassingError(Exception):
    """Failed on the way; may work when sent again, after `wait` seconds if the server said so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class RefusedError(Exception):
    """The server will not answer this prompt, however often it is sent."""


def chat_path(config: JudgeConfig) -> str:
    """Where prompts are posted, below the base address."""
    return "/api/chat" if config.protocol == "ollama" else "/chat/completions"


def chat_body(
    config: JudgeConfig, prompt: str, schema: dict[str, Any] | None, seed: int
) -> dict[str, Any]:
    """The request for one prompt, in the judge's protocol."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": config.stream,
    }
    sampling: dict[str, Any] = {"temperature": config.temperature, "seed": seed}
    if config.protocol == "ollama":
        # Ollama takes these under `options`; at the top level it ignores them without a word.
        body["options"] = sampling | {"num_ctx": config.num_ctx}
        # Else it cuts a prompt that is too long and answers as if it had read it all.
        body["truncate"] = False
        if config.max_tokens is not None:
            body["options"]["num_predict"] = config.max_tokens
        if schema:
            body["format"] = schema
        return body
    body |= sampling
    if config.max_tokens is not None:
        body["max_tokens"] = config.max_tokens
    if schema:
        named = {"name": "verdict", "strict": True, "schema": schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return body


def raw_body(config: JudgeConfig, prompt: str, seed: int) -> dict[str, Any]:
    """Ollama's request for a prompt that goes to the model as it is."""
    body = chat_body(config, prompt, None, seed)
    del body["messages"]
    return body | {"prompt": prompt, "raw": True}


def read_chat(config: JudgeConfig, content: bytes) -> tuple[str, str]:
    """The reply's text, and the reason why it cannot count (empty when it can).

    Raises:
        PassingError: The reply broke off, is an error under HTTP 200, or is not in this protocol.
    """
    read = _read_ollama if config.protocol == "ollama" else _read_openai
    return read(config, content)


def error_words(content: bytes) -> str:
    """What the server says is wrong, in whichever of the usual shapes it says it."""
    text = content.decode("utf-8", errors="replace")
    try:
        error = json.loads(text)["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return text or "no explanation"
    if isinstance(error, dict):
        kinds = [error[key] for key in ("code", "type") if isinstance(error.get(key), str)]
        return " ".join([str(error.get("message", "")), *kinds]).strip()
    return str(error)


def model_names(config: JudgeConfig, listing: Any) -> list[str] | None:
    """The models in the answer of GET /api/tags or /v1/models; None where it is not one."""
    key, name = ("models", "name") if config.protocol == "ollama" else ("data", "id")
    items = _as_dict(listing).get(key)
    if not isinstance(items, list):
        return None
    return [str(item[name]) for item in items if isinstance(item, dict) and name in item]


def _read_ollama(config: JudgeConfig, content: bytes) -> tuple[str, str]:
    pieces = _json_objects(content)
    # A chat has messages, a raw answer does not.
    texts = [
        _as_dict(piece.get("message", {"content": piece.get("response")})).get("content")
        for piece in pieces
    ]
    last = pieces[-1]
    if not last.get("done"):
        raise PassingError("the reply broke off before its end")
    text, reason = _finish(texts, last.get("done_reason"), content)
    # Servers too old to know `truncate` fill the context to the brim.
    count = last.get("prompt_eval_count")
    if isinstance(count, int) and count >= config.num_ctx:
        reason = f"the prompt does not fit into the judge's context, num_ctx {config.num_ctx}"
    return text, reason


def _read_openai(config: JudgeConfig, content: bytes) -> tuple[str, str]:
    finish, texts, refusals = None, [], []
    for piece in _json_objects(content):
        choices = piece.get("choices")
        choice = _as_dict(choices[0]) if isinstance(choices, list) and choices else {}
        message = _as_dict(choice.get("message") or choice.get("delta"))
        texts.append(message.get("content"))
        refusals.append(message.get("refusal"))
        finish = choice.get("finish_reason") or finish
    if finish is None:
        raise PassingError("the reply broke off before its end")
    refusal = "".join(part for part in refusals if isinstance(part, str))
    if refusal and not any(texts):
        return refusal, "the judge refused to answer"
    return _finish(texts, finish, content)


def _finish(texts: list[Any], finish: Any, content: bytes) -> tuple[str, str]:
    found = [text for text in texts if isinstance(text, str)]
    if finish == "length":
        return "".join(found), "the reply was cut for length; raise --judge.max_tokens"
    if finish == "content_filter":
        return "".join(found), "the server's content filter held the reply back"
    if not found:
        return content.decode("utf-8", errors="replace")[:2000], "the reply has no content field"
    return "".join(found), ""


def _json_objects(content: bytes) -> list[dict[str, Any]]:
    """The objects of a reply: one JSON text, one object per line, or server-sent events."""
    text = content.decode("utf-8", errors="replace")
    try:
        pieces = [json.loads(text)]
    except RecursionError:
        pieces = []
    except ValueError:
        lines = (line.strip().removeprefix("data:").strip() for line in text.split("\n"))
        try:
            pieces = [json.loads(line) for line in lines if line.startswith("{")]
        except (ValueError, RecursionError):
            raise PassingError("the reply broke off in the middle of its JSON") from None
    if not pieces or not all(isinstance(piece, dict) for piece in pieces):
        raise PassingError("the reply is not what this protocol sends; check --judge.protocol")
    for piece in pieces:
        if piece.get("error"):
            words = error_words(json.dumps(piece).encode())
            raise PassingError(f"an error under HTTP 200: {words}")
    return pieces


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
