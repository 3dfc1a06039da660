"""Who judges: the settings of `--judge.*`, checked before anything is asked.

    python -m lightning_sft score RESPONSES.json --judge.protocol openai --judge.url https://api.openai.com

`prompt.py` says what a judge is asked and how its reply is read, `protocol.py` how it
is spoken to, `probe.py` whether it is there; `client.py` does the asking, `asking.py`
keeps what it said. API keys come from the environment alone.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any, Literal

from lightning_sft.common.errors import KEY_SHAPE, InputError

# What keys look like: OpenAI's and its imitators', Hugging Face's, Anthropic's and Google's.
KEY_ADVICE = (
    "an API key is refused in the config and in a URL, which end up in files and logs; set "
    "LIGHTNING_SFT_JUDGE_KEY (or OPENAI_API_KEY) in the environment"
)


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges, and how it is asked.

    Args:
        protocol: `ollama`, or `openai` for OpenAI, llama.cpp's server, vLLM and their like.
        url: Where the server listens. A key goes into the environment, never here.
        model: Its name on that server.
        prompt: `chapter` (0 to 100), `rubric` (1 to 5 with criteria), or a file with a template
            of your own that holds `{response}` and any of `{question}` (the formatted instruction
            and input), `{instruction}`, `{input}` and `{output}`.
        low: Lowest score of a template of your own.
        high: Its highest score.
        temperature: 0 is greedy.
        seed: First seed; repeats take the following ones.
        num_ctx: Context that Ollama gives the judge, in tokens.
        max_tokens: Longest reply, in tokens; null asks for no limit.
        json_schema: Ask the server to hold the reply to a JSON schema, where it can. False, with
            max_tokens null, asks as the chapter does: same prompt, same options.
        stream: Take the reply piece by piece.
        timeout: Longest wait for one whole reply, in seconds.
        retries: How often a request that failed on the way is sent again.
        backoff: Wait before the first retry, in seconds; doubles each time.
        load_timeout: How long to wait for a judge that is still loading its model, in seconds.
        concurrency: Requests under way at once.
        api_key: Refused; set LIGHTNING_SFT_JUDGE_KEY in the environment.
    """

    protocol: Literal["ollama", "openai"] = "ollama"
    url: str = "http://localhost:11434"
    model: str = "llama3"
    prompt: str = "chapter"
    low: int = 0
    high: int = 100
    temperature: float = 0.0
    seed: int = 123
    num_ctx: int = 2048
    max_tokens: int | None = 512
    json_schema: bool = True
    stream: bool = True
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 1.0
    load_timeout: float = 60.0
    concurrency: int = 1
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None:
            raise InputError(f"judge.api_key: {KEY_ADVICE}")
        _check_url(self.url)
        for name in ("model", "prompt"):
            if KEY_SHAPE.search(getattr(self, name)):
                raise InputError(f"judge.{name}: looks like an API key; {KEY_ADVICE}")
        if self.protocol not in ("ollama", "openai"):
            raise InputError(f"judge.protocol: {self.protocol!r}; allowed: ollama, openai")
        least = {"concurrency": 1, "num_ctx": 1, "retries": 0, "backoff": 0, "temperature": 0}
        for name, lowest in least.items():
            if not getattr(self, name) >= lowest:
                raise InputError(f"judge.{name}: {getattr(self, name)}; it is at least {lowest}")
        for name in ("timeout", "load_timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"judge.{name}: {getattr(self, name)}; it is above 0 seconds")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"judge.max_tokens: {self.max_tokens}; it is at least 1, or null")
        if self.low >= self.high:
            raise InputError(f"judge.low: {self.low} is not below judge.high, {self.high}")

    def identity(self) -> dict[str, Any]:
        """What makes two judges the same one, as kept with every score."""
        return {"protocol": self.protocol, "url": self.url.rstrip("/"), "model": self.model}

    def options(self) -> dict[str, Any]:
        """The settings that can change a reply, as kept with every score."""
        names = ["temperature", "max_tokens", "json_schema"]
        if self.protocol == "ollama":
            names.append("num_ctx")
        return {name: getattr(self, name) for name in names}


def environment_key(config: JudgeConfig) -> str | None:
    """The API key to send, from the environment.

    LIGHTNING_SFT_JUDGE_KEY goes to whatever judge is configured. OPENAI_API_KEY, which is often
    set for other programs, goes only to servers that speak OpenAI's protocol, and there only over
    https or to this machine.

    Raises:
        InputError: The key has characters that no HTTP header can carry.
    """
    names = ["LIGHTNING_SFT_JUDGE_KEY"]
    safe = config.url.startswith("https:") or is_loopback(config.url)
    if config.protocol == "openai" and safe:
        names.append("OPENAI_API_KEY")
    name, key = next(((n, os.environ[n].strip()) for n in names if os.environ.get(n)), ("", ""))
    if not key:
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise InputError(f"{name}: the key has blanks or characters that no HTTP header can carry")
    return key


def is_loopback(url: str) -> bool:
    """Whether `url` points at this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InputError("judge.url: not a URL; give http://host:port") from None
    if parts.username or parts.password or parts.query or parts.fragment or KEY_SHAPE.search(url):
        raise InputError(f"judge.url: holds more than an address; {KEY_ADVICE}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"judge.url: {url!r} is not http://host:port or https://host")
