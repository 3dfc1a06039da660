"""A web server on 127.0.0.1 that misbehaves as a test tells it to.

    >>> with Hub() as hub:
    ...     url = hub.serve("/data.json", b"[]")
    ...     hub.script("/data.json", Reply(status=503), Reply(cut=1))
    ...     download(url, path)  # 503, then a broken connection, then the file
    ...     assert [request.method for request in hub.requests] == ["GET"] * 3

Scripted replies are used up one by one; after them comes `hub.default[path]` if there is one, else
the served file, with its length, an ETag, and ranges.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Request(NamedTuple):
    """What a client asked."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass
class Reply:
    """One answer. What is left at its default is as a good server does it."""

    status: int | None = None  # 200, or 206 to a range
    body: bytes | None = None  # the served file
    headers: dict[str, str] = field(default_factory=dict)
    length: bool = True  # send Content-Length; without it the end of the connection ends the body
    ranges: bool = True  # honour Range and send an ETag
    etag: str | None = None  # another than the file's own
    cut: int | None = None  # stop after so many bytes of the body: hold, then close
    hold: threading.Event | None = None  # what to wait for after `cut` bytes
    trickle: float = 0.0  # seconds before each byte


class Hub:
    """The server; a context manager."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.default: dict[str, Reply | Callable[[Request], Reply]] = {}
        self.requests: list[Request] = []
        self.connections = 0
        self.keep_open = False  # as HTTP/1.1 does
        self._scripts: dict[str, list[Reply]] = defaultdict(list)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                hub.connections += 1
                if hub.keep_open:
                    self.protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET  # noqa: N815 - names that http.server looks for

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def serve(self, path: str, body: bytes) -> str:
        """Put a file on the server; returns its URL."""
        self.files[path] = body
        return self.address + path

    def script(self, path: str, *replies: Reply) -> None:
        """Answer the next requests for `path` with these."""
        self._scripts[path] += replies

    def redirect(self, path: str, target: str, **headers: str) -> str:
        """Send `path` on to `target`; `X_Linked_Size` becomes the header X-Linked-Size."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.default[path] = Reply(302, b"", {"Location": target} | named)
        return self.address + path

    def asked(self, path: str) -> list[Request]:
        """The requests for `path` so far."""
        return [request for request in self.requests if request.path == path]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        path = handler.path.split("?")[0]
        request = Request(handler.command, path, headers, body)
        self.requests.append(request)
        if self._scripts[path]:
            reply = self._scripts[path].pop(0)
        else:
            default = self.default.get(path)
            missing = Reply() if path in self.files else Reply(404, b"no such file")
            reply = (default(request) if callable(default) else default) or missing
        self._send(handler, request, reply)

    def _send(self, handler: BaseHTTPRequestHandler, request: Request, reply: Reply) -> None:
        body = self.files.get(request.path, b"") if reply.body is None else reply.body
        status, headers = reply.status or 200, dict(reply.headers)
        if reply.body is None and reply.ranges and status == 200:
            headers["ETag"] = etag = reply.etag or f'"{hashlib.md5(body).hexdigest()}"'
            first = request.headers.get("range", "").removeprefix("bytes=").rstrip("-")
            if first and request.headers.get("if-range", etag) == etag:
                status = 206 if int(first) < len(body) else 416
                span = f"{first}-{len(body) - 1}" if status == 206 else "*"
                headers["Content-Range"] = f"bytes {span}/{len(body)}"
                body = body[int(first) :] if status == 206 else b"nothing left to send"
        if reply.length:
            headers.setdefault("Content-Length", str(len(body)))
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if request.method == "HEAD":
            return
        body = body if reply.cut is None else body[: reply.cut]
        try:
            if reply.trickle:
                for byte in body:
                    time.sleep(reply.trickle)
                    handler.wfile.write(bytes([byte]))
            else:
                handler.wfile.write(body)
            if reply.hold:
                handler.wfile.flush()
                reply.hold.wait(30)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has gone, as some tests want
        if not self.keep_open:
            handler.close_connection = True
