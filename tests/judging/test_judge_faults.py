"""Judges that fail, over both protocols: what is sent again, what stops, what concerns one prompt.

Every fault is played by a scripted loopback server. Each protection has its negative control: the
same fault with the protection taken away.
"""

from __future__ import annotations

import http.server
import json
import logging
import socket
import threading
import time
from pathlib import Path

import pytest
import requests

from lightning_sft.common.errors import ServiceError
from lightning_sft.judging import client
from lightning_sft.judging.client import Judge
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.probe import probe
from lightning_sft.judging.prompt import load_prompt
from support.drip import drip
from support.judge_server import Cut, Hang, JudgeServer, Raw, Reset, Says, Status, Trickle

KEY = "planted-KEY.0123456789abcdef"
SCHEMA = load_prompt("chapter").schema()
PROTOCOLS = pytest.mark.parametrize("protocol", ["ollama", "openai"])
STREAMED = pytest.mark.parametrize("stream", [True, False])


def config_for(server: JudgeServer, **settings) -> JudgeConfig:
    fast = {"timeout": 0.4, "backoff": 0.01, "retries": 2, "load_timeout": 1.0}
    return JudgeConfig(server.protocol, server.url, **(fast | settings))


def ask(server: JudgeServer, **settings):
    return Judge(config_for(server, **settings)).ask("Rate it.", SCHEMA, seed=123)


def protocol_error(server: str, message: str, kind: str = "") -> dict:
    if server == "ollama":
        return {"error": message}
    return {"error": {"message": message, "type": kind, "code": kind or None}}


@PROTOCOLS
@STREAMED
def test_reply_streamed_and_whole(protocol, stream):
    with JudgeServer(protocol, ['{"score": 85}']) as server:
        reply = ask(server, stream=stream)
        body = server.requests[0]["body"]
    assert (reply.text, reply.reason) == ('{"score": 85}', None)
    assert body["model"] == "llama3"
    assert body["stream"] is stream
    assert body["messages"] == [{"role": "user", "content": "Rate it."}]


def test_ollama_request_holds_the_chapters_options():
    with JudgeServer("ollama") as server:
        ask(server, temperature=0.0)
        body = server.requests[0]["body"]
    # Under `options`, where Ollama reads them; and never a prompt that is cut without a word.
    assert body["options"] == {"temperature": 0.0, "seed": 123, "num_ctx": 2048, "num_predict": 512}
    assert body["truncate"] is False
    assert body["format"] == SCHEMA


def test_without_schema_and_limit_ollama_gets_the_books_request():
    """`query_model` of section 7.8; both other fields are there to change no reply."""
    with JudgeServer("ollama") as server:
        ask(server, json_schema=False, max_tokens=None)
        body = server.requests[0]["body"]
    book = {
        "model": "llama3",
        "messages": [{"role": "user", "content": "Rate it."}],
        "options": {"seed": 123, "temperature": 0, "num_ctx": 2048},
    }
    assert body == book | {"stream": True, "truncate": False}


def test_openai_request_asks_for_the_schema():
    with JudgeServer("openai") as server:
        ask(server)
        body = server.requests[0]["body"]
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.0, 123, 512)
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA


@PROTOCOLS
def test_schema_is_left_out_where_the_server_cannot(protocol):
    unknown = Status(400, protocol_error(protocol, "response_format/format json_schema unknown"))
    with JudgeServer(protocol, [unknown, "85", "86"]) as server:
        judge = Judge(config_for(server))
        first, second = (judge.ask("Rate it.", SCHEMA, 123) for _ in range(2))
        bodies = [request["body"] for request in server.requests]
    assert (first.text, first.held_to_schema) == ("85", False)
    assert second.text == "86"
    assert ["format" in b or "response_format" in b for b in bodies] == [True, False, False]


