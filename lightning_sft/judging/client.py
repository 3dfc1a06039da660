"""Asking a judge over HTTP: what is sent again, what stops, and where the key goes.

`Judge.ask` sends one prompt and returns the reply, or the reason why there is none:

- sent again with growing waits: 408, 429, any 5xx, broken connections, timeouts, replies that
  break off, an error under HTTP 200. `Retry-After` is obeyed;
- stops the whole run: 401, 403, a missing model or path, a redirect, a used-up quota;
- concerns this one prompt only: other 4xx, such as a prompt longer than the judge's context.

Redirects are not followed and `.netrc` is not read: the key goes to the configured host or nowhere.

    >>> judge = Judge(JudgeConfig(model="llama3"))
    >>> judge.ask("Say 85.", schema=None, seed=123).text
"""

from __future__ import annotations

import email.utils
import random
import re
import threading
import time
import urllib.parse
from typing import Any, NamedTuple

import requests
import urllib3

from lightning_sft.common.deadline import Deadline, DeadlineError, watched_session
from lightning_sft.common.errors import ServiceError, hide_keys, printable
from lightning_sft.judging.judge import JudgeConfig, environment_key, is_loopback
from lightning_sft.judging.protocol import (
    RAW_PATH,
    PassingError,
    RefusedError,
    chat_body,
    chat_path,
    error_words,
    raw_body,
    read_chat,
)

CONNECT_TIMEOUT = 4.0  # seconds; with `localhost` tried as ::1 and as 127.0.0.1, still under ten
LONGEST_WAIT = 300.0  # seconds; a server that asks for more gets no further try
MAX_REPLY_BYTES = 4 << 20
# After this many failures in a row each prompt gets one try, until one succeeds again: a server
# that is gone then costs seconds per prompt and not its whole series of waits.
PATIENCE = 5


class Reply(NamedTuple):
    """What came back. `reason` says why it cannot count; `text` may be there all the same."""

    text: str | None
    reason: str | None
    seconds: float
    held_to_schema: bool


