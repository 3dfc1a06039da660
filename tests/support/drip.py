"""A server that sends the same bytes to everyone, one at a time: slower than any deadline.

with drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999) as address:
    requests.get(address)  # each byte is in time, the answer never is
"""

from __future__ import annotations

import contextlib
import socketserver
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def drip(head: bytes, rest: bytes = b" " * 10_000, pause: float = 0.02) -> Iterator[str]:
    """Send `head` at once and `rest` byte by byte; yields the server's address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client has gone, as the tests want
                self.request.recv(65536)
                self.request.sendall(head)
                for byte in rest:
                    time.sleep(pause)
                    self.request.sendall(bytes([byte]))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
