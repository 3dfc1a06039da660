"""A judge that does as it is told: loopback servers for both protocols, scripted reply by reply.

    with JudgeServer("ollama", script=["85", Status(503), Reset(), "90"]) as server:
        score(path, JudgeConfig(url=server.url))
    assert len(server.prompts) == 4

A script is a list of acts, used in the order of arrival (the last one goes on for ever), or a
function from the prompt to an act. An act is the text of a reply or one of the faults below.
Ollama's side follows its docs/api.md (POST /api/chat, streamed or not; POST /api/generate for raw
prompts; GET /api/tags), the other one OpenAI's chat completions (JSON or server-sent events; GET
/v1/models) with llama.cpp's /health.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Status:
    """Another status than 200."""

    code: int
    body: Any = field(default_factory=lambda: {"error": "scripted failure"})
    headers: dict[str, str] = field(default_factory=dict)


class Reset:
    """The connection is reset before a byte of the answer."""


@dataclass
class Hang:
    """Nothing comes for this long, then the connection closes."""

    seconds: float


@dataclass
class Trickle:
    """A byte at a time, with no end."""

    pause: float = 0.02


@dataclass
class Cut:
    """The reply's text comes, its end does not. `torn` cuts inside the JSON."""

    text: str = "85"
    torn: bool = False


@dataclass
class Raw:
    """HTTP 200 with exactly this body."""

    body: Any


@dataclass
class Says:
    """A reply with the protocol's other fields set."""

    text: str | None
    finish: str = "stop"
    prompt_tokens: int = 20


class JudgeServer:
    """Speaks `protocol` on 127.0.0.1. `prompts` are those received, in order."""

    def __init__(
        self,
        protocol: str,
        script: list | Callable[[str], Any] | None = None,
        models: Iterable[str] = ("llama3:latest", "judge"),
        loading: int = 0,
        load: Any = None,
        probe: Status | None = None,
    ) -> None:
        self.protocol = protocol
        self.script = script if script is not None else ["85"]
        self.models = list(models)
        self.loading = loading  # how many of the first probes are told that it still loads
        self.load = load  # what Ollama does when asked to load a model
        self.probe = probe  # answers every GET
        self.prompts: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_act(self, prompt: str) -> Any:
        with self._lock:
            number = len(self.prompts)
            self.prompts.append(prompt)
        if callable(self.script):
            return self.script(prompt)
        return self.script[min(number, len(self.script) - 1)]


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that are killed in the middle are what some tests are about."""


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            judge.requests.append({"path": self.path, "headers": dict(self.headers)})
            if judge.probe:
                self.answer(judge.probe.code, judge.probe.body, judge.probe.headers)
            elif judge.loading > 0:
                judge.loading -= 1
                self.answer(503, {"error": {"message": "Loading model", "code": 503}})
            elif judge.protocol == "ollama" and self.path == "/api/tags":
                self.answer(200, {"models": [{"name": name} for name in judge.models]})
            elif judge.protocol == "openai" and self.path == "/v1/models":
                self.answer(200, {"data": [{"id": name} for name in judge.models]})
            elif judge.protocol == "openai" and self.path == "/health":
                self.answer(200, {"status": "ok"})
            else:
                self.answer(404, {"error": "not found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            judge.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
            if self.path == "/api/generate":  # a raw prompt
                self.act(judge.next_act(body["prompt"]), body)
            elif not body["messages"]:  # Ollama's way of loading a model
                self.act(judge.load or Raw({"done": True, "done_reason": "load"}), body)
            else:
                self.act(judge.next_act(body["messages"][-1]["content"]), body)

        def act(self, act: Any, body: dict[str, Any]) -> None:
            if isinstance(act, str):
                act = Says(act)
            if isinstance(act, Status):
                self.answer(act.code, act.body, act.headers)
            elif isinstance(act, Raw):
                self.answer(200, act.body)
            elif isinstance(act, Reset):
                linger = struct.pack("ii", 1, 0)  # close with RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()
            elif isinstance(act, Hang):
                time.sleep(act.seconds)
                self.close_connection = True
            elif isinstance(act, Trickle):
                self.start(200, "application/json")
                try:
                    while True:
                        self.wfile.write(b" ")
                        time.sleep(act.pause)
                except OSError:
                    self.close_connection = True
            elif isinstance(act, Cut):
                self.start(200, "application/x-ndjson")
                whole = b"".join(self.pieces(Says(act.text), body | {"stream": True}))
                end = whole.rindex(b"{")
                self.wfile.write(whole[: end + 9] if act.torn else whole[:end])
                self.close_connection = True
            else:
                kind = "application/json"
                if body.get("stream"):
                    ollama = judge.protocol == "ollama"
                    kind = "application/x-ndjson" if ollama else "text/event-stream"
                self.start(200, kind)
                for piece in self.pieces(act, body):
                    self.wfile.write(piece)
                self.close_connection = True

        def pieces(self, act: Says, body: dict[str, Any]) -> list[bytes]:
            """The bytes of a reply, cut as the protocol streams it."""
            stream = body.get("stream")
            text = act.text
            if judge.protocol == "ollama":
                end = {
                    "done": True,
                    "done_reason": act.finish,
                    "prompt_eval_count": act.prompt_tokens,
                }
                if "prompt" in body:
                    lines = [{"response": c, "done": False} for c in text or ""]
                    lines.append({"response": ""} | end)
                    return [json.dumps(line).encode() + b"\n" for line in lines]
                message = {"role": "assistant"} | ({} if text is None else {"content": text})
                if not stream:
                    return [json.dumps({"message": message} | end).encode()]
                parts = [{"message": {"role": "assistant", "content": c}} for c in text or ""]
                if text is None:
                    parts = [{"message": {"role": "assistant"}}]
                closing = {"message": {"role": "assistant"}} | end
                if text is not None:
                    closing["message"] = {"role": "assistant", "content": ""}
                lines = [*(part | {"done": False} for part in parts), closing]
                return [json.dumps(line).encode() + b"\n" for line in lines]
            if not stream:
                message = {"role": "assistant"} | ({} if text is None else {"content": text})
                choice = {"index": 0, "message": message, "finish_reason": act.finish}
                return [json.dumps({"choices": [choice]}, indent=2).encode()]
            deltas = [{"delta": {"content": c}, "finish_reason": None} for c in text or ""]
            chunks = [{"delta": {"role": "assistant"}, "finish_reason": None}, *deltas]
            events = [
                "data: " + json.dumps({"choices": [chunk]}) + "\n\n"
                for chunk in [*chunks, {"delta": {}, "finish_reason": act.finish}]
            ]
            return [event.encode() for event in [*events, "data: [DONE]\n\n"]]

        def start(self, status: int, kind: str) -> None:
            """Headers of a body whose end is the end of the connection."""
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Connection", "close")
            self.end_headers()

        def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
