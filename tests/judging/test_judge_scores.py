"""`score` from end to end: nothing lost, nothing paid twice, honest numbers."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_sft.common.errors import IncompleteError, InputError, ServiceError
from lightning_sft.data.entries import Entry
from lightning_sft.judging import asking
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.prompt import load_prompt
from lightning_sft.judging.score import score_responses
from lightning_sft.judging.significance import correlate, correlate_with_gap
from lightning_sft.judging.summary import describe, read_scores, summarize
from lightning_sft.runs.responses import read_responses
from support.judge_server import JudgeServer, Raw, Says, Status

KEY = "planted-KEY.0123456789abcdef"
PROTOCOLS = pytest.mark.parametrize("protocol", ["ollama", "openai"])


def make_entries(count: int) -> list[dict]:
    return [
        {
            "instruction": f"Say number {i}.",
            "input": "" if i % 2 else f"in {i}",
            "output": f"Number {i}.",
            "model_response": f"It is {i}.",
        }
        for i in range(count)
    ]


def write_responses(folder: Path, entries: list[dict]) -> Path:
    path = folder / "instruction-data-with-response.json"
    path.write_text(json.dumps(entries))
    return path


def parts(prompt: str) -> tuple[str, str]:
    """Wanted answer and rated answer within the chapter's prompt."""
    found = re.search(
        r"correct output `(.*)`, score the model response `(.*)` on a scale", prompt, re.DOTALL
    )
    assert found
    return found[1], found[2]


def fair_judge(prompt: str) -> str:
    wanted, response = parts(prompt)
    if response == wanted:
        return "100"
    return "60" if response.startswith("It is") else "5"


def config_for(server: JudgeServer, **settings) -> JudgeConfig:
    fast = {"timeout": 2.0, "backoff": 0.01, "retries": 1, "model": "llama3"}
    return JudgeConfig(server.protocol, server.url, **(fast | settings))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@PROTOCOLS
@pytest.mark.parametrize("stream", [True, False])
def test_score_prints_the_chapters_two_lines(tmp_path, capsys, protocol, stream):
    path = write_responses(tmp_path, make_entries(7))
    with JudgeServer(protocol, fair_judge, models=["llama3"]) as server:
        score_responses(path, config_for(server, stream=stream, concurrency=3))
    out = capsys.readouterr().out
    assert out.startswith("Number of scores: 7 of 7\nAverage score: 60.00\n")
    records = lines_of(tmp_path / "scores.jsonl")
    answers = [record for record in records if record["kind"] == "answer"]
    assert sorted(record["index"] for record in answers) == list(range(7))
    record = answers[0]
    assert record["reply"] == "60"
    assert record["judge"]["model"] == "llama3"
    assert record["options"]["seed"] == 123
    assert len(record["prompt_sha256"]) == 64
    assert record["seconds"] > 0


def test_score_takes_a_run_folder_and_the_books_answers(tmp_path, capsys):
    data = os.environ.get("LIGHTNING_SFT_BOOK_DATA")
    if not data:
        pytest.skip("LIGHTNING_SFT_BOOK_DATA does not name the book's data")
    text = Path(data).with_name("instruction-data-with-response.json").read_text()
    (tmp_path / "instruction-data-with-response.json").write_text(text)
    with JudgeServer("ollama", ["50"]) as server:
        score_responses(tmp_path, config_for(server, concurrency=4), controls=0)
        assert len(server.prompts) == 110
    assert "Number of scores: 110 of 110\nAverage score: 50.00\n" in capsys.readouterr().out


def test_second_run_asks_only_what_is_missing(tmp_path):
    path = write_responses(tmp_path, make_entries(6))
    replies = ["50", "N/A", Status(500), Status(500), "50"]
    with JudgeServer("ollama", replies) as server:
        config = config_for(server)
        with pytest.raises(IncompleteError, match="2 of 6 answers have no score"):
            score_responses(path, config, controls=0)
        assert len(server.prompts) == 7  # one of six was sent twice
        failed = [r for r in lines_of(tmp_path / "scores.jsonl") if r["score"] is None]
        assert [(r["reply"], r["reason"][:8]) for r in failed] == [
            ("N/A", "no numbe"),
            (None, "HTTP 500"),
        ]
        server.script = ["70"]
        # The reply "N/A" was paid for and stays; the entry without a reply is asked again.
        with pytest.raises(IncompleteError, match="1 of 6"):
            score_responses(path, config, controls=0)
        assert len(server.prompts) == 8
        with pytest.raises(IncompleteError):
            score_responses(path, config, controls=0)
        assert len(server.prompts) == 8