class Judge:
    """A judge behind a URL. Safe to share between threads."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.stopped = threading.Event()  # set it to end every wait at once
        self.address = _base_address(config)
        self._key = environment_key(config)
        self._sessions = threading.local()
        self._takes_schema = config.json_schema
        self._failures_in_row = 0

    def ask(
        self, prompt: str, schema: dict[str, Any] | None, seed: int, raw: bool = False
    ) -> Reply:
        """One prompt, one reply.

        Args:
            raw: Ollama puts no template around the prompt.

        Raises:
            ServiceError: Nothing that this judge is asked can work (see the module's docstring).
        """
        start = time.monotonic()
        tries = 1 if self._failures_in_row >= PATIENCE else self.config.retries + 1
        text, reason = None, ""
        for number in range(tries):
            try:
                text, reason = self._ask_once(prompt, schema, seed, raw)
            except RefusedError as error:
                reason = str(error)
            except PassingError as error:
                reason = str(error)
                backoff = self.config.backoff * 2**number * random.uniform(1, 1.25)
                wait = backoff if error.wait is None else error.wait
                if number + 1 < tries and wait <= LONGEST_WAIT and not self.stopped.wait(wait):
                    continue
                self._failures_in_row += 1
                break
            self._failures_in_row = 0
            break
        seconds = round(time.monotonic() - start, 3)
        held = schema is not None and self._takes_schema
        return Reply(self._fit_to_keep(text), self.clean(reason) or None, seconds, held)

    def _ask_once(
        self, prompt: str, schema: dict[str, Any] | None, seed: int, raw: bool
    ) -> tuple[str | None, str]:
        schema = schema if self._takes_schema else None
        body = chat_body(self.config, prompt, schema, seed)
        path = chat_path(self.config)
        if raw:
            body, path = raw_body(self.config, prompt, seed), RAW_PATH
        url = self.address + path
        try:
            content = self.send("POST", url, body, self.config.timeout)
        except RefusedError as error:
            if schema is None or not re.search("schema|format|grammar", str(error), re.I):
                raise
            self._takes_schema = False
            return self._ask_once(prompt, None, seed, raw)
        return read_chat(self.config, content)

    def send(self, method: str, url: str, body: Any, timeout: float) -> bytes:
        """The body of a 200, within `timeout` seconds.

        Raises:
            PassingError, RefusedError, ServiceError: What another status or a broken connection
                stands for.
        """
        limits = (min(CONNECT_TIMEOUT, timeout), timeout)
        options: dict[str, Any] = {"timeout": limits, "allow_redirects": False, "stream": True}
        session = self._session()
        try:
            with (
                Deadline(timeout),
                session.request(method, url, json=body, **options) as response,
            ):
                content = _read_body(response)
        except requests.ConnectTimeout:
            raise PassingError(f"no connection within {limits[0]:g} s") from None
        except (DeadlineError, requests.Timeout, urllib3.exceptions.ReadTimeoutError):
            raise PassingError(f"no whole reply within {timeout:g} s") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise PassingError(f"the connection failed: {_cause(error)}") from None
        if response.status_code != 200:
            self._raise_status(response, content)
        return content

    def _raise_status(self, response: requests.Response, content: bytes) -> None:
        status = response.status_code
        words = self.clean(error_words(content))
        place = f"the judge at {self.address} answers HTTP {status}"
        if status == 401:  # without its words: some servers repeat parts of the key in them
            raise ServiceError(f"{place}; put a valid key into LIGHTNING_SFT_JUDGE_KEY")
        if status == 403:
            raise ServiceError(f"{place}; it does not let this key in ({words})")
        if 300 <= status < 400:
            raise ServiceError(f"{place}; redirects are not followed, give the final address")
        if status == 404:
            raise ServiceError(f"{place}: no such model or path ({words}); {self.model_advice()}")
        if status == 429 and "insufficient_quota" in words:
            raise ServiceError(f"{place}: the account's quota is used up ({words})")
        if status in (408, 429) or status >= 500:
            raise PassingError(f"HTTP {status}: {words}", _retry_after(response))
        if re.search("context|too long", words, re.I):
            raise RefusedError(f"the prompt does not fit into the judge's context ({words})")
        raise RefusedError(f"HTTP {status}: {words}")

    def model_advice(self) -> str:
        """How to come by a model that is missing."""
        if self.config.protocol == "ollama":
            return f"`ollama pull {self.config.model}` fetches it"
        return "--judge.model names one that it serves"

    def _session(self) -> requests.Session:
        """One per thread, since a session's connections are not made to be shared."""
        if not hasattr(self._sessions, "own"):
            session = watched_session()
            session.auth = _Auth(self._key)
            session.headers["Accept-Encoding"] = "identity"
            # Proxies are for the world outside, not for a judge on this machine.
            session.trust_env = not is_loopback(self.address)
            self._sessions.own = session
        return self._sessions.own

    def _fit_to_keep(self, text: str | None) -> str | None:
        """`text` as it may be written down: UTF-8 and without the key.

        JSON can spell half a character (a lone surrogate), which no file takes; two halves that
        came in two pieces of a stream are one character again.
        """
        if not text:
            return text
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return hide_keys(text.replace(self._key, "***") if self._key else text)

    def clean(self, text: str) -> str:
        """A server's words as one short line, without the key and harmless to a terminal."""
        return printable(" ".join((self._fit_to_keep(text) or "").split()))[:200]


class _Auth(requests.auth.AuthBase):
    """Sets the key. Being there even without one keeps requests from looking into .netrc."""

    def __init__(self, key: str | None) -> None:
        self.key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def _base_address(config: JudgeConfig) -> str:
    """The address that paths are added to; that of the chat call itself is understood too."""
    base = config.url.rstrip("/")
    for ending in ("/api/chat", "/api", "/chat/completions"):
        base = base.removesuffix(ending)
    bare = urllib.parse.urlsplit(base).path in ("", "/")
    return base + "/v1" if bare and config.protocol == "openai" else base


def _read_body(response: requests.Response) -> bytes:
    """The body, unless it is endless. The deadline around the exchange ends one that trickles."""
    content = bytearray()
    while chunk := response.raw.read1(65536):
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            raise PassingError(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB")
    return bytes(content)


def _retry_after(response: requests.Response) -> float | None:
    """Seconds to wait, from a `Retry-After` in seconds or as a date."""
    value = response.headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _cause(error: BaseException) -> str:
    """The innermost reason, without the layers of libraries around it."""
    while error.__context__ is not None:
        error = error.__context__
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or type(error).__name__
