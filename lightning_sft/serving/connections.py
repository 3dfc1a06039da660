"""Connections that cost something: how long one may be silent, and how many there may be.

A client that opens connections and says nothing holds a file descriptor with each. So a request's
headers have a deadline, and before the descriptors are gone, the connection that has been idle
longest is dropped for a new one; where all of them are being answered, the new one is told to come
back.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lightning_sft.serving.api_error import ApiError
from lightning_sft.serving.log import log_line
from lightning_sft.serving.openai_reply import to_json

HEADER_SECONDS = 10.0  # from a connection's, or a request's, first sign of life
# Connections that asyncio takes in one go. Where it takes one beyond the last descriptor it fails,
# once for each in that go, and again a second later.
ACCEPTED_AT_ONCE = 16
SPARE_DESCRIPTORS = 4 * ACCEPTED_AT_ONCE  # a few goes pass before a connection is seen here


def count_affordable() -> int:
    """How many connections there may be: the descriptors that are left, but for some to spare."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    left = limit - len(list(Path("/dev/fd").iterdir()))
    return max(1, left - min(SPARE_DESCRIPTORS, left // 2))


class Connection(H11Protocol):
    """Uvicorn's connection with a deadline for headers and a place in the queue to be dropped.

    Args:
        most: How many there may be. The rest is uvicorn's.
    """

    def __init__(self, *arguments: Any, most: int, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.most = most
        self.idle_since = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is under way: there is none, or its headers are not complete."""
        return self.conn.their_state is h11.IDLE

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._make_room()
        if not self.transport.is_closing():
            self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._watch_headers()
        elif self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.idle_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _watch_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _make_room(self) -> None:
        """Drop who has been idle longest, or refuse the newcomer, which is this one."""
        log_line(f"warning: more than {self.most} connections, which is all there can be", "room")
        others = [one for one in self.connections if isinstance(one, Connection) and one.idle]
        others = [one for one in others if one is not self]
        if others:
            oldest = min(others, key=lambda one: one.idle_since)
            self.connections.discard(oldest)
            oldest.transport.abort()
            return
        body = to_json(ApiError(503, "Too many connections.", code="overloaded").body)
        head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def lengthen_queue(listener: socket.socket) -> None:
    """Let the kernel hold more newcomers than are accepted at once."""
    with contextlib.suppress(OSError):
        listener.listen(socket.SOMAXCONN)
