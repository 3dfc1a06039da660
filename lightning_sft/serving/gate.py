"""What every request to `serve` must pass: where it was sent to, where it comes from, a token.

On a loopback address anyone may come who names this machine as host: a page on the internet whose
name was pointed at 127.0.0.1 (DNS rebinding) names its own. A page of another origin may not send
anything at all. With a token, everything under `/v1` needs it.

A request refused before its body was read is read to its end first: a connection closed on a client
that still sends is reset, and the client is told of a broken pipe instead of the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_sft.serving.api_error import ApiError
from lightning_sft.serving.log import log_error
from lightning_sft.serving.openai_reply import to_json

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

# What is read and thrown away of a refused request; beyond it the connection is closed as it is.
UNREAD_BYTES = 16_000_000
UNREAD_SECONDS = 2.0


class Gate:
    """Stands before an application.

    Args:
        token: Every request to the API needs it; None needs none.
        loopback: Answer only to requests that name this machine.
    """

    def __init__(self, app: ASGIApp, token: str | None, loopback: bool) -> None:
        self.app, self.loopback = app, loopback
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # lifespan; websockets find no route
            return

        body = Body(receive, waits=any(name == b"expect" for name, _ in scope["headers"]))

        async def send_at_the_end(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            elif not message.get("more_body", False):
                await body.read_to_end()
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await to_response(error)(scope, body.receive, send_at_the_end)
            return
        try:
            await self.app(scope, body.receive, send_at_the_end)
        except (
            Exception
        ) as error:  # this request's; its client was told, as far as that was possible
            log_error(error, "a request failed: ")

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])  # of two with one name, the last
        host = headers.get(b"host", b"").decode("latin-1")
        if self.loopback and _name_of(host) not in ("127.0.0.1", "localhost", "::1"):
            raise ApiError(403, "This server answers to localhost only.", code="wrong_host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, "Pages of other origins are not served.", code="wrong_origin")
        if self._token is not None and scope["path"].startswith("/v1"):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self._token)
            if kind.lower() != b"bearer" or not right:
                raise ApiError(
                    401, "Give the server's token as a bearer token.", code="invalid_api_key"
                )


class Body:
    """A request's body as it comes in, and whether all of it came.

    Args:
        receive: The server's.
        waits: The client sends nothing before it is asked to (`Expect: 100-continue`).
    """

    def __init__(self, receive: Receive, waits: bool) -> None:
        self._receive, self._waits, self._ended = receive, waits, False

    async def receive(self) -> Message:
        message = await self._receive()
        self._waits = False
        self._ended = not message.get("more_body", False)  # a disconnect is an end, too
        return message

    async def read_to_end(self) -> None:
        """Throw away what was not read yet, within the limits above."""

        async def discard() -> None:
            read = 0
            while not self._ended and read <= UNREAD_BYTES:
                read += len((await self.receive()).get("body", b""))

        if not self._waits and not self._ended:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(discard(), UNREAD_SECONDS)


def to_response(error: ApiError) -> Response:
    """An error in the API's shape."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(to_json(error.body), error.status, headers, "application/json")


def _name_of(host: str) -> str:
    """The host of `host:port`, without brackets; "" for what is neither."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