PASSING = {
    "408": Status(408),
    "429": Status(429),
    "500": Status(500),
    "502": Status(502, b"<html>bad gateway</html>"),
    "503": Status(503),
    "reset": Reset(),
    "timeout": Hang(0.8),
    "trickle": Trickle(),
    "cut stream": Cut(),
    "torn JSON": Cut(torn=True),
    "error under 200": Raw({"error": "model runner has unexpectedly stopped"}),
    "HTML under 200": Raw(b"<html>portal</html>"),
    "list under 200": Raw([1]),
}


@PROTOCOLS
@pytest.mark.parametrize("fault", PASSING)
def test_passing_fault_is_sent_again(protocol, fault):
    with JudgeServer(protocol, [PASSING[fault], "85"]) as server:
        reply = ask(server)
        assert (reply.text, reply.reason) == ("85", None)
        assert len(server.prompts) == 2


@PROTOCOLS
@pytest.mark.parametrize("fault", PASSING)
def test_passing_fault_without_retries_is_a_reason(protocol, fault):
    """The negative control of the retries, and what is left when they are used up."""
    with JudgeServer(protocol, [PASSING[fault], "85"]) as server:
        reply = ask(server, retries=0)
    assert reply.text is None
    assert reply.reason
    assert "\n" not in reply.reason


@PROTOCOLS
def test_tries_end(protocol):
    with JudgeServer(protocol, [Status(500, protocol_error(protocol, "out of memory"))]) as server:
        reply = ask(server, retries=2)
        assert len(server.prompts) == 3
    assert reply.reason.startswith("HTTP 500: out of memory")


def test_error_in_the_middle_of_a_stream():
    lines = [{"message": {"content": "8"}, "done": False}, {"error": "unexpected EOF"}]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with JudgeServer("ollama", [Raw(content), "85"]) as server:
        assert ask(server).text == "85"
        assert len(server.prompts) == 2


@PROTOCOLS
@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_obeyed(protocol, kind):
    in_two_seconds = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    value = "1" if kind == "seconds" else in_two_seconds
    with JudgeServer(protocol, [Status(429, headers={"Retry-After": value}), "85"]) as server:
        reply = ask(server)
    assert reply.text == "85"
    assert reply.seconds > 0.9  # the date has whole seconds only


@PROTOCOLS
def test_without_retry_after_the_wait_is_the_backoff(protocol):
    """Negative control: the wait above comes from the header."""
    with JudgeServer(protocol, [Status(429), "85"]) as server:
        assert ask(server).seconds < 0.5


def test_retry_after_of_an_hour_is_not_waited_for():
    with JudgeServer("ollama", [Status(429, headers={"Retry-After": "3600"}), "85"]) as server:
        reply = ask(server)
    assert reply.reason.startswith("HTTP 429")
    assert reply.seconds < 1


def test_server_that_is_gone_costs_no_patience_for_ever():
    with JudgeServer("ollama", [Status(500)]) as server:
        judge = Judge(config_for(server, retries=3))
        for _ in range(client.PATIENCE):
            judge.ask("x", None, 1)
        before = len(server.prompts)
        judge.ask("x", None, 1)
        assert len(server.prompts) == before + 1
        server.script = ["85"]
        judge.ask("x", None, 1)
        server.script = [Status(500)]
        before = len(server.prompts)
        judge.ask("x", None, 1)
        assert len(server.prompts) == before + 4  # patient again after a success


STOPPING = {
    "401": (Status(401), "HTTP 401"),
    "403": (Status(403), "HTTP 403"),
    "missing model": (Status(404, {"error": "model 'llama3' not found"}), "no such model"),
    "redirect": (Status(302, headers={"Location": "http://127.0.0.1:9/"}), "not followed"),
    "quota": (
        Status(429, {"error": {"message": "You exceeded", "code": "insufficient_quota"}}),
        "quota is used up",
    ),
}


