"""OpenAI's API, the way in: a JSON body → a checked request, or an error in the API's own shape.

Whatever a client asks for is done or refused by name, never dropped: unknown fields and values that
this server cannot honour end in status 400. `null`, and values that ask for nothing (`n: 1`,
`logit_bias: {}`), count as absent.

This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_sft.data.conversation import Conversation
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.decoding.settings import GenerationConfig
from lightning_sft.serving.api_error import ApiError, invalid
from lightning_sft.serving.conversation import read_conversation
from lightning_sft.serving.settings import MAX_TEMPERATURE, Limits

MAX_STOPS = 4
MAX_SEED = 2**63 - 1
SMALLEST_TOP_P = 1e-9  # what a top_p of 0 becomes: some clients say so and mean greedy
# Fields that change nothing here, whatever they hold: they are notes to the service.
NOTES = {"user", "metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier"}
# Fields that are refused unless they ask for what is done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
SHARED = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream"}
SHARED |= {"stream_options", "logprobs"}
CHAT = SHARED | {"messages", "input", "max_completion_tokens", "top_logprobs"}
COMPLETION = SHARED | {"prompt"}


@dataclass(frozen=True)
class AnswerRequest:
    """What a client wants.

    Args:
        prompts: Texts or token ids, one answer each; none where there is a conversation.
        conversation: Of a chat request, which is answered as a message, with the style's header and
            closing mark taken off.
        settings: The client's, and the server's where it does not say.
        top_logprobs: None where log-probabilities are not wanted.
    """

    model: str
    prompts: list[str | list[int]]
    conversation: Conversation | None
    settings: GenerationConfig
    stop: list[str]
    stream: bool
    include_usage: bool
    top_logprobs: int | None

    @property
    def chat(self) -> bool:
        """Whether it is one to `/v1/chat/completions`."""
        return self.conversation is not None


@dataclass(frozen=True)
class Rules:
    """What requests are checked against: models with their styles, defaults, limits."""

    styles: Mapping[str, PromptStyle]
    generation: GenerationConfig
    limits: Limits


def read_json(body: bytes) -> dict[str, Any]:
    """A request's body.

    Raises:
        ApiError: It is no JSON object.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return {key: item for key, item in value.items() if item is not None}


def read_request(body: dict[str, Any], rules: Rules, chat: bool) -> AnswerRequest:
    """Check the body of `/v1/chat/completions` (chat) or of `/v1/completions`.

    Raises:
        ApiError: 400 or 404, naming the field.
    """
    _refuse_unknown(body, CHAT if chat else COMPLETION)
    model = find_model(body, rules.styles)
    stream = _boolean(body, "stream")
    options = body.get("stream_options", {})
    if "stream_options" in body and not stream:
        raise invalid("stream_options", "is only allowed with stream: true")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise invalid("stream_options", "must be an object with include_usage")
    return AnswerRequest(
        model=model,
        prompts=[] if chat else _read_prompts(body, rules),
        conversation=read_conversation(body) if chat else None,
        settings=_read_settings(body, rules, chat),
        stop=_read_stop(body),
        stream=stream,
        include_usage=_boolean(options, "include_usage"),
        top_logprobs=_read_logprobs(body, chat),
    )


def _read_settings(body: dict[str, Any], rules: Rules, chat: bool) -> GenerationConfig:
    """How to write the answer, the server's own way where the client does not say."""
    default, most = rules.generation, rules.limits.max_tokens
    limit = _integer(body, "max_tokens", 1, most, None)
    if chat:
        newer = _integer(body, "max_completion_tokens", 1, most, None)
        if limit and newer and limit != newer:
            raise invalid("max_tokens", "and max_completion_tokens differ; give one of them")
        limit = newer or limit
    top_p = _number(body, "top_p", 0.0, 1.0, default.top_p)
    return dataclasses.replace(
        default,
        max_new_tokens=limit or min(default.max_new_tokens, most),
        temperature=_number(body, "temperature", 0.0, MAX_TEMPERATURE, default.temperature) or 0.0,
        top_k=_integer(body, "top_k", 1, None, default.top_k),
        top_p=SMALLEST_TOP_P if top_p == 0.0 else top_p,
        seed=_integer(body, "seed", -MAX_SEED, MAX_SEED, default.seed),
    )


def find_model(body: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """The model asked for; the first where none is named.

    Raises:
        ApiError: 404 for a model that is not served.
    """
    name = body.get("model", next(iter(names)))
    if not isinstance(name, str) or name not in names:
        message = f"The model {name!r:.100} is not served here; allowed: {', '.join(names)}."
        raise ApiError(404, message, param="model", code="model_not_found")
    return name


def _read_prompts(body: Mapping[str, Any], rules: Rules) -> list[str | list[int]]:
    """A text, token ids, or a list of either."""
    given = body.get("prompt")
    prompts = given if isinstance(given, list) and not _is_ids(given) else [given]
    if not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise invalid(
            "prompt", "must be a text, a list of token ids, or a list of texts or of these"
        )
    if "" in prompts:
        raise invalid("prompt", "is empty")
    if len(prompts) > rules.limits.prompts:
        raise invalid("prompt", f"holds {len(prompts)} prompts; at most {rules.limits.prompts}")
    return list(prompts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _read_stop(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop", [])
    stops: Sequence[Any] = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(item, str) and 0 < len(item) <= 1000 for item in stops)
    ):
        raise invalid("stop", f"must be a text or a list of at most {MAX_STOPS} texts, none empty")
    return stops


def _read_logprobs(body: Mapping[str, Any], chat: bool) -> int | None:
    """Alternatives per token: chat's two fields, or the completions' one."""
    if not chat:
        return _integer(body, "logprobs", 0, 5, None)
    wanted = _boolean(body, "logprobs")
    top = _integer(body, "top_logprobs", 0, 20, None)
    if top is not None and not wanted:
        raise invalid("top_logprobs", "is only allowed with logprobs: true")
    return (top or 0) if wanted else None


def _refuse_unknown(body: Mapping[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in known or name in NOTES:
            continue
        if name not in NEUTRAL:
            message = f"Unknown field {name!r:.100}; allowed: {', '.join(sorted(known))}."
            raise ApiError(400, message, param=name[:100], code="unknown_parameter")
        if not any(type(value) is type(same) and value == same for same in NEUTRAL[name]) and not (
            isinstance(value, float) and value == 0.0 and 0 in NEUTRAL[name]
        ):
            allowed = " or ".join(json.dumps(same) for same in NEUTRAL[name]) or "nothing"
            message = f"{name} is not supported here; allowed: {allowed}."
            raise ApiError(400, message, param=name, code="unsupported_parameter")


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise invalid(name, "must be true or false")
    return value


def _integer(
    body: Mapping[str, Any], name: str, low: int, high: int | None, default: int | None
) -> int | None:
    value = body.get(name, default)
    if value is default:
        return default
    if type(value) is not int or value < low or (high is not None and value > high):
        limits = f"from {low} to {high}" if high is not None else f">= {low}"
        raise invalid(name, f"must be an integer {limits}")
    return value


def _number(
    body: Mapping[str, Any], name: str, low: float, high: float, default: float | None
) -> float | None:
    value = body.get(name, default)
    if value is default:
        return default
    if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
        raise invalid(name, f"must be a number from {low:g} to {high:g}")
    return float(value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)