def test_nothing_missing_needs_no_judge(tmp_path):
    path = write_responses(tmp_path, make_entries(3))
    with JudgeServer("ollama", ["50"]) as server:
        config = config_for(server)
        score_responses(path, config, controls=0)
    score_responses(path, config, controls=0)  # the server is gone


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"num_ctx": 4096}, {"model": "judge"}, {"prompt": "rubric"}]
)
def test_another_judge_is_asked_anew(tmp_path, change):
    path = write_responses(tmp_path, make_entries(3))
    with JudgeServer("ollama", ["4"]) as server:
        score_responses(path, config_for(server), controls=0)
        score_responses(path, config_for(server, **change), controls=0)
        assert len(server.prompts) == 6


def test_changed_answer_is_asked_anew_and_its_old_score_not_used(tmp_path, capsys):
    entries = make_entries(3)
    path = write_responses(tmp_path, entries)
    with JudgeServer("ollama", ["40"]) as server:
        score_responses(path, config_for(server), controls=0)
        entries[1]["model_response"] = "Better."
        write_responses(tmp_path, entries)
        summary = summarize(read_responses(path), read_scores(tmp_path / "scores.jsonl"))
        assert (summary["scored"], summary["failures"]) == (2, {"not asked yet": 1})
        server.script = ["100"]
        score_responses(path, config_for(server), controls=0)
        assert len(server.prompts) == 4
    assert "Average score: 60.00" in capsys.readouterr().out


def test_torn_last_line_of_a_kill(tmp_path):
    path = write_responses(tmp_path, make_entries(4))
    scores = tmp_path / "scores.jsonl"
    with JudgeServer("ollama", ["50"]) as server:
        score_responses(path, config_for(server), controls=0)
        text = scores.read_text()
        scores.write_text(text[: text.rindex('"score"')])
        score_responses(path, config_for(server), controls=0)
        assert len(server.prompts) == 5
    assert len(lines_of(scores)) == 4


