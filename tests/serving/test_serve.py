"""`serve` under OpenAI's own client, and under clients that mean no good or do not know better."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import get_style
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.decoding.batch import RunningBatch
from lightning_sft.decoding.generation import generate
from lightning_sft.decoding.settings import GenerationConfig
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.serving.answers import Stream
from lightning_sft.serving.serve import TOKEN_VARIABLE, check_address, choose_names, listen
from lightning_sft.serving.settings import Limits
from support.runs import run, spawn
from support.serving import SMALL, Served, answer_alone, make_talker, serving, wait_for

openai = pytest.importorskip("openai", reason="the official client is not installed")
TOKENIZER = gpt2_tokenizer()
TOKEN = "a-token-of-more-than-sixteen"
QUESTIONS = [f"Question {place}" + " and more" * (place % 7) + "?" for place in range(32)]


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return make_talker()


@pytest.fixture(scope="module")
def served(model) -> Iterator[Served]:
    with serving({"mine": model, "other": make_talker(1)}) as running:
        yield running


@pytest.fixture
def slow(monkeypatch) -> None:
    """Steps that take 10 ms, so that something can happen between two of them."""
    feed = RunningBatch.feed

    def dawdle(*arguments: Any) -> Any:
        time.sleep(0.01)
        return feed(*arguments)

    monkeypatch.setattr(RunningBatch, "feed", dawdle)


@pytest.fixture
def client(served) -> Iterator[Any]:
    with connect(served) as made:
        yield made


def connect(served: Served, key: str = "none") -> Any:
    return openai.OpenAI(base_url=served.url + "/v1", api_key=key, max_retries=0)


def ask(client: Any, content: str, **settings: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    settings = {"model": "mine", "messages": messages, "max_tokens": 20} | settings
    return client.chat.completions.create(**settings)


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def expect(model: GPTModel, question: str, given: str = "", **settings: Any) -> str:
    """The chat answer that `generate` gives to this prompt alone."""
    style = get_style("alpaca")
    prompt = style.prompt(Entry(question, given, ""))
    settings = {"max_new_tokens": 20} | settings
    return style.extract(TOKENIZER.decode(answer_alone(model, prompt, **settings)))


# --- The official client ---


def test_models(client):
    assert [model.id for model in client.models.list()] == ["mine", "other"]
    assert client.models.retrieve("mine").context_length == SMALL.context_length
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("theirs")


def test_chat_streamed_and_not(client, model):
    expected = expect(model, "Name a colour.")
    reply = ask(client, "Name a colour.")
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason == "length"
    prompt = TOKENIZER.encode(get_style("alpaca").prompt(Entry("Name a colour.", "", "")))
    usage = reply.usage
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    assert counts == (len(prompt), 20, len(prompt) + 20)

    chunks = list(ask(client, "Name a colour.", stream=True))
    assert text_of(chunks) == expected
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {reply.id}
    assert all(chunk.usage is None for chunk in chunks)

    *chunks, last = ask(
        client, "Name a colour.", stream=True, stream_options={"include_usage": True}
    )
    assert text_of(chunks) == expected
    assert (last.choices, last.usage.total_tokens) == ([], len(prompt) + 20)


def test_the_other_model_answers_for_itself(client, model):
    assert ask(client, "Hi", model="other").choices[0].message.content == expect(
        make_talker(1), "Hi"
    )


def settings_of(place: int) -> dict[str, Any]:
    """Of one of 32 clients: lengths of their own, and every fourth is sampled with its own seed."""
    sampled = {"temperature": 1.5, "top_p": 0.9, "seed": place} if place % 4 == 0 else {}
    return {"max_tokens": 10 + place % 13} | sampled


@pytest.fixture(scope="module")
def answers_alone(model) -> list[str]:
    """What each of 32 clients would get alone."""
    answers = []
    for place, question in enumerate(QUESTIONS):
        settings = settings_of(place)
        settings["max_new_tokens"] = settings.pop("max_tokens")
        answers.append(expect(model, question, **settings))
    assert len(set(answers)) == len(answers)  # else one could pass for another
    return answers


@pytest.mark.parametrize("stream", [False, True])
def test_32_clients_at_once_get_what_each_would_get_alone(served, client, answers_alone, stream):
    before = served.engine.steps
    ready = threading.Barrier(len(QUESTIONS))

    def one(place: int) -> str:
        ready.wait()
        reply = ask(client, QUESTIONS[place], stream=stream, **settings_of(place))
        return text_of(reply) if stream else reply.choices[0].message.content

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(one, range(len(QUESTIONS))))
    assert answers == answers_alone
    tokens = sum(settings_of(place)["max_tokens"] for place in range(len(QUESTIONS)))
    assert served.engine.steps - before < tokens / 2  # they did share steps


def test_completions(client, model):
    expected = TOKENIZER.decode(answer_alone(model, "Once upon", max_new_tokens=9))
    settings = {"model": "mine", "max_tokens": 9}
    reply = client.completions.create(prompt="Once upon", **settings)
    assert reply.choices[0].text == expected  # nothing is taken off
    ids = TOKENIZER.encode("Once upon")
    assert client.completions.create(prompt=ids, **settings).choices[0].text == expected
    stream = client.completions.create(prompt="Once upon", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_several_prompts_in_one_request(client, model):
    prompts = ["Once upon", "It is", "A"]
    expected = [TOKENIZER.decode(answer_alone(model, one, max_new_tokens=7)) for one in prompts]
    settings = {"model": "mine", "max_tokens": 7}
    reply = client.completions.create(prompt=prompts, **settings)
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.completion_tokens == 21
    texts = ["", "", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **settings):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_seeds(client, model):
    settings: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12}
    first, again = (
        ask(client, "Hi", seed=7, **settings).choices[0].message.content for _ in range(2)
    )
    assert first == again == expect(model, "Hi", seed=7, temperature=1.5, max_new_tokens=12)
    assert ask(client, "Hi", seed=8, **settings).choices[0].message.content != first
    free = {ask(client, "Hi", **settings).choices[0].message.content for _ in range(3)}
    assert len(free) == 3  # a new one for each request that gives none


def test_top_k_as_an_extension(client, model):
    reply = ask(client, "Hi", temperature=1.0, seed=1, extra_body={"top_k": 1})
    assert reply.choices[0].message.content == expect(model, "Hi")


def test_stop_strings_across_tokens(client, model):
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 1}
    whole = ask(client, "Stop?", **settings).choices[0].message.content
    tokens = answer_alone(
        model, get_style("alpaca").prompt(Entry("Stop?", "", "")), max_new_tokens=20, **settings
    )
    pieces = [TOKENIZER.decode([token]) for token in tokens]
    seam = next(  # the end of one token and the beginning of the next, seen there first
        place
        for place in range(5, 20)
        if whole.find(pieces[place - 1][-1] + pieces[place][:2])
        == len("".join(pieces[:place]).lstrip()) - 1
    )
    stop = pieces[seam - 1][-1] + pieces[seam][:2]
    expected = whole[: whole.index(stop)].rstrip()
    assert expected
    for given in (stop, ["never", stop]):
        reply = ask(client, "Stop?", stop=given, **settings)
        assert reply.choices[0].message.content == expected
        assert reply.choices[0].finish_reason == "stop"
        chunks = list(ask(client, "Stop?", stop=given, stream=True, **settings))
        assert text_of(chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == seam + 1  # as many as it took to see it


def test_a_stop_string_ends_the_computing(served, client, slow):
    whole = ask(client, "Stop?", max_tokens=5).choices[0].message.content
    served.wait_idle()
    before = served.engine.steps
    ask(client, "Stop?", max_tokens=180, stop=whole[:4])
    served.wait_idle()
    assert served.engine.steps - before < 20


def test_end_of_text_ends_an_answer(make_model):
    model = make_talker()
    prompt = get_style("alpaca").prompt(Entry("Hi", "", ""))
    tokens = answer_alone(model, prompt, max_new_tokens=20)
    fifth = tokens[5]
    with torch.no_grad():  # the model now writes end-of-text where it wrote the sixth token
        head = model.out_head.weight
        head[50256] = head[fifth]
        head[fifth] = 0
    with serving({"mine": model}) as running, connect(running) as client:
        reply = ask(client, "Hi")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == tokens.index(fifth)


def test_chat_logprobs(client, model):
    reply = ask(client, "Hi", max_tokens=6, logprobs=True, top_logprobs=3)
    found = reply.choices[0].logprobs.content
    prompt = TOKENIZER.encode(get_style("alpaca").prompt(Entry("Hi", "", "")))
    ids = prompt + answer_alone(model, get_style("alpaca").prompt(Entry("Hi", "", "")))[:6]
    expected = model(torch.tensor([ids])).log_softmax(-1)[0]
    assert len(found) == 6
    for place, token in enumerate(found, start=len(prompt)):
        assert bytes(token.bytes) == TOKENIZER.token_bytes(ids[place])
        assert token.logprob == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-4)
        best = expected[place - 1].topk(3)
        assert [bytes(top.bytes) for top in token.top_logprobs] == [
            TOKENIZER.token_bytes(one) for one in best.indices.tolist()
        ]
    chunks = list(ask(client, "Hi", max_tokens=6, logprobs=True, stream=True))
    streamed = [
        token.logprob
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == pytest.approx([token.logprob for token in found], abs=1e-5)


def test_completions_logprobs(client):
    reply = client.completions.create(model="mine", prompt="Once", max_tokens=5, logprobs=2)
    choice = reply.choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 5
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == pytest.approx(logprob) == max(top.values())  # greedy
        assert len(top) == 2
    if "\ufffd" not in choice.text:
        starts = [*found.text_offset[1:], len(choice.text)]
        cuts = [choice.text[a:b] for a, b in zip(found.text_offset, starts, strict=True)]
        assert cuts == found.tokens


# --- Conversations ---


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "alpaca",
            "{0}\n\n### Instruction:\nBe brief.\n\nOne?\n\n### Response:\n1\n\n"
            "{0}\n\n### Instruction:\nTwo?\n\n### Input:\ntext\n\n### Response:\n",
        ),
        (
            "phi3",
            "<|user|>\nBe brief.\n\nOne?\n\n<|assistant|>\n1\n\n"
            "<|user|>\nTwo? text\n\n<|assistant|>\n",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
            "<|im_start|>user\nTwo?\ntext<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_a_conversation_as_a_prompt(model, style, expected):
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request."
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1", "refusal": None, "tool_calls": []},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": "?"}],
        },
    ]
    with serving({"mine": model}, style) as running:
        body = {"messages": messages, "input": "text"}
        status, reply, _ = running.send("/v1/chat/prompt", body)
        assert (status, reply["prompt"]) == (200, expected.format(preamble))
        assert reply["prompt_tokens"] == len(TOKENIZER.encode(reply["prompt"]))
        # And that is what is answered.
        _, chat, _ = running.send("/v1/chat/completions", body | {"max_tokens": 8})
        whole = TOKENIZER.decode(answer_alone(model, reply["prompt"], max_new_tokens=8))
        assert chat["choices"][0]["message"]["content"] == get_style(style).extract(whole)


# --- Refusals ---

USER = [{"role": "user", "content": "Hi"}]
ANSWER = [{"role": "assistant", "content": "Yes."}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        (CHAT, b"{", 400, None, "not valid JSON"),
        (CHAT, b'{"temperature": NaN}', 400, None, "not valid JSON"),
        (CHAT, b"\xff\xfe", 400, None, "not valid JSON"),
        (CHAT, b"[" * 100_000, 400, None, "not valid JSON"),
        (CHAT, [], 400, None, "JSON object"),
        (CHAT, {}, 400, "messages", "at least one"),
        (CHAT, {"messages": []}, 400, "messages", "at least one"),
        (CHAT, {"messages": "Hi"}, 400, "messages", "list"),
        (CHAT, {"messages": ["Hi"]}, 400, "messages[0]", "object"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "role"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "string"),
        (CHAT, {"messages": [{"role": "user", "content": " "}]}, 400, "messages[0].content", ""),
        (CHAT, {"messages": [*USER, *USER]}, 400, "messages", "in turn"),
        (CHAT, {"messages": [*USER, {"role": "assistant", "content": "x"}]}, 400, "messages", ""),
        (CHAT, {"messages": [*USER, {"role": "system", "content": "x"}]}, 400, "messages", ""),
        (CHAT, {"messages": [USER[0] | {"name": "me"}]}, 400, "messages[0].name", "supported"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content",
            "text only",
        ),
        (CHAT, {"messages": USER, "n": 2}, 400, "n", "not supported"),
        (CHAT, {"messages": USER, "n": True}, 400, "n", "not supported"),
        (CHAT, {"messages": USER, "temperature": -1}, 400, "temperature", "0 to 2"),
        (CHAT, {"messages": USER, "temperature": "hot"}, 400, "temperature", "number"),
        (CHAT, {"messages": USER, "temperature": True}, 400, "temperature", "number"),
        (CHAT, {"messages": USER, "top_p": 1.1}, 400, "top_p", "0 to 1"),
        (CHAT, {"messages": USER, "top_k": 0}, 400, "top_k", ">= 1"),
        (CHAT, {"messages": USER, "seed": 1.5}, 400, "seed", "integer"),
        (CHAT, {"messages": USER, "seed": 2**64}, 400, "seed", "integer"),
        (CHAT, {"messages": USER, "max_tokens": 0}, 400, "max_tokens", "1 to 1024"),
        (CHAT, {"messages": USER, "max_tokens": 1025}, 400, "max_tokens", "1 to 1024"),
        (
            CHAT,
            {"messages": USER, "max_tokens": 5, "max_completion_tokens": 6},
            400,
            None,
            "differ",
        ),
        (CHAT, {"messages": USER, "stop": [""]}, 400, "stop", "none empty"),
        (CHAT, {"messages": USER, "stop": ["a"] * 5}, 400, "stop", "at most 4"),
        (CHAT, {"messages": USER, "stop": 3}, 400, "stop", "text"),
        (CHAT, {"messages": USER, "stream": "yes"}, 400, "stream", "true or false"),
        (CHAT, {"messages": USER, "stream_options": {}}, 400, "stream_options", "stream: true"),
        (CHAT, {"messages": USER, "top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
        (
            CHAT,
            {"messages": USER, "logprobs": True, "top_logprobs": 21},
            400,
            "top_logprobs",
            "0 to 20",
        ),
        (CHAT, {"messages": USER, "tools": [{}]}, 400, "tools", "not supported"),
        (CHAT, {"messages": USER, "logit_bias": {"1": 1}}, 400, "logit_bias", "not supported"),
        (CHAT, {"messages": USER, "frequency_penalty": 0.5}, 400, "frequency_penalty", ""),
        (CHAT, {"messages": USER, "tempreature": 1}, 400, "tempreature", "Unknown field"),
        (CHAT, {"messages": USER, "model": "gpt-4"}, 404, "model", "not served"),
        (CHAT, {"messages": USER, "model": 7}, 404, "model", "not served"),
        (CHAT, {"messages": USER, "input": 7}, 400, "input", "string"),
        (COMPLETIONS, {}, 400, "prompt", "must be a text"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt", "empty"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "must be a text"),
        (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt", "must be a text"),
        (COMPLETIONS, {"prompt": [50257]}, 400, "prompt", "0 to 50256"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "0 to 50256"),
        (COMPLETIONS, {"prompt": ["a"] * 33}, 400, "prompt", "at most 32"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 6}, 400, "logprobs", "0 to 5"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, 400, "echo", "not supported"),
        (COMPLETIONS, {"prompt": "a", "messages": USER}, 400, "messages", "Unknown field"),
        (COMPLETIONS, {"prompt": "word " * 256}, 400, None, "context of 256"),
        (COMPLETIONS, {"prompt": "word " * 2000}, 400, None, "at most 1024"),
        (COMPLETIONS, {"prompt": "word " * 100_000}, 400, None, "over 1024"),
        (COMPLETIONS, {"prompt": "x" * 1_000_001}, 413, None, "1000000 bytes"),
    ],
    ids=lambda value: f"{value}"[:50],
)
def test_malformed_requests_get_the_apis_error(served, path, body, status, param, words):
    found, reply, headers = served.send(path, body, "POST")
    assert headers["Content-Type"] == "application/json"
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert (found, reply["error"]["type"]) == (status, "invalid_request_error")
    assert words in reply["error"]["message"]
    assert param is None or reply["error"]["param"] == param
    assert len(reply["error"]["message"]) < 500
    assert served.engine.running == served.engine.waiting == 0


def test_what_asks_for_nothing_is_let_through(served):
    harmless = {"n": 1, "tools": [], "logit_bias": {}, "presence_penalty": 0.0, "stop": None}
    harmless |= {"user": "me", "response_format": {"type": "text"}, "metadata": {"a": "b"}}
    body = {"messages": USER, "max_tokens": 2, "top_p": 0} | harmless
    assert served.send(CHAT, body)[0] == 200


def test_errors_are_the_clients_own_kinds(client):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "Hi", n=3)
    assert (error.value.param, error.value.code) == ("n", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        ask(client, "Hi", model="gpt-4")


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/nothing", "GET", 404),
        ("/v1/embeddings", "POST", 404),
        (CHAT, "GET", 405),
        (CHAT, "OPTIONS", 405),  # no browser is told that it may come from elsewhere
        ("/", "POST", 405),
        ("/../etc/passwd", "GET", 404),
    ],
)
def test_paths_and_methods(served, path, method, status):
    found, reply, headers = served.send(path, b"{}" if method == "POST" else None, method)
    assert (found, reply["error"]["type"]) == (status, "invalid_request_error")
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_only_json_is_read(served):
    """What a form on another page can send without asking the server first."""
    status, reply, _ = served.send(CHAT, b'{"messages": []}', "POST", Content_Type="text/plain")
    assert (status, "application/json" in reply["error"]["message"]) == (415, True)


# --- Who may come ---


def test_a_page_elsewhere_may_not(served):
    for headers, code in (
        ({"Host": "evil.example"}, "wrong_host"),  # its name was pointed at 127.0.0.1
        ({"Host": "localhost.evil.example:8000"}, "wrong_host"),
        ({"Host": "[", "Origin": ""}, "wrong_host"),
        ({"Origin": "https://evil.example"}, "wrong_origin"),
        ({"Origin": "null"}, "wrong_origin"),
    ):
        for path in ("/", "/v1/models", "/health"):
            status, reply, _ = served.send(path, **headers)
            assert (status, reply["error"]["code"]) == (403, code)
    port = urlsplit(served.url).port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]", "LOCALHOST"):
        assert served.send("/v1/models", Host=host)[0] == 200
    assert served.send("/v1/models", Origin=served.url)[0] == 200


def test_a_token_is_needed_for_the_api(model, capsys):
    with serving({"mine": model}, token=TOKEN, loopback=False) as running:
        for given in (None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
            headers = {} if given is None else {"Authorization": given}
            for path in ("/v1/models", CHAT, "/v1/chat/prompt", "/v1/nothing"):
                status, reply, answered = running.send(path, **headers)
                assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
                assert answered["WWW-Authenticate"] == "Bearer"
        assert running.send("/v1/models", Authorization=f"Bearer {TOKEN}")[0] == 200
        assert running.send("/health")[0] == 200
        with connect(running, TOKEN) as client:
            assert ask(client, "Hi").choices
        with connect(running, "wrong") as client, pytest.raises(openai.AuthenticationError):
            ask(client, "Hi")
    assert TOKEN not in "".join(capsys.readouterr())


def test_which_addresses_need_a_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert check_address(host) == (True, None)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org", ""):
        with pytest.raises(InputError, match=TOKEN_VARIABLE):
            check_address(host)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert check_address("0.0.0.0") == (False, TOKEN)
    assert check_address("127.0.0.1") == (True, TOKEN)
    for weak in ("short", "with blanks in between them", "nön-ascii-of-some-length"):
        monkeypatch.setenv(TOKEN_VARIABLE, weak)
        for host in ("0.0.0.0", "127.0.0.1"):
            with pytest.raises(InputError) as error:
                check_address(host)
            assert weak not in str(error.value)


# --- Five turns ---


def in_turn(served: Served, client: Any, layout: str, model: Any, **settings: Any) -> list[Any]:
    """The usage of each of five turns, whose answers are those of one pass with nothing kept."""
    style, said, usages = get_style(layout), [Message("system", "Be brief.")], []
    sent: list[Any] = [{"role": "system", "content": "Be brief."}]
    for turn in range(5):
        given = "some text" if turn == 1 else ""
        said.append(Message("user", f"Question {turn}, then?", input=given))
        sent.append({"role": "user", "content": f"Question {turn}, then?"})
        sent[-1] |= {"input": given} if given else {}
        ids = encode_prompt(Conversation(tuple(said)), style, TOKENIZER)
        found = generate(model, [ids], max_new_tokens=10, **settings)[0]
        expected = style.extract(TOKENIZER.decode(found))
        reply = ask(client, "", messages=sent, max_tokens=10, **settings)
        assert reply.choices[0].message.content == expected
        assert reply.usage.prompt_tokens == len(ids)
        assert not hasattr(reply, "cut_turns")
        usages.append(reply.usage)
        said.append(Message("assistant", expected))
        sent.append({"role": "assistant", "content": expected})
    return usages


@pytest.mark.parametrize("style", ["alpaca", "chatml"])
def test_five_turns_are_those_of_one_uncached_pass(style):
    """And before the fifth answer begins hardly more is read than before the first."""
    model = make_talker(config=dataclasses.replace(SMALL, context_length=512))
    with serving({"mine": model}, style) as running, connect(running) as client:
        for settings in ({}, {"temperature": 1.5, "seed": 3}):
            running.wait_idle()
            running.engine.lanes["mine"].kept.clear()
            usages = in_turn(running, client, style, model, **settings)
            read = [one.prompt_tokens - one.prompt_tokens_details.cached_tokens for one in usages]
            assert read[0] == usages[0].prompt_tokens
            assert read[4] <= 2 * read[0]
            assert usages[4].prompt_tokens > 4 * read[4]


def test_nothing_is_kept_where_there_is_no_room_for_it(model):
    limits = Limits(kept_bytes=0)
    with serving({"mine": model}, limits=limits) as running, connect(running) as client:
        for _ in range(2):
            usage = ask(client, "Name a colour, or another one. " * 4).usage
            assert usage.prompt_tokens_details.cached_tokens == 0


def test_turns_that_do_not_fit_are_left_out_and_counted(served, client, model):
    turn = [{"role": "user", "content": "word " * 30}, {"role": "assistant", "content": "x"}]
    system = {"role": "system", "content": "Be brief."}
    messages: list[Any] = [system, *turn * 7, {"role": "user", "content": "And now?"}]
    reply = ask(client, "", messages=messages)
    cut = reply.cut_turns
    assert 0 < cut < 7
    short = [system, *messages[1 + 2 * cut :]]
    again = ask(client, "", messages=short)
    assert not hasattr(again, "cut_turns")
    assert again.usage.prompt_tokens == reply.usage.prompt_tokens <= SMALL.context_length - 20
    assert again.choices[0].message.content == reply.choices[0].message.content
    chunks = list(ask(client, "", messages=messages, stream=True))
    assert {chunk.cut_turns for chunk in chunks} == {cut}
    assert text_of(chunks) == reply.choices[0].message.content
    _, shown, _ = served.send("/v1/chat/prompt", {"messages": messages, "max_tokens": 20})
    assert (shown["cut_turns"], shown["prompt_tokens"]) == (cut, reply.usage.prompt_tokens)
    assert shown["prompt"].count("### Instruction:") == 8 - cut
    longest = Limits(prompt_tokens=70)
    with serving({"mine": model}, limits=longest) as running, connect(running) as other:
        assert ask(other, "", messages=messages).usage.prompt_tokens <= 70


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([*USER, *ANSWER, *ANSWER, *USER], "messages", "messages[2] is the assistant's"),
        ([*ANSWER, *USER], "messages", "messages[0] is the assistant's, and must be the user's"),
        ([{"role": "critic", "content": "x"}], "messages[0].role", "must be system, developer"),
        ([*USER, {"role": "assistant", "content": " "}, *USER], "messages[1].content", "is empty"),
        ([*USER, {"role": "assistant", "content": None}, *USER], "messages[1].content", "string"),
        ([*USER, *ANSWER], "messages", "must end with the user's message"),
        ([{"role": "system", "content": "x"}], "messages", "must end with the user's message"),
        ([USER[0] | {"input": 7}], "messages[0].input", "must be a string"),
        ([*USER, ANSWER[0] | {"input": "x"}, *USER], "messages[1].input", "not supported"),
    ],
)
def test_conversations_in_no_order_are_refused(served, messages, param, words):
    for path in (CHAT, "/v1/chat/prompt"):
        status, reply, _ = served.send(path, {"messages": messages})
        assert (status, reply["error"]["param"]) == (400, param)
        assert words in reply["error"]["message"]
        assert "\n" not in reply["error"]["message"]


def test_a_blank_system_message_says_nothing(served):
    blank = [{"role": "system", "content": ""}, *USER]
    _, with_it, _ = served.send("/v1/chat/prompt", {"messages": blank})
    _, without, _ = served.send("/v1/chat/prompt", {"messages": USER})
    assert with_it["prompt"] == without["prompt"]


# --- Limits ---


def test_a_full_queue(model, slow):
    limits = Limits(batch_size=1, queue=1)
    with (
        serving({"mine": model}, limits=limits) as running,
        connect(running) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        others = [pool.submit(ask, client, "Hi", max_tokens=100) for _ in range(2)]
        wait_for(lambda: (running.engine.running, running.engine.waiting) == (1, 1))
        status, reply, headers = running.send(CHAT, {"messages": USER})
        assert (status, reply["error"]["code"]) == (429, "queue_full")
        assert reply["error"]["type"] == "rate_limit_error"
        assert int(headers["Retry-After"]) >= 1
        with pytest.raises(openai.RateLimitError):
            ask(client, "Hi", stream=True)
        # The client's own way: it waits as it was told, and asks again.
        with openai.OpenAI(base_url=running.url + "/v1", api_key="-", max_retries=9) as patient:
            assert ask(patient, "Hi", max_tokens=2).choices
        assert all(other.result().choices for other in others)


def test_limits_of_ones_own(model):
    limits = Limits(body_bytes=500, max_tokens=9, prompt_tokens=50)
    with serving(
        {"mine": model}, limits=limits, generation=GenerationConfig(max_new_tokens=7)
    ) as running:
        assert running.send(CHAT, {"messages": USER})[1]["usage"]["completion_tokens"] == 7
        assert running.send(CHAT, {"messages": USER, "max_tokens": 10})[0] == 400
        long = running.send(COMPLETIONS, {"prompt": "word " * 60})
        assert (long[0], long[1]["error"]["code"]) == (400, "context_length_exceeded")
        assert running.send(COMPLETIONS, {"prompt": "x" * 500})[0] == 413
        # Without a length said in advance, what comes is counted.
        link = http.client.HTTPConnection(urlsplit(running.url).netloc, timeout=20)
        pieces = iter([b'{"prompt": "'] + [b"x" * 100] * 10)
        headers = {"Content-Type": "application/json"}
        link.request("POST", COMPLETIONS, pieces, headers, encode_chunked=True)
        assert link.getresponse().status == 413
        link.close()


def test_a_refused_body_is_read_to_its_end(model):
    # Far more than a socket holds: were the connection closed on it, the client would see a broken
    # pipe and never the reason.
    body = {"prompt": "x" * 8_000_000}
    with serving({"mine": model}, token="secret") as running:
        for path, headers, status in (
            (COMPLETIONS, {"Authorization": "Bearer secret"}, 413),
            (COMPLETIONS, {}, 401),
            (COMPLETIONS, {"Authorization": "Bearer secret", "Content_Type": "text/plain"}, 415),
            ("/nothing", {}, 404),
        ):
            for _ in range(5):
                assert running.send(path, body, **headers)[0] == status


def test_a_client_that_asks_before_it_sends_is_told_no(served):
    with socket.create_connection(urlsplit(served.url).netloc.split(":")) as link:
        link.sendall(
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            "Content-Type: application/json\r\nContent-Length: 2000000\r\n\r\n".encode()
        )
        assert link.makefile("rb").readline().split()[1] == b"413"


def test_the_context_ends_an_answer(client):
    reply = ask(client, "Hi", max_tokens=1024)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == SMALL.context_length


def test_time_is_limited(model, slow):
    with serving({"mine": model}, limits=Limits(batch_size=1, seconds=0.5)) as running:
        with ThreadPoolExecutor(2) as pool:
            body = {"messages": USER, "max_tokens": 200}
            first, second = pool.map(lambda _: running.send(CHAT, body), range(2))
        replies = sorted((first, second), key=lambda reply: reply[0])
        assert [status for status, _, _ in replies] == [200, 503]
        assert replies[0][1]["choices"][0]["finish_reason"] == "length"
        assert 0 < replies[0][1]["usage"]["completion_tokens"] < 100
        assert replies[1][1]["error"]["code"] == "timeout"


def test_a_body_that_never_comes(served, monkeypatch):
    monkeypatch.setattr("lightning_sft.serving.app.BODY_SECONDS", 0.2)
    with socket.create_connection(urlsplit(served.url).netloc.split(":")) as link:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        link.sendall((head + "Content-Length: 100\r\n\r\n{").encode())
        assert b" 408 " in link.recv(1000)


def test_a_client_that_does_not_read_is_given_up(monkeypatch):
    """The stream alone, with a connection that never takes a byte."""
    monkeypatch.setattr("lightning_sft.serving.answers.STALLED_SECONDS", 0.05)
    closed: list[bool] = []
    limits = SimpleNamespace(seconds=0.05)
    answering: Any = SimpleNamespace(
        context=SimpleNamespace(limits=limits),
        watch=lambda receive: None,
        close=lambda: closed.append(True),
    )

    async def endless(self: Any) -> AsyncIterator[bytes]:
        while True:
            yield b"data"

    async def never(*arguments: Any) -> Any:
        await asyncio.sleep(3600)

    monkeypatch.setattr(Stream, "_chunks", endless)
    asyncio.run(asyncio.wait_for(Stream(answering)({"type": "http"}, never, never), 20))
    assert closed == [True]


# --- Leaving and ending ---


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(served, slow, stream):
    before = served.engine.steps
    body = json.dumps({"messages": USER, "max_tokens": 200, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(urlsplit(served.url).netloc.split(":")) as link:
        link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: served.engine.steps - before >= 5)
        assert served.engine.running == 1
    served.wait_idle()
    assert served.engine.steps - before < 100  # of 200


def test_a_client_that_leaves_the_queue(model, slow):
    with (
        serving({"mine": model}, limits=Limits(batch_size=1)) as running,
        ThreadPoolExecutor() as pool,
    ):
        body = {"messages": USER, "max_tokens": 100}
        first = pool.submit(running.send, CHAT, body)
        wait_for(lambda: running.engine.running == 1)
        raw = json.dumps(body | {"stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(urlsplit(running.url).netloc.split(":")) as link:
            link.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            wait_for(lambda: running.engine.waiting == 1)
        wait_for(lambda: running.engine.waiting == 0)
        assert running.engine.running == 1  # the other one still is
        assert first.result()[0] == 200


def test_a_failing_model_is_an_error_and_the_server_lives_on(served, monkeypatch, capsys):
    feed = RunningBatch.feed
    monkeypatch.setattr(RunningBatch, "feed", lambda *_: 1 / 0)
    status, reply, _ = served.send(CHAT, {"messages": USER, "max_tokens": 5})
    assert (status, reply["error"]["type"]) == (500, "server_error")
    with connect(served) as client, pytest.raises(openai.APIError, match="failed on this request"):
        list(ask(client, "Hi", stream=True))
    monkeypatch.setattr(RunningBatch, "feed", feed)
    assert served.send(CHAT, {"messages": USER, "max_tokens": 5})[0] == 200
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_health(served):
    status, reply, _ = served.send("/health")
    assert (status, reply) == (200, {"status": "ok", "running": 0, "waiting": 0})


@pytest.fixture(scope="module")
def weights(tmp_path_factory, model) -> list[str]:
    """The model as a file, and the options that say what it is."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(model.state_dict(), path)
    shape = {"context_length": 256, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
    return ["--ckpt_path", str(path), "--architecture", json.dumps(shape)]


def test_sigterm_lets_a_running_answer_finish(weights, model, tmp_path):
    process = spawn("serve", *weights, "--port", "0", "--device=cpu", cwd=tmp_path)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "serving tiny on http://127.0.0.1:" in line
        url = line.split(" on ")[1].split()[0]
        with openai.OpenAI(base_url=url + "/v1", api_key="-", max_retries=0) as client:
            stream = ask(client, "Hi", model="tiny", max_tokens=200, stream=True)
            first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
            process.send_signal(signal.SIGTERM)
            rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        text = first.choices[0].delta.content + text_of(rest)
        assert text == expect(model, "Hi", max_new_tokens=200)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 143, error
        assert "Traceback" not in error
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_once_finishes_and_twice_does_not(weights, model, slow, capsys):
    """The whole command in this thread, a client in another."""
    # Python leaves SIGINT ignored where it was at its start, as in a shell's background job.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ends: list[str] = []

    def use(times: int) -> None:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="-", max_retries=50) as client:
            client.models.list()
        with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
            stream = ask(client, "Hi", model="tiny", max_tokens=100, stream=True)
            next(stream)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
            try:
                ends.append(str(list(stream)[-1].choices[0].finish_reason))
            except openai.APIError as error:
                ends.append(error.message)

    for times in (1, 2):
        user = threading.Thread(target=use, args=(times,))
        user.start()
        assert run("serve", *weights, "--port", port, "--device=cpu") == 130
        user.join(timeout=60)
    signal.signal(signal.SIGINT, before)
    assert ends == ["length", "The server is stopping."]
    assert "1 answers are being finished" in capsys.readouterr().err


