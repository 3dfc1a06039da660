"""From a checked request to its answer: prompts into the engine, its tokens back out as a reply.

An answer that nobody waits for any more is cancelled, whatever the reason: the client left, a stop
string came, the reply is complete.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightning_sft.common.errors import LightningSFTError
from lightning_sft.decoding.answer_text import AnswerText
from lightning_sft.serving.api_error import ApiError
from lightning_sft.serving.context import Context
from lightning_sft.serving.engine import QueueFullError, StoppingError
from lightning_sft.serving.gate import to_response
from lightning_sft.serving.job import Job, TokenEvent
from lightning_sft.serving.openai_reply import Choice, Envelope, to_event
from lightning_sft.serving.openai_request import AnswerRequest

STALLED_SECONDS = 30.0  # beyond an answer's own time, for a client that does not read it


class Answering:
    """A request's prompts in the engine, from their first tokens to their last.

    Args:
        prompts: Token ids, one list for each of the request's.
        cut_turns: How many of a conversation's turns are not in its prompt.
    """

    def __init__(
        self,
        context: Context,
        request: AnswerRequest,
        prompts: list[list[int]],
        cut_turns: int = 0,
    ) -> None:
        self.context = context
        self.envelope = Envelope(request, sum(map(len, prompts)), cut_turns)
        self.jobs = [make_job(request, context, place, ids) for place, ids in enumerate(prompts)]
        self.choices = [make_choice(request, context, place) for place in range(len(prompts))]
        self.queue: asyncio.Queue[tuple[int, TokenEvent] | None] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Hand the prompts to the engine, all or none.

        Raises:
            ApiError: It does not take them (400, 429, 503).
        """
        context = self.context
        for place, job in enumerate(self.jobs):
            context.hub.listeners[job] = functools.partial(self._hear, place)
        try:
            context.engine.submit(self.jobs)
        except LightningSFTError as error:
            self.close()
            if isinstance(error, QueueFullError):
                after = 1 + context.engine.waiting // context.limits.batch_size
                raise ApiError(
                    429, f"Too many requests: {error}.", code="queue_full", retry_after=after
                ) from None
            if isinstance(error, StoppingError):
                raise _stopping() from None
            raise ApiError(400, f"{error}.", code="context_length_exceeded") from None

    def _hear(self, place: int, event: TokenEvent) -> None:
        self.queue.put_nowait((place, event))

    def watch(self, receive: Receive) -> None:
        """Notice when the client leaves."""
        self._watch = asyncio.create_task(self._notice(receive))

    async def _notice(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.queue.put_nowait(None)

    async def pieces(self) -> AsyncIterator[tuple[Choice, str]]:
        """New text of a choice, as often as there is some, and once when it is finished.

        Raises:
            ClientDisconnect: Nobody listens any more.
            ApiError: The engine failed, is stopping, or never came to it.
        """
        open_choices = len(self.choices)
        while open_choices:
            item = await self.queue.get()
            if item is None:
                raise ClientDisconnect
            place, event = item
            choice, job = self.choices[place], self.jobs[place]
            if choice.finish_reason is not None:
                continue  # it was under way when a stop string ended the answer
            _raise_failure(event, choice)
            choice.reused_tokens = job.reused
            text = choice.take(event.token, event.logprobs, event.end)
            if choice.finish_reason is not None:
                open_choices -= 1
                job.cancel()
            if text or choice.finish_reason is not None:
                yield choice, text

    def close(self) -> None:
        """Whatever is still being computed is not wanted any more."""
        for job in self.jobs:
            job.cancel()
            self.context.hub.listeners.pop(job, None)
        if self._watch is not None:
            self._watch.cancel()


class Stream(Response):
    """Server-sent events. The headers wait for the first token, so errors keep their status."""

    media_type = "text/event-stream"

    def __init__(self, answering: Answering) -> None:
        super().__init__()
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        patience = self.answering.context.limits.seconds + STALLED_SECONDS
        stalled = loop.call_later(patience, task.cancel, "stalled")
        self.answering.watch(receive)
        started = False
        try:
            async for chunk in self._chunks():
                if not started:
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                    start = {"type": "http.response.start", "status": 200, "headers": headers}
                    await send(start)
                    started = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientDisconnect:
            pass
        except asyncio.CancelledError as reason:
            if reason.args != ("stalled",):  # else uvicorn closes the connection
                raise
        except ApiError as error:
            if not started:
                await to_response(error)(scope, receive, send)
                return
            body = to_event(error.body)
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            stalled.cancel()
            self.answering.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        envelope, choices = self.answering.envelope, self.answering.choices
        begun = set()
        async for choice, text in self.answering.pieces():
            if envelope.request.chat and choice.index not in begun:
                begun.add(choice.index)
                yield envelope.opening(choice)
            if text:
                yield envelope.piece(choice, text)
            if choice.finish_reason is not None:
                yield envelope.closing(choice)
        if envelope.request.include_usage:
            yield envelope.usage_chunk(choices)
        yield b"data: [DONE]\n\n"


def make_job(request: AnswerRequest, context: Context, place: int, ids: list[int]) -> Job:
    """One of a request's prompts, for the engine."""
    return Job(
        request.model,
        ids,
        request.settings,
        key=place,
        top_logprobs=request.top_logprobs,
        seconds=context.limits.seconds,
    )


def make_choice(request: AnswerRequest, context: Context, place: int) -> Choice:
    """The answer to one of a request's prompts, still empty."""
    model = context.models[request.model]
    text = AnswerText(model.style if request.chat else None, request.stop)
    return Choice(place, request, text, model.tokenizer)


def _raise_failure(event: TokenEvent, choice: Choice) -> None:
    """An answer that there will not be, as the API says it."""
    if event.end == "error":
        raise ApiError(500, "The model failed on this request; the server's log says how.")
    if event.end == "stopping":
        raise _stopping()
    if event.end == "time" and not choice.num_tokens and event.token is None:
        raise ApiError(
            503, "The server did not come to this request in time.", code="timeout", retry_after=5
        )


def _stopping() -> ApiError:
    return ApiError(503, "The server is stopping.", code="stopping", retry_after=5)
