"""Clients that are silent, slow, gone or many: what they cost, and what is said about them."""

from __future__ import annotations

import http.client
import json
import logging.config
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.decoding.batch import RunningBatch
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.serving import app, connections, log
from lightning_sft.serving.connections import count_affordable
from support.serving import Served, answer_alone, make_talker, serving, wait_for

CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}).encode()


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return make_talker()


@pytest.fixture
def few(model, monkeypatch) -> Iterator[Served]:
    """A server that can have four connections."""
    monkeypatch.setattr("lightning_sft.serving.server.count_affordable", lambda: 4)
    with serving({"mine": model}) as running:
        yield running


def connect(served: Served) -> socket.socket:
    address = urlsplit(served.url)
    return socket.create_connection((address.hostname, address.port), timeout=20)


def begin_request(served: Served) -> socket.socket:
    link = connect(served)
    link.sendall(f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
    return link


def is_closed(link: socket.socket, seconds: float = 5.0) -> bool:
    link.settimeout(seconds)
    try:
        return link.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


# --- Many ---


def test_the_longest_idle_makes_room(few, capsys):
    links = []
    for _ in range(4):
        links.append(connect(few))
        wait_for(lambda: len(few.server.server_state.connections) == len(links))
        time.sleep(0.01)
    assert few.send("/health")[0] == 200  # a fifth
    assert is_closed(links[0])
    assert not is_closed(links[3], 0.1)
    assert capsys.readouterr().err.count("more than 4 connections") == 1
    for link in links:
        link.close()


def test_who_is_answered_is_not_dropped(few, model, monkeypatch):
    feed, answers = RunningBatch.feed, [begin_request(few)]

    def dawdle(*arguments: object) -> object:
        time.sleep(0.01)
        return feed(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunningBatch, "feed", dawdle)
    answers += [begin_request(few) for _ in range(3)]
    wait_for(lambda: few.engine.running == 4)
    assert few.send("/health")[0] == 503  # everybody here is busy
    for link in answers:
        assert b" 200 OK" in link.recv(1000)
        link.close()
    few.wait_idle()
    wait_for(lambda: not few.server.server_state.connections)
    assert few.send("/health")[0] == 200


FLOOD = """
import socket, sys, urllib.request
port = int(sys.stdin.readline())
links = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
for _ in range(3):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as reply:
        print(reply.status)
"""


def test_idle_connections_beyond_the_descriptors(model, capsys):
    """Really out of them, or nearly: a client in a process of its own, a limit in this one."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", FLOOD], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as client:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        in_use = len(list(Path("/dev/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 100, before[1]))
        try:
            with serving({"mine": model}) as running:
                out, error = client.communicate(f"{urlsplit(running.url).port}\n", timeout=60)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert out.split() == ["200"] * 3, error
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert 1 <= len(said.splitlines()) < 10
    assert "connections" in said


def test_how_many_there_may_be(monkeypatch):
    in_use = len(list(Path("/dev/fd").iterdir()))
    for limit, expected in ((10_000, 10_000 - in_use - 64), (in_use + 10, 5), (0, 1)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, limit=limit: (limit, -1))
        assert abs(count_affordable() - expected) <= 2  # the look takes descriptors itself
    monkeypatch.setattr(
        connections.resource,
        "getrlimit",
        lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    )
    assert count_affordable() > 1_000_000


# --- Slow and gone ---


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc"], ids=["none", "some"])
def test_headers_have_a_deadline(model, monkeypatch, sent, capsys):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with serving({"mine": model}) as running:
        with connect(running) as link:
            link.sendall(sent)
            assert is_closed(link)
        with connect(running) as link:  # trickling does not help
            for _ in range(100):
                try:
                    link.sendall(b"G")
                except OSError:
                    break
                time.sleep(0.05)
            else:
                pytest.fail("it went on for 5 s")
    assert capsys.readouterr().err == ""


def test_a_second_requests_headers_have_a_deadline_too(model, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with serving({"mine": model}) as running:
        link = http.client.HTTPConnection(urlsplit(running.url).netloc, timeout=20)
        for _ in range(3):
            link.request("GET", "/health")
            assert link.getresponse().read()
            time.sleep(0.2)  # together longer than one may take
        link.sock.sendall(b"GET /hea")
        assert is_closed(link.sock)
        link.close()


def test_a_client_that_leaves_in_its_body_is_one_line(model, capsys):
    with serving({"mine": model}) as running:
        for _ in range(20):
            with connect(running) as link:
                link.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        wait_for(lambda: not running.server.server_state.connections)
        wait_for(lambda: not running.server.server_state.tasks)
        assert running.send("/health")[0] == 200
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 2
    assert "a client left before all of its request was there" in said[0]


def test_what_is_no_http_is_one_line(model, capsys):
    with serving({"mine": model}) as running:
        for _ in range(20):
            with connect(running) as link:
                link.sendall(b"\x16\x03\x01 hello\r\n\r\n")
                assert b" 400 " in link.recv(1000)
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 2
    assert "Invalid HTTP request" in said[0]


def test_a_mistake_of_ours_takes_its_own_request_only(model, monkeypatch, capsys):
    # A machine may need over a second for these requests, and the line would be said again.
    monkeypatch.setattr(log, "SECONDS_BETWEEN", 3600.0)
    with serving({"mine": model}) as running:
        right = app.read_request
        monkeypatch.setattr(app, "read_request", lambda *_: {}["nothing"])
        for _ in range(5):
            status, reply, _ = running.send(CHAT, BODY)
            assert (status, reply["error"]["type"]) == (500, "server_error")
        monkeypatch.setattr(app, "read_request", right)
        assert running.send(CHAT, BODY)[0] == 200
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "error: a request failed: KeyError: 'nothing'"


EXTREMES = [
    {"temperature": 1e-40},
    {"temperature": 5e-324},
    {"temperature": 2, "top_p": 5e-324},
    {"temperature": 1, "top_p": 1e-46},
    {"temperature": 1, "top_k": 10**30, "seed": -(2**63) + 1},
    {"temperature": 1e-5, "top_k": 1, "top_p": 1e-300, "logprobs": True, "top_logprobs": 20},
]


def test_extreme_settings_end_nobody_elses_answer(model):
    """Poisonous requests beside running ones: all are answered, with the text they get alone."""
    prompts = ["Once upon", "It is"]
    expected = [answer_alone(model, one, max_new_tokens=150) for one in prompts]
    with serving({"mine": model}) as running:
        links = []
        for prompt in prompts:
            body = json.dumps({"prompt": prompt, "max_tokens": 150}).encode()
            link = connect(running)
            head = HEAD.replace(CHAT, "/v1/completions")
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            links.append(link)
        wait_for(lambda: running.engine.running == 2)
        for settings in EXTREMES:
            status, reply, _ = running.send(CHAT, json.loads(BODY) | {"max_tokens": 3} | settings)
            assert status == 200, (settings, reply)
            assert reply["usage"]["completion_tokens"] == 3
        assert running.engine.running > 0  # they were under way all the time
        for link, ids in zip(links, expected, strict=True):
            with link, link.makefile("rb") as file:
                while (line := file.readline()) != b"\r\n":
                    assert line
                text = gpt2_tokenizer().decode(ids)
                assert json.loads(file.read1(1_000_000))["choices"][0]["text"] == text


# --- What is said ---


def test_lines_of_a_kind_come_once_a_second(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    for place in range(1000):
        log.log_line(f"client {place}\nleft, with sk-abcdefghijklmnopqrstuvwxyz123456", kind="left")
        log.log_line("another")
    clock[0] += 1.5
    log.log_line("client 1001 left", kind="left")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "client 0 left, with ***",
        "another",
        "client 1001 left (999 more like it since the last such line)",
    ]
    for place in range(3000):  # nor is what was said kept for ever
        clock[0] += 0.01
        log.log_line(f"kind {place}")
    assert len(log._said) <= log.MOST_KINDS


def test_records_of_other_packages_are_one_line(capsys):
    log_to: Callable[..., None] = logging.getLogger("asyncio").error
    logging.config.dictConfig(log.LOG_CONFIG)
    try:
        raise OSError(24, "Too many open files")
    except OSError:
        log_to("socket.accept() failed\nsocket: <…>\nand more", exc_info=True)
    (said,) = capsys.readouterr().err.splitlines()
    assert said == ("error: socket.accept() failed (OSError: [Errno 24] Too many open files)")
