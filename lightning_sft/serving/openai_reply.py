"""OpenAI's API, the way out: tokens as they come → replies and stream chunks in the API's shapes.

This module does not import torch.
"""

from __future__ import annotations

import codecs
import json
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_sft.decoding.answer_text import AnswerText
from lightning_sft.serving.openai_request import AnswerRequest

if TYPE_CHECKING:
    from lightning_sft.data.tokenizer import Tokenizer

# Why an answer ends → the API's word. An answer cut by the clock is cut for its length.
FINISH_REASONS = {"stop": "stop", "length": "length", "time": "length"}


class TokenLogprobs(NamedTuple):
    """Log-probability of a token, and of the likeliest ones in its place."""

    logprob: float
    top: list[tuple[int, float]]


class Choice:
    """One answer in the making: its text, its token count and what became known of its tokens."""

    def __init__(
        self, index: int, request: AnswerRequest, text: AnswerText, tokenizer: Tokenizer
    ) -> None:
        self.index, self.request, self.text, self.tokenizer = index, request, text, tokenizer
        self.num_tokens = 0
        self.reused_tokens = 0  # of the prompt, which need not be read again
        self.finish_reason: str | None = None
        self._logprobs: list[dict[str, Any]] = []  # not sent yet
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(self, token: int | None, logprobs: TokenLogprobs | None, end: str | None) -> str:
        """Text that has become certain."""
        piece = ""
        if token is not None:
            self.num_tokens += 1
            content = self.tokenizer.token_bytes(token)
            piece = self.text.add(content)
            if logprobs is not None:
                self._logprobs.append(self._describe(content, logprobs))
        if self.text.stopped:
            self.finish_reason = "stop"
        elif end is not None:
            piece += self.text.finish()
            stopped = self.text.stopped  # by a stop string that was found in the rest
            self.finish_reason = "stop" if stopped else FINISH_REASONS[end]
        return piece

    def take_logprobs(self) -> dict[str, Any] | None:
        """Those of the tokens since the last call, in the shape of the API that was asked."""
        if self.request.top_logprobs is None:
            return None
        tokens, self._logprobs = self._logprobs, []
        if self.request.chat:
            return {"content": [token["chat"] for token in tokens], "refusal": None}
        return {
            "tokens": [token["chat"]["token"] for token in tokens],
            "token_logprobs": [token["chat"]["logprob"] for token in tokens],
            "top_logprobs": [token["top"] for token in tokens]
            if self.request.top_logprobs
            else None,
            "text_offset": [token["offset"] for token in tokens],
        }

    def _describe(self, content: bytes, logprobs: TokenLogprobs) -> dict[str, Any]:
        offset = self._offset
        self._offset += len(self._decoder.decode(content))
        top = [(self.tokenizer.token_bytes(token), value) for token, value in logprobs.top]
        return {
            "chat": _name(content, logprobs.logprob)
            | {"top_logprobs": [_name(token, value) for token, value in top]},
            "top": {token.decode("utf-8", "replace"): value for token, value in top},
            "offset": offset,
        }


class Envelope:
    """What all parts of one reply share: id, time, model, kind, and whether history was cut."""

    def __init__(self, request: AnswerRequest, prompt_tokens: int, cut_turns: int = 0) -> None:
        self.request, self.prompt_tokens = request, prompt_tokens
        self.head: dict[str, Any] = {
            "id": ("chatcmpl-" if request.chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": request.model,
        } | ({"cut_turns": cut_turns} if cut_turns else {})

    def whole(self, texts: list[str], choices: list[Choice]) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        parts = []
        for text, choice in zip(texts, choices, strict=True):
            message = {"role": "assistant", "content": text, "refusal": None}
            part: dict[str, Any] = {"message": message} if self.request.chat else {"text": text}
            part |= {"index": choice.index, "logprobs": choice.take_logprobs()}
            parts.append(part | {"finish_reason": choice.finish_reason})
        kind = "chat.completion" if self.request.chat else "text_completion"
        return self.head | {"object": kind, "choices": parts, "usage": self.usage(choices)}

    def opening(self, choice: Choice) -> bytes:
        """Chat's first chunk, which says who speaks."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, None)

    def piece(self, choice: Choice, text: str) -> bytes:
        """New text."""
        return self._chunk(choice, {"content": text}, choice.take_logprobs(), None)

    def closing(self, choice: Choice) -> bytes:
        """A choice's last chunk, with the reason."""
        return self._chunk(choice, {}, choice.take_logprobs(), choice.finish_reason)

    def usage_chunk(self, choices: list[Choice]) -> bytes:
        """The stream's last piece where a client asked for it: no text, but the token counts."""
        return to_event(
            self.head | {"object": self._chunk_kind, "choices": [], "usage": self.usage(choices)}
        )

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """OpenAI's count of the prompt's tokens, of those written, and of those read earlier."""
        written = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.reused_tokens for choice in choices)
            },
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.request.chat else "text_completion"

    def _chunk(
        self, choice: Choice, delta: dict[str, str], logprobs: Any, reason: str | None
    ) -> bytes:
        part: dict[str, Any] = {"index": choice.index}
        part |= {"delta": delta} if self.request.chat else {"text": delta.get("content", "")}
        if logprobs is not None and not any(logprobs.values()):
            logprobs = None
        part |= {"logprobs": logprobs, "finish_reason": reason}
        value = self.head | {"object": self._chunk_kind, "choices": [part]}
        if self.request.include_usage:
            value |= {"usage": None}
        return to_event(value)


def to_event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """ASCII, so that half a surrogate pair in somebody's text breaks nothing."""
    return json.dumps(value, separators=(",", ":")).encode()


def _name(token: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": token.decode("utf-8", "replace"),
        "logprob": logprob,
        "bytes": list(token),
    }
