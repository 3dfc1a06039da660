"""A deadline for a whole HTTP exchange, however slowly its bytes come.

A timeout of requests is for one read from the socket. A server that sends a byte of a header, of
the TLS handshake or of a chunk's length now and then never runs into it. `Deadline` does not look
at what is read: when its time is up it shuts the connection down.

    >>> with Deadline(10.0), watched_session() as session:
    ...     content = session.get("https://example.org/").content

Looking the host's name up is outside of it (the system's resolver has limits of its own), and so is
a SOCKS proxy. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

_exchange = threading.local()  # `deadline`: that of the exchange which this thread has under way


class DeadlineError(TimeoutError):
    """The exchange was not over in time; its connection is shut."""


class Deadline:
    """Ends the exchange that its thread makes through a `watched_session`; a context manager.

    Args:
        seconds: Time for the whole block, counted from its start.

    Raises:
        DeadlineError: At the block's end, when the time was up before; takes the place of what the
            shut connection looked like to the reader, which may be a body that ended well.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._passed = False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> Deadline:
        _exchange.deadline = self
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        _exchange.deadline = None
        self._over.set()
        self._thread.join()
        for twin in self._sockets:
            twin.close()
        if self._passed and (error is None or isinstance(error, Exception)):
            raise DeadlineError from None

    def extend(self, seconds: float) -> None:
        """Give the exchange `seconds` from now on."""
        self._end = time.monotonic() + seconds

    def watch(self, connection: socket.socket) -> None:
        """Shut `connection`, too, when the time is up."""
        # A second descriptor of it, since TLS takes the first one away from its object.
        twin = socket.fromfd(connection.fileno(), connection.family, connection.type)
        with self._lock:
            self._sockets.append(twin)
            if self._passed:
                _shut(twin)

    def _wait(self) -> None:
        while not self._over.wait(max(0.0, self._end - time.monotonic())):
            if time.monotonic() >= self._end:
                with self._lock:
                    self._passed = True
                    for twin in self._sockets:
                        _shut(twin)
                return


def watched_session() -> requests.Session:
    """A session whose connections heed the `Deadline` around their use."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter())
    return session


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the server may have closed it
        connection.shutdown(socket.SHUT_RDWR)


class _Watched:
    """What a connection class of urllib3 gets: each socket is shown to the thread's deadline."""

    def _new_conn(self) -> socket.socket:
        return _show(super()._new_conn())  # type: ignore[misc]

    def request(self, *args: Any, **options: Any) -> None:
        if (kept := self.sock) is not None:  # type: ignore[attr-defined]
            _show(kept)  # open since an earlier exchange
        super().request(*args, **options)  # type: ignore[misc]


def _show(connection: socket.socket) -> socket.socket:
    if deadline := getattr(_exchange, "deadline", None):
        deadline.watch(connection)
    return connection


class _HTTPConnection(_Watched, urllib3.connection.HTTPConnection):
    pass


class _HTTPSConnection(_Watched, urllib3.connection.HTTPSConnection):
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        _use_watched(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return _use_watched(super().proxy_manager_for(proxy, **options))


def _use_watched(manager: Any) -> Any:
    if manager.pool_classes_by_scheme is urllib3.poolmanager.pool_classes_by_scheme:  # no SOCKS
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    return manager
