"""The routes of `serve`: OpenAI's API and the page, around one engine."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Conversation
from lightning_sft.data.encoding import encode_question
from lightning_sft.data.history import (
    LONGEST_TOKEN,
    FittedHistory,
    fit_history,
    room_for_prompt,
)
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.decoding.answering import AnsweringModel
from lightning_sft.serving.answers import Answering, Stream
from lightning_sft.serving.api_error import ApiError, invalid
from lightning_sft.serving.context import Context
from lightning_sft.serving.conversation import lay_out_prompt, read_conversation
from lightning_sft.serving.gate import to_response
from lightning_sft.serving.log import log_line
from lightning_sft.serving.openai_reply import to_json
from lightning_sft.serving.openai_request import find_model, read_json, read_request

BODY_SECONDS = 30.0  # in which a request's body must have arrived
SHORT = 10_000  # characters; encoding more takes a time in which others would wait


class Service:
    """The routes.

    Args:
        page: HTML of the page at `/`.
    """

    def __init__(self, context: Context, page: str) -> None:
        self.context, self.page = context, page

    def app(self) -> Starlette:
        """All routes."""
        routes = [
            Route("/", self.show_page),
            Route("/health", self.health),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/prompt", self.prompt, methods=["POST"]),
        ]
        handlers: Any = {
            ApiError: _answer_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_fault,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def show_page(self, request: Request) -> Response:
        return Response(self.page, media_type="text/html")

    async def health(self, request: Request) -> Response:
        """200 while answers can be had; for load balancers, so it needs no token."""
        engine = self.context.engine
        status = "stopping" if engine.draining else "ok" if engine.alive else "failed"
        counts = {"running": engine.running, "waiting": engine.waiting}
        code = 200 if status == "ok" else 503
        return _json({"status": status, **counts}, code)

    async def list_models(self, request: Request) -> Response:
        return _json(
            {"object": "list", "data": [self._describe(name) for name in self.context.models]}
        )

    async def show_model(self, request: Request) -> Response:
        name = find_model({"model": request.path_params["name"]}, self.context.models)
        return _json(self._describe(name))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def prompt(self, request: Request) -> Response:
        """The text that a chat request's model would be given; nothing is generated."""
        body = await self._read(request)
        name = find_model(body, self.context.models)
        model = self.context.models[name]
        length = body.get("max_tokens", self.context.rules.generation.max_new_tokens)
        if type(length) is not int or length < 1:
            raise invalid("max_tokens", "must be an integer >= 1")
        fitted = await self._fit(read_conversation(body), model, length)
        return _json(
            {
                "object": "chat.prompt",
                "model": name,
                "prompt": "".join(lay_out_prompt(fitted.conversation, model.style)),
                "prompt_tokens": len(fitted.ids),
                "cut_turns": fitted.cut,
                "context_length": model.model.config.context_length,
            }
        )

    async def _answer(self, request: Request, chat: bool) -> Response:
        wanted = read_request(await self._read(request), self.context.rules, chat)
        model = self.context.models[wanted.model]
        cut_turns = 0
        if wanted.conversation is not None:
            length = wanted.settings.max_new_tokens
            _, ids, cut_turns = await self._fit(wanted.conversation, model, length)
            prompts = [ids]
        else:
            prompts = [
                prompt if isinstance(prompt, list) else await self._encode(prompt, model.tokenizer)
                for prompt in wanted.prompts
            ]
        for prompt in prompts:
            self._check_ids(prompt, model)
        answering = Answering(self.context, wanted, prompts, cut_turns)
        answering.begin()
        if wanted.stream:
            return Stream(answering)
        answering.watch(request.receive)
        texts = [""] * len(prompts)
        try:
            async for choice, text in answering.pieces():
                texts[choice.index] += text
            return _json(answering.envelope.whole(texts, answering.choices))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            answering.close()

    async def _read(self, request: Request) -> dict[str, Any]:
        """The body, no longer and no slower than allowed."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Send the body as Content-Type: application/json.")
        most = self.context.limits.body_bytes
        too_large = ApiError(413, f"The body is larger than {most} bytes.", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > most:
            raise too_large
        body = bytearray()

        async def collect() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > most:
                    raise too_large

        try:
            await asyncio.wait_for(collect(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, "The body took too long.", code="timeout") from None
        return read_json(bytes(body))

    async def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        self._check_length(len(text))
        if len(text) < SHORT:
            return encode_question([text], tokenizer)
        # In a thread: others need not wait for it.
        return await asyncio.to_thread(encode_question, [text], tokenizer)

    async def _fit(
        self, conversation: Conversation, model: AnsweringModel, max_new_tokens: int
    ) -> FittedHistory:
        """As many of the last turns as there is room for beside the answer."""
        messages = conversation.messages
        lengths = [len(message.content) + len(message.input) for message in messages]
        # What is never left out.
        self._check_length(lengths[-1] + (lengths[0] if messages[0].role == "system" else 0))
        most = room_for_prompt(model.model.config.context_length, max_new_tokens)
        most = min(most, self.context.limits.prompt_tokens)
        fit = functools.partial(fit_history, conversation, model.style, model.tokenizer, most)
        try:
            return fit() if sum(lengths) < SHORT else await asyncio.to_thread(fit)
        except InputError as error:  # a model's own template refuses the messages
            raise invalid("messages", f"are refused: {error}") from None

    def _check_length(self, characters: int) -> None:
        """Refuse what is too long for certain, before its tokens are counted."""
        if characters > self.context.limits.prompt_tokens * LONGEST_TOKEN:
            raise self._too_long(f"over {self.context.limits.prompt_tokens}")

    def _check_ids(self, prompt: list[int], model: AnsweringModel) -> None:
        if len(prompt) > self.context.limits.prompt_tokens:
            raise self._too_long(str(len(prompt)))
        most = model.tokenizer.vocab_size - 1
        context_length = model.model.config.context_length
        if not all(0 <= token <= most for token in prompt):
            message = f"prompt holds a token id outside 0 to {most}."
            raise ApiError(400, message, param="prompt", code="invalid_value")
        if len(prompt) >= context_length:
            raise ApiError(
                400,
                f"The prompt has {len(prompt)} tokens, which leaves no room for an answer in the "
                f"model's context of {context_length}.",
                code="context_length_exceeded",
            )

    def _too_long(self, length: str) -> ApiError:
        message = (
            f"The prompt has {length} tokens; at most {self.context.limits.prompt_tokens} here."
        )
        return ApiError(400, message, code="context_length_exceeded")

    def _describe(self, name: str) -> dict[str, Any]:
        model, rules = self.context.models[name], self.context.rules
        most, default = rules.limits.max_tokens, rules.generation
        return {
            "id": name,
            "object": "model",
            "created": self.context.created,
            "owned_by": "lightning_sft",
            "context_length": model.model.config.context_length,
            "prompt_style": model.style.name,
            "keeps_turns": model.style.closes_answers,
            "defaults": {
                "max_tokens": min(default.max_new_tokens, most),
                "temperature": default.temperature,
                "top_p": default.top_p,
                "top_k": default.top_k,
                "seed": default.seed,
            },
            "limits": {"max_tokens": most},
        }


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return to_response(error)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client left before its request was whole."""
    log_line("warning: a client left before all of its request was there")
    return Response(status_code=499)


async def _answer_fault(request: Request, error: Exception) -> Response:
    """A mistake of ours; Starlette raises it again, and the gate writes it down."""
    return to_response(ApiError(500, "The server failed on this request; its log says how."))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    reasons = {
        404: f"There is nothing at {request.url.path:.100}.",
        405: "Wrong method for this path.",
    }
    response = to_response(
        ApiError(error.status_code, reasons.get(error.status_code, error.detail))
    )
    response.headers.update(error.headers or {})
    return response


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