def run_until(path: Path, server: JudgeServer, prompts: int, delay: float) -> bool:
    """Score in a process of its own; SIGKILL soon after so many prompts. True if it ended first."""
    program = (
        "import sys; from pathlib import Path;"
        "from lightning_sft.judging.score import score_responses;"
        "from lightning_sft.judging.judge import JudgeConfig;"
        "config = JudgeConfig('ollama', sys.argv[2], concurrency=2);"
        "score_responses(Path(sys.argv[1]), config, controls=0)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), server.url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(server.prompts) < prompts:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == 0


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_no_kept_score_is_asked_again(tmp_path, kills):
    count = 20 * (kills + 1)
    path = write_responses(tmp_path, make_entries(count))
    scores = tmp_path / "scores.jsonl"

    def slow_judge(prompt: str) -> str:
        time.sleep(0.01)
        return "50"

    rng = random.Random(7)
    with JudgeServer("ollama", slow_judge) as server:
        for kill in range(kills + 1):
            kept = {record["prompt_sha256"] for record in read_scores(scores)}
            before = len(server.prompts)
            target = before + 15 if kill < kills else 10**9
            ended = run_until(path, server, target, delay=rng.uniform(0, 0.03))
            asked = {asking._sha256(prompt) for prompt in server.prompts[before:]}
            assert asked
            assert not asked & kept
        assert ended
        # What was on its way when a kill came is lost: two at most, each time.
        assert count <= len(server.prompts) <= count + 2 * kills
    records = lines_of(scores)
    assert sorted(record["index"] for record in records) == list(range(count))


def test_negative_control_without_the_file_all_is_asked_again(tmp_path, monkeypatch):
    path = write_responses(tmp_path, make_entries(5))
    with JudgeServer("ollama", ["50"]) as server:
        score_responses(path, config_for(server), controls=0)
        monkeypatch.setattr(asking, "read_answered", lambda path: {})
        score_responses(path, config_for(server), controls=0)
        assert len(server.prompts) == 10


def test_refused_from_the_start_writes_nothing(tmp_path):
    path = write_responses(tmp_path, make_entries(3))
    server = JudgeServer("ollama")
    with server:
        pass  # its port is now closed
    start = time.monotonic()
    with pytest.raises(ServiceError, match="no judge at"):
        score_responses(path, config_for(server))
    assert time.monotonic() - start < 10
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_stop_in_the_middle_keeps_what_came_before(tmp_path):
    path = write_responses(tmp_path, make_entries(6))
    with JudgeServer("ollama", ["50", "50", Status(401)]) as server:
        with pytest.raises(ServiceError, match=r"HTTP 401.*the same command goes on") as caught:
            score_responses(path, config_for(server), controls=0)
        assert "\n" not in str(caught.value)
        assert len(lines_of(tmp_path / "scores.jsonl")) == 2
        server.script = ["60"]
        score_responses(path, config_for(server), controls=0)
        assert len(server.prompts) == 7


def test_two_runs_at_once_are_refused(tmp_path):
    path = write_responses(tmp_path, make_entries(3))
    with JudgeServer("ollama") as server, asking._only_writer(tmp_path / "scores.jsonl"):
        with pytest.raises(ServiceError, match="another run is writing"):
            score_responses(path, config_for(server))
        assert server.prompts == []


def test_empty_answer_scores_lowest_without_being_asked(tmp_path, capsys):
    entries = make_entries(4)
    entries[1]["model_response"] = " \n"
    path = write_responses(tmp_path, entries)
    with JudgeServer("ollama", ["80"]) as server:
        score_responses(path, config_for(server), controls=0)
        score_responses(path, config_for(server), controls=0)
        assert len(server.prompts) == 3
    out = capsys.readouterr().out
    assert "Number of scores: 4 of 4\nAverage score: 60.00" in out
    assert "Empty answers, scored 0 by rule: 1" in out
    assert len(lines_of(tmp_path / "scores.jsonl")) == 4


def test_failures_stay_in_the_count(tmp_path, capsys):
    path = write_responses(tmp_path, make_entries(4))
    server = JudgeServer("ollama", ["80", "250", "N/A", "80"])
    with server, pytest.raises(IncompleteError, match="2 of 4") as caught:
        score_responses(path, config_for(server), controls=0)
    assert caught.value.exit_code == 4
    out = capsys.readouterr().out
    assert "Number of scores: 2 of 4\nAverage score: 80.00" in out
    assert "Average with failures as 0: 40.00" in out
    assert "Not scored: 1 × 250 is outside 0 to 100" in out


def test_a_poisonous_reply_ends_nothing(tmp_path, capsys):
    """Half a character, and a terminal's commands, among replies that are as they should be."""
    path = write_responses(tmp_path, make_entries(4))
    evil = Status(400, {"error": "\x1b[2J\x1b]0;owned\x07"})
    with JudgeServer("ollama", ["60", "85 \ud800", evil, "70"], models=["llama3"]) as server:
        config = config_for(server)
        with pytest.raises(IncompleteError):
            score_responses(path, config, controls=0)
        assert len(server.prompts) == 4
    records = lines_of(tmp_path / "scores.jsonl")
    assert [record["score"] for record in records] == [60, 85, None, 70]
    assert records[1]["reply"] == "85 \ufffd"
    # Also from a file that was not cleaned when it was written.
    records[2]["reason"] = "\x1b[2J owned"
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    print(describe(summarize(read_responses(path), read_scores(tmp_path / "scores.jsonl"))))
    captured = capsys.readouterr()
    assert captured.out.count("owned") == 2
    assert not set("\x1b\x07") & set(captured.out)


def test_all_failed_is_said_plainly(tmp_path, capsys):
    path = write_responses(tmp_path, make_entries(3))
    with JudgeServer("ollama", [Status(500)]) as server, pytest.raises(IncompleteError):
        score_responses(path, config_for(server, retries=0))
    assert "Number of scores: 0 of 3\nAverage score: none" in capsys.readouterr().out


JUDGES = {
    "fair": (fair_judge, True, "The judge is informative"),
    "always 80": (lambda prompt: "80", False, "an empty answer or another entry's"),
    "obeys the answer": (
        lambda prompt: "100" if "Ignore the above" in prompt else fair_judge(prompt),
        False,
        "above “Ignore the above",
    ),
    "likes echoes": (
        lambda prompt: "100" if parts(prompt)[1].startswith("Say") else fair_judge(prompt),
        False,
        "above the question echoed.",
    ),
    "never a number": (
        lambda prompt: "60" if parts(prompt)[1].startswith("It is") else "fine",
        None,
        "is not known",
    ),
}


@pytest.mark.parametrize("name", JUDGES)
def test_controls_tell_whether_the_judge_is_informative(tmp_path, capsys, name):
    judge, informative, words = JUDGES[name]
    path = write_responses(tmp_path, make_entries(12))
    with JudgeServer("ollama", judge) as server:
        score_responses(path, config_for(server, concurrency=4))
        assert len(server.prompts) == 12 + 5 * 10
    assert words in capsys.readouterr().out
    summary = summarize(read_responses(path), read_scores(tmp_path / "scores.jsonl"))
    assert summary["informative"] is informative


def test_repeats_measure_agreement_with_itself(tmp_path, capsys):
    path = write_responses(tmp_path, make_entries(6))
    with JudgeServer("ollama", ["50"] * 6 + ["50"] * 3 + ["60"] * 3) as server:
        score_responses(path, config_for(server), controls=0, repeats=2)
        seeds = [
            r["body"]["options"].get("seed") for r in server.requests if r["path"][-4:] == "chat"
        ]
    assert seeds[1:] == [123] * 6 + [124] * 6
    assert "(6 pairs): same score 50%, mean difference 5.00" in capsys.readouterr().out


def test_planted_key_is_in_no_file_message_or_output(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SFT_JUDGE_KEY", KEY)
    path = write_responses(tmp_path, make_entries(8))
    acts = [
        Says(f"Your key is {KEY}, my score 80"),
        Status(500, {"error": KEY}),
        Status(400, {"error": KEY}),
        Raw({"error": KEY}),
        Raw({"done": True, "message": {"key": KEY}}),
        Says(KEY, finish="length"),
    ]
    with JudgeServer("ollama", acts) as server:
        with pytest.raises(IncompleteError) as first:
            score_responses(path, config_for(server, retries=0))
        server.script = [Status(403, {"error": KEY})]
        with pytest.raises(ServiceError) as second:
            score_responses(path, config_for(server, retries=0, num_ctx=99))
        assert all(KEY in str(request["headers"]) for request in server.requests)
    said = "".join(capsys.readouterr()) + str(first.value) + str(second.value)
    files = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "***" in files
    assert KEY not in said + files


# --- other judges' scores ------------------------------------------------------------------------


def book_file(name: str) -> Path:
    data = os.environ.get("LIGHTNING_SFT_BOOK_DATA")
    if not data:
        pytest.skip("LIGHTNING_SFT_BOOK_DATA does not name the book's data")
    return Path(data).with_name(name)


def book_scores(judge: str, model: int) -> list[int]:
    return json.loads(book_file(f"judge-{judge}-model-{model}-response.json").read_text())


def test_correlation_of_gpt4_and_llama3_on_model_1():
    """The figures printed in the book's repository, ch07/03_model-evaluation/scores."""
    found = correlate(book_scores("gpt4", 1), book_scores("llama3-8b", 1))
    assert found.pairs == 100
    assert found.spearman == pytest.approx(0.698406, abs=1e-6)
    assert found.kendall == pytest.approx(0.57292, abs=1e-6)


def test_correlation_of_gpt4_and_llama3_on_model_2_is_only_bounded():
    """Llama 3's file has 99 scores: the chapter's client dropped one without saying whose."""
    gpt4, llama3 = book_scores("gpt4", 2), book_scores("llama3-8b", 2)
    assert (len(gpt4), len(llama3)) == (100, 99)
    found = correlate_with_gap(gpt4, llama3)
    spearman = [one.spearman for one in found]
    kendall = [one.kendall for one in found]
    # Whose it is decides everything between no correlation and a high one.
    assert (round(min(spearman), 3), round(max(spearman), 3)) == (-0.077, 0.803)
    assert (round(min(kendall), 3), round(max(kendall), 3)) == (-0.061, 0.652)
    # The best fit is a gap among the last three entries, all of which GPT-4 gave 0.
    best = [k for k, value in enumerate(spearman) if value == pytest.approx(max(spearman))]
    assert best == [97, 98, 99]
    assert gpt4[97:] == [0, 0, 0]


@pytest.mark.parametrize("model", [1, 2])
def test_references_are_correlated_from_the_files(tmp_path, capsys, model):
    """A judge that answers as GPT-4 did gets the figures above from `score --references`."""
    rows = json.loads(book_file("judge-eval-example-data.json").read_text())
    gpt4 = book_scores("gpt4", model)
    key = f"model {model} response"
    chapter = load_prompt("chapter")
    answers = {
        chapter.fill(Entry(row["instruction"], row["input"], row["output"]), row[key]): str(given)
        for row, given in zip(rows, gpt4, strict=True)
    }

    def as_gpt4(prompt: str) -> str:
        return answers[prompt]

    with JudgeServer("ollama", as_gpt4) as server:
        score_responses(
            book_file("judge-eval-example-data.json"),
            config_for(server, concurrency=4),
            output=tmp_path / "scores.jsonl",
            response_key=key,
            controls=0,
            references=[book_file(f"judge-llama3-8b-model-{model}-response.json")],
        )
    out = capsys.readouterr().out
    if model == 1:
        assert "Spearman 0.698, Kendall 0.573 over 100 answers" in out
    else:
        assert "lacks one score without saying whose: Spearman -0.077 to 0.803" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "2 scores for 5 answers cannot be aligned"),
        ('[1, 2, 3, 4, "5"]', 'item 4 is "5"'),
        ("{}", "top level"),
        (None, "no such file"),
    ],
)
def test_unusable_references(tmp_path, content, words):
    path = write_responses(tmp_path, make_entries(5))
    other = tmp_path / "other.json"
    if content:
        other.write_text(content)
    with JudgeServer("ollama") as server:
        with pytest.raises(InputError, match=words):
            score_responses(path, config_for(server), references=[other])
        assert server.requests == []