@PROTOCOLS
@pytest.mark.parametrize("fault", STOPPING)
def test_stopping_fault_stops_at_once(protocol, fault):
    act, words = STOPPING[fault]
    with JudgeServer(protocol, [act, "85"]) as server:
        with pytest.raises(ServiceError, match=words) as caught:
            ask(server)
        assert len(server.prompts) == 1
    assert "\n" not in str(caught.value)


@PROTOCOLS
def test_prompt_longer_than_the_context(protocol):
    message = "the request exceeds the available context size"
    with JudgeServer(protocol, [Status(400, protocol_error(protocol, message)), "85"]) as server:
        judge = Judge(config_for(server, json_schema=False))
        reply = judge.ask("long", SCHEMA, 1)
        assert (reply.text, len(server.prompts)) == (None, 1)  # this prompt only, no retry
        assert judge.ask("short", SCHEMA, 1).text == "85"
    assert "does not fit into the judge's context" in reply.reason


def test_ollama_that_cuts_the_prompt_silently_is_noticed():
    """An old server answers as if it had read it all; its token count gives it away."""
    with JudgeServer("ollama", [Says("85", prompt_tokens=2048)]) as server:
        reply = ask(server)
        assert ask(server, num_ctx=4096).reason is None  # control: it fits here
    assert reply.text == "85"
    assert "does not fit" in reply.reason


@PROTOCOLS
@STREAMED
def test_reply_cut_for_length_is_no_score(protocol, stream):
    with JudgeServer(protocol, [Says("8", finish="length"), Says("8")]) as server:
        assert "cut for length" in ask(server, stream=stream).reason
        assert ask(server, stream=stream).reason is None  # control: same text, whole


@PROTOCOLS
@STREAMED
def test_missing_content_field(protocol, stream):
    with JudgeServer(protocol, [Says(None)]) as server:
        reply = ask(server, stream=stream)
    assert reply.reason == "the reply has no content field"
    assert "assistant" in reply.text  # what came is kept


def test_openai_refusal_and_content_filter():
    refusal = {"message": {"content": None, "refusal": "I cannot"}, "finish_reason": "stop"}
    acts = [Raw({"choices": [refusal]}), Says("", finish="content_filter")]
    with JudgeServer("openai", acts) as server:
        assert ask(server).reason == "the judge refused to answer"
        assert "content filter" in ask(server).reason


@PROTOCOLS
def test_probe_finds_a_good_judge_and_ollama_loads_it(protocol):
    with JudgeServer(protocol) as server:
        model = "llama3" if protocol == "ollama" else "judge"
        probe(Judge(config_for(server, model=model)))
        paths = [request["path"] for request in server.requests]
    assert server.prompts == []
    expected = ["/api/tags", "/api/chat"] if protocol == "ollama" else ["/health", "/v1/models"]
    assert paths == expected


@PROTOCOLS
def test_probe_no_server(protocol):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ServiceError, match=r"no judge at .*Connection refused"):
        probe(Judge(JudgeConfig(protocol, url)))
    assert time.monotonic() - start < 10


@PROTOCOLS
def test_probe_no_such_model(protocol):
    server = JudgeServer(protocol, models=["phi3:latest", "mistral"])
    with server, pytest.raises(ServiceError, match=r"no model 'llama3' \(it has: phi3:latest, mis"):
        probe(Judge(config_for(server)))


@PROTOCOLS
def test_probe_still_loading(protocol):
    server = JudgeServer(protocol, loading=1000, models=["llama3"])
    with server, pytest.raises(ServiceError, match=r"still loading its model after 0.3 s"):
        probe(Judge(config_for(server, load_timeout=0.3)))


@PROTOCOLS
def test_probe_waits_for_a_judge_that_loads(protocol):
    with JudgeServer(protocol, loading=2, models=["llama3"]) as server:
        probe(Judge(config_for(server)))
        assert server.loading == 0


