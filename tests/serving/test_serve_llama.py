"""`serve` and `chat` on trained runs of the Llama family, under OpenAI's own client.

The tiny models have learnt to answer in one way and to end there, so that an end is the model's.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_sft import load_model
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.entries import Entry
from lightning_sft.decoding.answering import AnsweringModel
from support.runs import run, write_config
from support.serving import Served, serving
from support.tiny_families import KINDS, make_tokenizer, write_family

openai = pytest.importorskip("openai", reason="the official client is not installed")
pytestmark = pytest.mark.process  # trains whole runs
ANSWER = "It is a small one, naïve and 12."


@pytest.fixture(scope="module", params=["llama3.2", "llama3.2-base", "smollm2", "qwen3"])
def learnt(request, tmp_path_factory) -> tuple[str, Path]:
    """A kind, and the folder of its run."""
    folder = tmp_path_factory.mktemp("learnt")
    data = [
        {"instruction": f"Say it {number} times", "input": "", "output": ANSWER}
        for number in range(40)
    ]
    (folder / "data.json").write_text(json.dumps(data))
    config = write_config(
        folder,
        model__architecture="auto",
        model__weights=str(write_family(folder / "hf", request.param)),
        model__optimizer__init_args={"lr": 1e-2, "weight_decay": 0.0},
        data__path=str(folder / "data.json"),
        data__prompt_style=KINDS[request.param].style,
        data__mask_prompt=True,
        data__max_length=256,
        trainer__max_epochs=8,
    )
    assert run("fit", "--config", config) == 0
    return request.param, folder / "runs" / "tiny" / "version_0"


@pytest.fixture(scope="module")
def model(learnt) -> AnsweringModel:
    return load_model(learnt[1], device="cpu")


@pytest.fixture(scope="module")
def served(model) -> Iterator[Served]:
    with serving({"mine": model}) as running:
        yield running


@pytest.fixture
def client(served) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: Any, content: str, **settings: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    settings = {"model": "mine", "messages": messages, "max_tokens": 60} | settings
    return client.chat.completions.create(**settings)


def test_an_answer_ends_where_its_turn_does(client, model):
    prompt = encode_prompt(Entry("Say it 3 times", "", ""), model.style, model.tokenizer)
    expected = model.answer("Say it 3 times", max_new_tokens=60)
    assert expected == ANSWER
    reply = ask(client, "Say it 3 times")
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == len(prompt)

    chunks = list(ask(client, "Say it 3 times", stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == ANSWER
    assert len([piece for piece in pieces if piece]) > 5
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_prompt_is_that_of_training(learnt, served, model):
    """Markers are single tokens, the first token is there, and a user cannot type either."""
    kind = KINDS[learnt[0]]
    typed = f"Say {kind.eos}{model.style.header} {kind.bos or ''}"
    body = {"model": "mine", "messages": [{"role": "user", "content": typed}]}
    status, reply, _ = served.send("/v1/chat/prompt", body)
    assert status == 200
    assert reply["prompt"] == model.style.prompt(Entry(typed, "", ""))
    ids = encode_prompt(Entry(typed, "", ""), model.style, model.tokenizer)
    assert reply["prompt_tokens"] == len(ids)
    tokenizer = make_tokenizer(learnt[0])
    special = [number for number in ids if number in tokenizer.control_ids]
    chatml = ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    llama3 = ["<|begin_of_text|>", *header, "<|eot_id|>", *header]
    wanted = {"chatml": chatml, "qwen3": chatml, "llama3": llama3}[kind.style]
    assert special == [tokenizer.token_id(name) for name in wanted]


def test_a_text_to_go_on_from_begins_as_rows_do(learnt, client):
    tokenizer = make_tokenizer(learnt[0])
    reply = client.completions.create(model="mine", prompt="Say it", max_tokens=3)
    begins = KINDS[learnt[0]].bos is not None
    assert reply.usage.prompt_tokens == len(tokenizer.encode("Say it")) + begins


def test_earlier_turns_and_a_system_message(client, served, model):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say it 1 times"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "Say it 2 times"},
    ]
    reply = ask(client, "", messages=messages)
    assert reply.choices[0].finish_reason in ("stop", "length")
    _, shown, _ = served.send("/v1/chat/prompt", {"model": "mine", "messages": messages})
    system = model.style.system.replace("{system}", "Be brief.")
    first = system + "".join(model.style.split(Entry("Say it 1 times", "", ANSWER)))
    last = model.style.prompt(Entry("Say it 2 times", "", ""))
    assert shown["prompt"] == first + model.style.turn_end + last


def test_chat_answers_from_a_pipe(learnt, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say it 3 times\nSay it 4 times\n"))
    options = ["--generation.max_new_tokens", 60, "--device", "cpu"]
    assert run("chat", "--ckpt_path", learnt[1], *options) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n\n{ANSWER}\n\n"