# --- responses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e[2].pop("model_response"), "entry 2: 'model_response' is missing"),
        (lambda e: e[2].update(model_response=None), "entry 2: 'model_response' is None"),
        (lambda e: e[2].update(model_response="\ud800"), "entry 2: .* lone surrogate"),
        (lambda e: e[2].update(output=" "), "entry 2: 'output' is blank"),
        (lambda e: e[2].pop("instruction"), "entry 2: 'instruction' is missing"),
        (lambda e: e.append(e[1]), "entry 4: repeats entry 1"),
        (lambda e: e.clear(), "the list is empty"),
    ],
)
def test_unusable_responses(tmp_path, change, words):
    entries = make_entries(4)
    change(entries)
    path = write_responses(tmp_path, entries)
    with pytest.raises(InputError, match=words) as caught:
        score_responses(path, JudgeConfig())
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_missing_responses(tmp_path):
    with pytest.raises(InputError, match="no such file; `lightning_sft predict` writes"):
        read_responses(tmp_path)


def test_damaged_scores_file_is_named(tmp_path):
    path = write_responses(tmp_path, make_entries(3))
    (tmp_path / "scores.jsonl").write_text('{"key": "x", "score": 1}\n')
    with (
        JudgeServer("ollama", ["50"]) as server,
        pytest.raises(InputError, match="record 0 has no"),
    ):
        score_responses(path, config_for(server))