def test_probe_ollama_model_that_loads_too_slowly_or_not_at_all():
    slow = JudgeServer("ollama", load=Hang(1.0))
    with slow, pytest.raises(ServiceError, match="still loading"):
        probe(Judge(config_for(slow, load_timeout=0.3)))
    too_big = JudgeServer("ollama", load=Status(500, {"error": "needs more system memory"}))
    with too_big, pytest.raises(ServiceError, match="cannot load 'llama3': HTTP 500: needs more"):
        probe(Judge(config_for(too_big)))


@PROTOCOLS
@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Status(401), "put a valid key"),
        (Status(302, headers={"Location": "http://127.0.0.1:9/"}), "redirects are not followed"),
        (Status(500), "fails: HTTP 500"),
    ],
)
def test_probe_finds_what_stops(protocol, found, words):
    config = {"load_timeout": 0.2}
    with JudgeServer(protocol, probe=found) as server:
        if protocol == "openai" and found.code == 302:
            # A list that cannot be had proves nothing there; the first question finds it.
            probe(Judge(config_for(server, **config)))
            return
        with pytest.raises(ServiceError, match=words):
            probe(Judge(config_for(server, **config)))
        assert server.prompts == []


def test_probe_another_protocol():
    with JudgeServer("openai") as server, pytest.raises(ServiceError, match="404"):
        probe(Judge(JudgeConfig("ollama", server.url)))
    with JudgeServer("ollama", probe=Status(200, {"hello": "world"})) as server:
        for protocol in ("ollama", "openai"):
            with pytest.raises(ServiceError, match=f"not in {protocol}'s protocol"):
                probe(Judge(JudgeConfig(protocol, server.url)))


def test_probe_openai_without_a_list_of_models_is_fine():
    with JudgeServer("openai", probe=Status(404)) as server:
        probe(Judge(config_for(server)))


@pytest.mark.parametrize(
    ("protocol", "ending"),
    [
        *(("ollama", ending) for ending in ("", "/", "/api", "/api/chat")),
        *(("openai", ending) for ending in ("", "/", "/v1", "/v1/", "/v1/chat/completions")),
    ],
)
def test_address_in_its_usual_forms(protocol, ending):
    with JudgeServer(protocol) as server:
        assert Judge(JudgeConfig(protocol, server.url + ending)).ask("x", None, 1).text == "85"


def plant(monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_SFT_JUDGE_KEY", KEY)


@PROTOCOLS
def test_key_is_sent_and_never_kept(protocol, monkeypatch, caplog):
    """The server sends the key back in every way it can; it shows nowhere."""
    plant(monkeypatch)
    caplog.set_level(logging.DEBUG)
    echo = f"Authorization: Bearer {KEY}"
    acts = [
        echo,
        Status(400, protocol_error(protocol, f"bad {echo}")),
        Status(500, protocol_error(protocol, f"bad {echo}")),
        Raw({"error": f"bad {echo}"}),
        Raw({"done": True, "choices": [{"message": {"k": echo}, "finish_reason": "stop"}]}),
    ]
    seen = []
    with JudgeServer(protocol, acts) as server:
        judge = Judge(config_for(server, retries=0))
        for _ in acts:
            seen.append(repr(judge.ask("x", None, 1)))
        for status in (401, 403, 404, 302):
            server.script = [Status(status, protocol_error(protocol, echo))]
            with pytest.raises(ServiceError) as caught:
                judge.ask("x", None, 1)
            seen.append(str(caught.value))
        assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert "***" in seen[0]
    assert KEY not in "".join(seen) + caplog.text


def test_negative_control_without_cleaning_the_key_would_be_kept(monkeypatch):
    plant(monkeypatch)
    monkeypatch.setattr(Judge, "_fit_to_keep", lambda self, text: text)
    with JudgeServer("ollama", [f"Bearer {KEY}"]) as server:
        assert KEY in ask(server).text


class _Recorder(http.server.BaseHTTPRequestHandler):
    seen: list[dict]

    def do_POST(self) -> None:
        self.seen.append(dict(self.headers))
        self.send_error(500)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("protected", [True, False])
def test_redirects_are_not_followed(monkeypatch, protected):
    plant(monkeypatch)
    handler = type("Handler", (_Recorder,), {"seen": []})
    elsewhere = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=elsewhere.serve_forever, args=(0.02,), daemon=True).start()
    if not protected:  # the negative control
        request = requests.Session.request
        monkeypatch.setattr(
            requests.Session,
            "request",
            lambda *args, **rest: request(*args, **(rest | {"allow_redirects": True})),
        )
    location = {"Location": f"http://127.0.0.1:{elsewhere.server_port}/"}
    with JudgeServer("ollama", [Status(307, headers=location)]) as server:
        if protected:
            with pytest.raises(ServiceError, match="redirects are not followed"):
                ask(server, retries=0)
        else:
            ask(server, retries=0)
    elsewhere.shutdown()
    elsewhere.server_close()
    assert len(handler.seen) == (0 if protected else 1)


