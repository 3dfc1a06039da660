"""`compare`: planted differences are found, equal runs differ by exactly nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lightning_sft.common.errors import IncompleteError, InputError
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.pairwise import combine, parse_choice
from lightning_sft.judging.score import score_responses
from lightning_sft.reporting.blind_vote import FORMAT, fingerprint, first_run_is_left, read_votes
from lightning_sft.reporting.compare import compare_answers, load_runs
from lightning_sft.reporting.compare_page import chance
from lightning_sft.runs.responses import RESPONSES_NAME, read_responses
from support.judge_server import JudgeServer, Status

WORDS = list("abcdefghijklmnopqrst")


def write_run(folder: Path, spoil: float, count: int = 40, seed: int = 0) -> Path:
    """A run whose answers lose each word with probability `spoil`."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    entries = []
    for i in range(count):
        wanted = " ".join(f"{word}{word}" for word in random.Random(i).sample(WORDS, 8))
        given = " ".join(word for word in wanted.split() if rng.random() >= spoil)
        entries.append(
            {"instruction": f"Task {i}", "input": "", "output": wanted, "model_response": given}
        )
    (folder / RESPONSES_NAME).write_text(json.dumps(entries))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    good = write_run(tmp_path / "good" / "version_0", spoil=0.1, seed=1)
    bad = write_run(tmp_path / "bad" / "version_0", spoil=0.4, seed=2)
    return [good, bad]


def shared_words(prompt: str) -> str:
    """A fair judge of the chapter's prompt: the share of the wanted words that were given."""
    wanted = prompt.split("correct output `")[1].split("`, score")[0].split()
    given = prompt.split("score the model response `")[1].split("` on a scale")[0].split()
    return str(round(100 * len(set(wanted) & set(given)) / len(wanted)))


def longer_is_better(prompt: str) -> str:
    a = prompt.split("<answer A>\n")[1].split("\n</answer A>")[0]
    b = prompt.split("<answer B>\n")[1].split("\n</answer B>")[0]
    choice = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
    return json.dumps({"better": choice})


def result_of(output: Path) -> dict:
    return json.loads((output / "comparison.json").read_text())


def measures(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["comparisons"][0]["measures"]}


def test_planted_difference_is_recovered(runs, tmp_path, capsys):
    with JudgeServer("ollama", shared_words, models=["llama3"]) as server:
        for run in runs:
            score_responses(run, JudgeConfig(url=server.url, concurrency=4))
    compare_answers(runs, tmp_path / "out")
    rows = measures(result_of(tmp_path / "out"))
    # Planted: 90 % of the words against 60 %.
    assert rows["score"]["low"] < -30 < rows["score"]["high"]
    assert rows["score"]["verdict"] == "worse"
    assert rows["score"]["p"] < 1e-4
    for name in ("token_f1", "rouge_l", "chrf"):
        assert rows[name]["verdict"] == "worse"
    out = capsys.readouterr().out
    assert "bad/version_0 against good/version_0" in out
    assert "p < 0.001  worse" in out
    assert "the judge is not informative" not in out
    drop = result_of(tmp_path / "out")["comparisons"][0]["regressions"][0]
    assert drop["before"] - drop["after"] >= 50
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Worst regressions" in page
    assert "<td>&lt; 0.001</td>" in page


def test_a_tiny_p_is_a_bound_and_not_nothing():
    shown = [chance(p) for p in (0.0, 0.00099, 0.001, 0.0123, 1.0)]
    assert shown == ["< 0.001", "< 0.001", "0.001", "0.012", "1.000"]


def test_no_difference_is_not_called_one(tmp_path):
    """The control: two runs spoilt equally, by other dice."""
    runs = [write_run(tmp_path / name / "v", 0.3, seed=s) for name, s in (("a", 1), ("b", 2))]
    compare_answers(runs, tmp_path / "out")
    for row in measures(result_of(tmp_path / "out")).values():
        assert row["verdict"] == "no difference shown"


