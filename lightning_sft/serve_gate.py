"""What every request to `serve` must pass: where it was sent to, where it comes from, a token.

On a loopback address anyone may come who names this machine as host: a page on the internet whose
name was pointed at 127.0.0.1 (DNS rebinding) names its own. A page of another origin may not send
anything at all. With a token, everything under `/v1` needs it.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_sft.openai_reply import to_json
from lightning_sft.openai_request import ApiError

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Gate:
    """Stands before an application.

    Args:
        token: Demanded of every request to the API; None demands none.
        loopback: Answer only to requests that name this machine.
    """

    def __init__(self, app: ASGIApp, token: str | None, loopback: bool) -> None:
        self.app, self.loopback = app, loopback
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # lifespan; websockets find no route
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await to_response(error)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

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