@pytest.mark.parametrize("protected", [True, False])
def test_netrc_is_ignored(monkeypatch, tmp_path: Path, protected):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1\nlogin me\npassword secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr(client, "is_loopback", lambda url: False)  # as for a far server
    if not protected:  # the negative control
        monkeypatch.setattr(client, "_Auth", lambda key: None)
    with JudgeServer("ollama") as server:
        ask(server)
        headers = server.requests[0]["headers"]
    assert ("Authorization" in headers) is (not protected)


@PROTOCOLS
@STREAMED
def test_half_a_character_in_a_reply_is_kept_as_a_mark(protocol, stream):
    """JSON can spell a lone surrogate, and no UTF-8 file can hold it."""
    with JudgeServer(protocol, ["85 \ud800", "\ud83d\ude00 90", "\ufeff"]) as server:
        texts = [ask(server, stream=stream).text for _ in range(3)]
    assert texts == ["85 \ufffd", "\U0001f600 90", "\ufeff"]  # a pair of halves is a character


@PROTOCOLS
def test_escape_sequences_of_a_judge_reach_no_terminal(protocol):
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m \u202e \ud800"
    acts = [Status(code, protocol_error(protocol, evil)) for code in (400, 500, 403)]
    with JudgeServer(protocol, acts) as server:
        words = [ask(server, retries=0).reason for _ in range(2)]
        with pytest.raises(ServiceError) as caught:
            ask(server)
    for text in (*words, str(caught.value)):
        assert "owned" in text
        assert text.isprintable()
    listing = JudgeServer(protocol, models=[evil])
    with listing, pytest.raises(ServiceError) as caught:
        probe(Judge(config_for(listing)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"],
)
def test_headers_that_trickle_end_at_the_deadline(head):
    with drip(head, b"0" * 9999) as address:
        start = time.monotonic()
        config = JudgeConfig("ollama", address, timeout=0.4, retries=0)
        assert Judge(config).ask("x", None, 1).reason == "no whole reply within 0.4 s"
        assert time.monotonic() - start < 3.0


def test_trickle_ends_at_the_deadline_and_not_by_the_sockets_timeout():
    """Each byte is in time, so the socket's own timeout never comes: the negative control."""
    with JudgeServer("ollama", [Trickle(0.05)]) as server:
        start = time.monotonic()
        reply = ask(server, retries=0)
        assert reply.reason == "no whole reply within 0.4 s"
        assert time.monotonic() - start < 1.5
        body = {"messages": [{"content": "x"}]}
        response = requests.post(f"{server.url}/api/chat", json=body, stream=True, timeout=0.4)
        started = time.monotonic()
        for _ in response.iter_content(1):
            if time.monotonic() - started > 1.0:
                break
        assert time.monotonic() - started > 1.0
        response.close()


def test_endless_reply_is_cut_off(monkeypatch):
    monkeypatch.setattr(client, "MAX_REPLY_BYTES", 1000)
    with JudgeServer("ollama", [Says("x" * 2000)]) as server:
        assert "longer than" in ask(server, retries=0, stream=False).reason