def test_identical_runs_differ_by_exactly_nothing(tmp_path):
    a = write_run(tmp_path / "a" / "v", 0.3, seed=1)
    b = write_run(tmp_path / "b" / "v", 0.3, seed=1)
    with JudgeServer("ollama", shared_words, models=["llama3"]) as server:
        config = JudgeConfig(url=server.url, concurrency=4)
        for run in (a, b):
            score_responses(run, config)
        asked = len(server.prompts)
        compare_answers([a, b], tmp_path / "out", pairwise=True, judge=config)
        assert len(server.prompts) == asked  # equal answers tie without being asked
    result = result_of(tmp_path / "out")["comparisons"][0]
    assert len(result["measures"]) == 5
    for row in result["measures"]:
        found = [row[k] for k in ("difference", "low", "high", "higher", "lower", "p")]
        assert found == [0, 0, 0, 0, 0, 1]
        assert row["first"] == row["second"]
    for rates in result["preferences"].values():
        assert [rates[k] for k in ("win_rate", "low", "high", "length_controlled")] == [0.5] * 4
    assert result["regressions"] == []


def test_three_runs_are_each_held_against_the_first(runs, tmp_path):
    third = write_run(tmp_path / "third" / "version_0", 0.2, seed=3)
    compare_answers([*runs, third], tmp_path / "out")
    found = result_of(tmp_path / "out")["comparisons"]
    assert [(c["first"], c["second"]) for c in found] == [
        ("good/version_0", "bad/version_0"),
        ("good/version_0", "third/version_0"),
    ]


def test_runs_of_one_name_are_told_apart(runs):
    assert [run.name for run in load_runs([runs[0], runs[0]])] == [
        "good/version_0 (1)",
        "good/version_0 (2)",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.pop(), "has 39 answers, .* has 40"),
        (lambda e: e[3].update(instruction="Other"), "entry 3 is not entry 3"),
        (lambda e: e.insert(0, e.pop()), "entry 0 is not entry 0"),
        (lambda e: e[5].update(output="Other"), "entry 5 is not entry 5"),
    ],
)
def test_runs_on_other_entries_are_refused(runs, tmp_path, change, words):
    path = runs[1] / RESPONSES_NAME
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=words) as caught:
        compare_answers(runs, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_run_is_no_comparison(runs, tmp_path):
    with pytest.raises(InputError, match="two or more"):
        compare_answers(runs[:1], tmp_path / "out")


def test_scores_of_different_judges_are_not_compared(runs, tmp_path):
    with JudgeServer("ollama", shared_words, models=["llama3", "phi3"]) as server:
        score_responses(runs[0], JudgeConfig(url=server.url, model="llama3"), controls=0)
        score_responses(runs[1], JudgeConfig(url=server.url, model="phi3"), controls=0)
        compare_answers(runs, tmp_path / "out")
        found = result_of(tmp_path / "out")
        assert "score" not in measures(found)
        assert "no one judge" in found["notes"][0]
        # The control: as soon as one judge has scored both, they are.
        score_responses(runs[1], JudgeConfig(url=server.url, model="llama3"), controls=0)
        compare_answers(runs, tmp_path / "out")
        assert "score" in measures(result_of(tmp_path / "out"))


# --- pairwise ------------------------------------------------------------------------------------


def test_pairwise_counts_only_agreement():
    assert combine("A", "B") == (0.0, True)  # the first answer, in either order
    assert combine("B", "A") == (1.0, True)
    assert combine("tie", "tie") == (0.5, True)
    assert combine("A", "A") == (0.5, False)  # whichever comes first: no preference
    assert combine("A", "tie") == (0.5, False)
    assert combine("A", None) == (None, False)


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ('{"better": "A"}', "A"),
        ("B", "B"),
        ("b.", "B"),
        ('{"better": "TIE"}', "tie"),
        ("Answer A is better", None),
        ('{"better": "C"}', None),
        ("", None),
        ("[" * 99_999, None),
    ],
)
def test_choice_of_a_reply(reply, choice):
    verdict = parse_choice(reply)
    assert verdict.score == choice
    assert (verdict.reason is None) == (choice is not None)


def test_pairwise_over_the_wire_is_kept(runs, tmp_path):
    with JudgeServer("ollama", longer_is_better, models=["llama3"]) as server:
        config = JudgeConfig(url=server.url, concurrency=4)
        compare_answers(runs, tmp_path / "out", pairwise=True, judge=config)
        rates = result_of(tmp_path / "out")["comparisons"][0]["preferences"]["pairwise"]
        asked = len(server.prompts)
        compare_answers(runs, tmp_path / "out", pairwise=True, judge=config)
        assert len(server.prompts) == asked
    assert asked % 2 == 0
    assert rates["count"] == rates["wins"] + rates["ties"] + rates["losses"] == 40
    assert rates["inconsistent"] == 0
    assert rates["win_rate"] < 0.2  # the spoilt run's answers are shorter
    assert rates["length_controlled"] > rates["win_rate"]  # of which length is all there is


