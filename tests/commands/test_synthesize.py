"""`synthesize` against a scripted model: what is asked, kept, made, and never asked twice."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from support.judge_server import Hang, JudgeServer, Status
from support.runs import run, spawn

RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red.", "source": 1},
    {"instruction": "Edit this.", "input": "He go.", "output": "He goes.", "source": 2},
    {"instruction": "Say hi.", "input": "", "output": "Hi.", "source": 3},
    {"instruction": "Say hi.", "input": "", "output": "Hi.", "source": 4},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    return path


def synthesize(server: JudgeServer, kind: str, *options: Any, code: int = 0) -> list[Any]:
    assert run("synthesize", kind, "--output", "new.json", *judge(server), *options) == code
    return json.loads(Path("new.json").read_text()) if Path("new.json").exists() else []


def judge(server: JudgeServer) -> list[str]:
    return [f"--judge.url={server.url}", "--judge.backoff=0", "--judge.retries=0"]


def test_passive_voice(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with JudgeServer("ollama", lambda prompt: f"passive of {prompt[-3:]}") as server:
        new = synthesize(server, "passive_voice", "--data", data)
    assert [record["output_2"][:7] for record in new] == ["passive"] * 4
    for old, record in zip(RECORDS, new, strict=True):
        assert {key: record[key] for key in old} == old
        assert record["synthesis"]["model"] == "llama3"
        assert record["synthesis"]["seed"] == 123
        assert record["synthesis"]["prompt"].endswith(f"passive voice: {old['output']}")
    assert len(server.prompts) == 3  # two entries with one text are one question
    assert "3 questions for llama3" in capsys.readouterr().out
    assert json.loads(data.read_text()) == RECORDS


def test_nothing_is_asked_twice(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with JudgeServer("ollama", ["one", Status(500), "three", "two"]) as server:
        new = synthesize(server, "passive_voice", "--data", data, code=4)
        assert [record["output_2"] for record in new] == ["one", "three", "three"]
        assert "1 of 4 records are missing" in capsys.readouterr().err
        new = synthesize(server, "passive_voice", "--data", data)
        assert [record["output_2"] for record in new] == ["one", "two", "three", "three"]
        assert "1 questions for llama3" in capsys.readouterr().out
        assert len(server.prompts) == 4
        assert synthesize(server, "passive_voice", "--data", data) == new
        assert len(server.prompts) == 4


def test_preferences_say_which_is_which(data: Path) -> None:
    def answer(prompt: str) -> str:
        return "rude" if "more impolite" in prompt else "kind"

    with JudgeServer("ollama", answer) as server:
        new = synthesize(server, "preferences", "--data", data)
        again = synthesize(server, "preferences", "--data", data, "--limit", "2")
    assert again == new[:2]  # whose turn it is does not depend on how many are asked
    tones = [record["synthesis"]["tone"] for record in new]
    assert set(tones) == {"polite", "impolite"}
    for old, record, tone in zip(RECORDS, new, tones, strict=True):
        kind = {"polite": "kind", "impolite": "rude"}[tone]
        rewritten = record["synthesis"]["rewritten"]
        assert record[rewritten] == kind
        assert rewritten == ("chosen" if tone == "polite" else "rejected")
        assert {record["chosen"], record["rejected"]} == {kind, old["output"]}


def test_a_pair_of_equal_answers_is_no_pair(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with JudgeServer("ollama", ["Red.", "other"]) as server:
        new = synthesize(server, "preferences", "--data", data, code=4)
    assert [record["source"] for record in new] == [2, 3, 4]
    assert "1 of 4 records are missing, unchanged or came twice" in capsys.readouterr().err


def test_reflection_on_instructions(data: Path) -> None:
    reply = "1. Bad.\n2. [New Instruction] Why? [End]\n3. [New Answer] So. [End]"
    with JudgeServer("ollama", [reply]) as server:
        new = synthesize(server, "reflect_instruction", "--data", data)
    assert new[1] == RECORDS[1]  # it has an input
    assert (new[0]["instruction"], new[0]["output"]) == ("Why?", "So.")
    assert [record["source"] for record in new] == [1, 2, 3, 4]


def test_a_reply_without_its_marks_is_no_record(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with JudgeServer("ollama", ["no marks"]) as server:
        assert synthesize(server, "reflect_response", "--data", data, code=4) == []
    assert "no reply could be used" in capsys.readouterr().err
    replies = Path("new.json.replies.jsonl").read_text()
    assert "the reply has no [Better Answer]" in replies


def test_instructions_from_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    opening = "<|start_header_id|>user<|end_header_id|>\n\n"
    said = iter(["What is red?", "What is blue?", "What is red?"])

    def answer(prompt: str) -> str:
        return next(said) if prompt == opening else f"Answer to {prompt}"

    with JudgeServer("ollama", answer) as server:
        new = synthesize(server, "instructions", "--count", "3", code=4)
        raw = [r["body"] for r in server.requests if r["path"] == "/api/generate"]
    assert [(body["raw"], body["prompt"]) for body in raw] == [(True, opening)] * 3
    assert [body["options"]["seed"] for body in raw] == [123, 124, 125]
    assert {body["options"]["temperature"] for body in raw} == {1.0}
    assert not any("messages" in body for body in raw)
    assert [(r["instruction"], r["input"], r["output"]) for r in new] == [
        ("What is red?", "", "Answer to What is red?"),
        ("What is blue?", "", "Answer to What is blue?"),
    ]
    assert new[1]["synthesis"]["temperature"] == 1.0
    assert new[1]["synthesis"]["opening"] == opening
    said = capsys.readouterr()
    assert "6 questions for llama3" in said.out
    assert "1 of 3 records are missing, unchanged or came twice" in said.err


def test_a_plan_asks_nothing(data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with JudgeServer("ollama") as server:
        options = ["--data", data, "--plan", "--price.prompt", "1000", "--price.reply=2000"]
        assert synthesize(server, "passive_voice", *options) == []
        assert server.requests == []
    out = capsys.readouterr().out
    assert "3 questions for llama3 at" in out
    assert "at most 1,536 to write: at most 3.1" in out  # 3 × 512, and what is read
    assert not list(here.iterdir())


def test_a_key_is_kept_nowhere(data: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SFT_JUDGE_KEY", "planted-0123456789abcdef")
    with JudgeServer("ollama", ["your key is planted-0123456789abcdef"]) as server:
        synthesize(server, "passive_voice", "--data", data)
    assert all("planted-" not in path.read_text() for path in here.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poems", "--output", "a.json"], "poems"),
        (["passive_voice", "--data", "DATA"], "name the new file with --output"),
        (["passive_voice", "--output", "a.json"], "starts from entries: give --data FILE"),
        (["passive_voice", "--data", "DATA", "--output", "DATA"], "is the data itself"),
        (["passive_voice", "--data", "DATA", "--output", "a.txt"], "must end in .json or .jsonl"),
        (["passive_voice", "--data", "DATA", "--output", "a.json", "--limit", "0"], "at least 1"),
        (["instructions", "--output", "a.json"], "made from nothing: give --count N"),
        (
            ["instructions", "--output=a.json", "--count=2", "--judge.protocol=openai"],
            "need the raw mode of Ollama",
        ),
        (["instructions", "--output=a.json", "--count=2", "--opening=lama3"], "allowed: llama3,"),
    ],
)
def test_nonsense(
    data: Path,
    here: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(data) if argument == "DATA" else argument for argument in arguments]
    assert run("synthesize", *given) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert message in line
    assert not list(here.iterdir())
    assert json.loads(data.read_text()) == RECORDS


def test_a_file_of_somebody_else_is_not_written_over(
    data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "new.json").write_text("[]")
    options = ["--data", data, "--output", "new.json"]
    assert run("synthesize", "passive_voice", *options) == 2
    assert "is already there" in capsys.readouterr().err
    assert (here / "new.json").read_text() == "[]"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_it_goes_on_where_it_was(data: Path, here: Path) -> None:
    asked = threading.Event()

    def answer(prompt: str) -> Any:
        if prompt.endswith("Hi.") and not asked.is_set():
            asked.set()
            return Hang(20)
        return f"passive of {prompt[-4:]}"

    with JudgeServer("ollama", answer) as server:
        arguments = ["synthesize", "passive_voice", "--data", data, "--output", "new.json"]
        process = spawn(*arguments, *judge(server), cwd=here)
        assert asked.wait(60)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert not Path("new.json").exists()
        kept = Path("new.json.replies.jsonl").read_text().splitlines()
        assert len(kept) == 2
        before = len(server.prompts)
        new = synthesize(server, "passive_voice", "--data", data)
        assert len(server.prompts) == before + 1
    assert [record["output_2"][:7] for record in new] == ["passive"] * 4