def test_the_exit_code_where_ctrl_c_is_ignored(weights):
    """As in a shell's background job, sent the signal by name."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def interrupt() -> None:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=50
        ) as client:
            client.models.list()
        os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=interrupt)
    user.start()
    try:
        assert run("serve", *weights, "--port", port, "--device=cpu") == 130
    finally:
        signal.signal(signal.SIGINT, before)
        user.join(timeout=60)


def test_stopping_sends_newcomers_away(model, slow):
    with (
        serving({"mine": model}, limits=Limits(batch_size=1)) as running,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(running.send, CHAT, {"messages": USER, "max_tokens": 60})
        wait_for(lambda: running.engine.running == 1)
        second = pool.submit(running.send, CHAT, {"messages": USER})
        wait_for(lambda: running.engine.waiting == 1)
        running.engine.drain(60)
        assert second.result()[0] == 503
        status, reply, _ = running.send(CHAT, {"messages": USER})
        assert (status, reply["error"]["code"]) == (503, "stopping")
        assert running.send("/health")[0] == 503
        assert first.result()[0] == 200


# --- The command ---


def test_help_needs_no_torch(capsys):
    with pytest.raises(SystemExit):
        run("serve", "--help")
    shown = capsys.readouterr().out
    for option in ("--ckpt_path", "--compare_ckpt_path", "--limits.queue", "--generation.top_p"):
        assert option in shown
    code = "import lightning_sft.serving.serve, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "ckpt_path"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt"),
        (["--ckpt_path", "x", "--host", "0.0.0.0"], TOKEN_VARIABLE),
        (["--ckpt_path", "x", "--port", "70000"], "70000 is outside"),
        (["--ckpt_path", "x", "--host", "127.0.0.1.1"], TOKEN_VARIABLE),
        (["--ckpt_path", "x", "--limits.queue=-1"], "limits.queue"),
        (["--ckpt_path", "x", "--generation.temperature=3"], "generation.temperature"),
        (["--ckpt_path", "x", "--generation.batch_size=3"], "limits.batch_size"),
        (["--ckpt_path", "x", "--name", "two words"], "without spaces"),
        (["--ckpt_path", "."], "does not say its architecture"),
        (["--ckpt_path", "x.pth", "--compare_ckpt_path", "y/x.pth"], "compare_name"),
    ],
)
def test_what_the_command_refuses(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert run("serve", "--port=0", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_run_folders_and_bases_that_moved(monkeypatch, tmp_path):
    """What each of two models is read from."""
    read: list[tuple[Any, ...]] = []
    shown: dict[str, Any] = {}

    def load(path: str, architecture: Any, style: Any, header: Any, base: Any) -> Any:
        read.append((path, base))
        return make_talker(), get_style("alpaca")

    def build(models: dict[str, Any], *_: Any) -> Any:
        shown.update(models)
        return SimpleNamespace(run=lambda sockets: None, ended_by=0)

    monkeypatch.setattr("lightning_sft.decoding.answering.load_for_answers", load)
    monkeypatch.setattr("lightning_sft.serving.server.build_server", build)
    run_folder = tmp_path / "runs" / "mine" / "version_2"
    newest = run_folder / "checkpoints" / "step-000010.ckpt"
    newest.parent.mkdir(parents=True)
    for step in ("000002", "000010"):
        (newest.parent / f"step-{step}.ckpt").touch()
    options = ["--compare_ckpt_path", "gpt2-small", "--compare_name", "base", "--port=0"]
    options += ["--weights", "moved.pth", "--compare_weights", "other.pth"]
    assert run("serve", "--ckpt_path", run_folder, *options, "--device=cpu") == 0
    assert read == [(str(newest), "moved.pth"), ("gpt2-small", "other.pth")]
    assert list(shown) == ["mine", "base"]
    assert shown["mine"].tokenizer is TOKENIZER


def test_a_taken_port_is_known_before_a_model_is_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)
        assert run("serve", "--ckpt_path", "missing.ckpt", "--port", port) == 3


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/version_0/checkpoints/step-9.ckpt"], ["a"]),
        (["runs/a/version_0/gpt2-7M-sft.pth", "runs/b/version_0/gpt2-7M-sft.pth"], ["a", "b"]),
        (
            ["runs/a/version_0/x.pth", "runs/a/version_1/x.pth"],
            ["a-version_0", "a-version_1"],
        ),
        (
            [f"runs/a/version_0/checkpoints/step-{step}.ckpt" for step in (1, 2)],
            ["a-version_0-step-1", "a-version_0-step-2"],
        ),
        (["runs/a/version_0"], ["a"]),
        (["runs/a/version_0", "runs/b/version_3/"], ["a", "b"]),
        (["runs/a/version_0", "runs/a/version_1"], ["a-version_0", "a-version_1"]),
        (["gpt2-medium"], ["gpt2-medium"]),
        (["gpt2-medium", "mine.pth"], ["gpt2-medium", "mine"]),
    ],
)
def test_names(paths, names):
    assert choose_names(paths, [None, None]) == names
    assert choose_names(paths, ["first", None])[0] == "first"
    if len(paths) == 2:  # two that differ by a given name need no more to be told apart
        assert choose_names(paths, [None, "second"]) == [names[0].split("-version")[0], "second"]