def test_pairwise_judge_with_position_bias_prefers_nobody(runs, tmp_path):
    with JudgeServer("ollama", ["A"], models=["llama3"]) as server:
        config = JudgeConfig(url=server.url)
        compare_answers(runs, tmp_path / "out", pairwise=True, judge=config)
    rates = result_of(tmp_path / "out")["comparisons"][0]["preferences"]["pairwise"]
    assert rates["win_rate"] == 0.5
    assert rates["inconsistent"] > 30


def test_pairs_without_a_judgement_are_counted_and_exit_4(runs, tmp_path):
    with JudgeServer("ollama", ["A", "B", Status(500)], models=["llama3"]) as server:
        config = JudgeConfig(url=server.url, retries=0)
        with pytest.raises(IncompleteError, match="pairs have no judgement"):
            compare_answers(runs, tmp_path / "out", pairwise=True, judge=config)
    rates = result_of(tmp_path / "out")["comparisons"][0]["preferences"]["pairwise"]
    assert rates["unjudged"] + rates["count"] == 40


# --- blind votes ---------------------------------------------------------------------------------


def cast(runs: list[Path], prefer: int, path: Path) -> Path:
    """Votes of someone who always prefers run number `prefer`, made from the page's own data."""
    answers = [read_responses(run) for run in runs]
    comparison = fingerprint(answers)
    votes = {}
    for index, (a, b) in enumerate(zip(*answers, strict=True)):
        if a.text != b.text:
            left = first_run_is_left(comparison, f"1-{index}") == (prefer == 0)
            votes[f"1-{index}"] = "left" if left else "right"
    path.write_text(json.dumps({"format": FORMAT, "comparison": comparison, "votes": votes}))
    return path


@pytest.mark.parametrize(("prefer", "rate"), [(0, 0.0), (1, 1.0)])
def test_votes_find_their_way_back(runs, tmp_path, prefer, rate):
    compare_answers(runs, tmp_path / "out", votes=cast(runs, prefer, tmp_path / "v.json"))
    rates = result_of(tmp_path / "out")["comparisons"][0]["preferences"]["votes"]
    assert rates["win_rate"] == rate


def test_two_people_count_once_per_entry(runs, tmp_path):
    votes = [cast(runs, n, tmp_path / f"{n}.json") for n in (0, 1)]
    compare_answers(runs, tmp_path / "out", votes=votes)
    rates = result_of(tmp_path / "out")["comparisons"][0]["preferences"]["votes"]
    assert rates["win_rate"] == 0.5
    assert rates["ties"] == rates["count"] <= 40


def test_vote_page_is_blind(runs, tmp_path):
    compare_answers(runs, tmp_path / "out")
    page = (tmp_path / "out" / "blind-vote.html").read_text()
    body = page.split("<body>")[1].replace("Equally good", "")
    assert "good" not in body
    assert "version_0" not in body
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    answers = [read_responses(run) for run in runs]
    sides = {
        item["left"] == answers[0][int(item["item"].split("-")[1])].text for item in data["items"]
    }
    assert sides == {True, False}  # the first run is on either side


@pytest.mark.parametrize(
    ("votes", "words"),
    [
        ("[]", "not a file that blind-vote.html exported"),
        ("{", "cannot be read"),
        (json.dumps({"format": FORMAT, "comparison": "x", "votes": {}}), "on other runs"),
    ],
)
def test_unusable_votes(runs, tmp_path, votes, words):
    path = tmp_path / "votes.json"
    path.write_text(votes)
    with pytest.raises(InputError, match=words):
        compare_answers(runs, tmp_path / "out", votes=path)
    assert not (tmp_path / "out").exists()


def test_unusable_single_vote(runs, tmp_path):
    answers = [read_responses(run) for run in runs]
    for item, choice in (("1-99", "left"), ("2-0", "left"), ("1-0", "up"), ("x", "left")):
        exported = {"format": FORMAT, "comparison": fingerprint(answers), "votes": {item: choice}}
        path = tmp_path / "votes.json"
        path.write_text(json.dumps(exported))
        with pytest.raises(InputError, match="is no vote"):
            read_votes(path, answers)
