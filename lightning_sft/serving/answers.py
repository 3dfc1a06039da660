"""From a checked request to its answer: prompts into the engine, its news back out as a reply.

An answer that nobody waits for any more is cancelled, whatever the reason: the client left, a stop
string came, the reply is complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightning_sft.common.errors import InputError
from lightning_sft.decoding.answer_text import AnswerText
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.serving.context import Context
from lightning_sft.serving.engine import Job, News, QueueFullError, StoppingError
from lightning_sft.serving.gate import to_response
from lightning_sft.serving.openai_reply import Choice, Envelope, event
from lightning_sft.serving.openai_request import ApiError, Ask

STALLED_SECONDS = 30.0  # beyond an answer's own time, for a client that does not read it


class Answering:
    """A request's prompts in the engine, from its first token to its last.

    Raises:
        ApiError: The engine does not take the prompts (400, 429, 503).
    """

    def __init__(self, context: Context, ask: Ask, prompts: list[list[int]], seed: int) -> None:
        self.context = context
        self.envelope = Envelope(ask, sum(map(len, prompts)))
        self.jobs = [
            Job(
                ask.model,
                prompt,
                GenerationConfig(
                    max_new_tokens=ask.max_tokens,
                    temperature=ask.temperature,
                    top_k=ask.top_k,
                    top_p=ask.top_p,
                    seed=seed,
                ),
                key=key,
                top_logprobs=ask.top_logprobs,
                seconds=context.limits.seconds,
            )
            for key, prompt in enumerate(prompts)
        ]
        style = context.models[ask.model].style if ask.chat else None
        self.choices = [
            Choice(index, ask, AnswerText(style, ask.stop), context.tokenizer)
            for index in range(len(prompts))
        ]
        self.queue: asyncio.Queue[tuple[int, News] | None] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        for index, job in enumerate(self.jobs):
            context.hub.listeners[job] = lambda news, index=index: self.queue.put_nowait(  # type: ignore[misc]
                (index, news)
            )
        try:
            context.engine.submit(self.jobs)
        except QueueFullError as error:
            self.close()
            after = 1 + context.engine.waiting // context.limits.batch_size
            raise ApiError(
                429, f"Too many requests: {error}.", code="queue_full", retry_after=after
            ) from None
        except StoppingError:
            self.close()
            raise _stopping() from None
        except InputError as error:
            self.close()
            raise ApiError(400, f"{error}.", code="context_length_exceeded") from None

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
            index, news = item
            choice, job = self.choices[index], self.jobs[index]
            if choice.finish_reason is not None:
                continue  # news that was under way when a stop string ended it
            _demand_answer(news, choice)
            text = choice.take(news.token, news.likelihood, news.end)
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
            body = event(error.body)
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            stalled.cancel()
            self.answering.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        envelope, choices = self.answering.envelope, self.answering.choices
        begun = set()
        async for choice, text in self.answering.pieces():
            if envelope.ask.chat and choice.index not in begun:
                begun.add(choice.index)
                yield envelope.opening(choice)
            if text:
                yield envelope.piece(choice, text)
            if choice.finish_reason is not None:
                yield envelope.closing(choice)
        if envelope.ask.include_usage:
            yield envelope.usage_chunk(choices)
        yield b"data: [DONE]\n\n"


def _demand_answer(news: News, choice: Choice) -> None:
    if news.end == "error":
        raise ApiError(500, "The model failed on this request; the server's log says how.")
    if news.end == "stopping":
        raise _stopping()
    if news.end == "time" and not choice.num_tokens and news.token is None:
        raise ApiError(
            503, "The server did not come to this request in time.", code="timeout", retry_after=5
        )


def _stopping() -> ApiError:
    return ApiError(503, "The server is stopping.", code="stopping", retry_after=5)
