"""`compare`: did it help? Two or more runs on the same entries, with intervals.

    python -m lightning_sft compare runs/base/version_0 runs/masked/version_0 runs/lora/version_0

The first run is the baseline; every other one is held against it, entry by entry. Differences come
with a paired bootstrap interval and a sign test, on the judge's scores and on the metrics that need
no judge. `--pairwise true` asks the judge which answer is better, `--votes` reads what people
thought. Writes `comparison.html`, `comparison.json` and `blind-vote.html`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_sft.common import files
from lightning_sft.common.errors import IncompleteError, InputError
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.metrics import METRICS, measure
from lightning_sft.judging.pairwise import Preference, judge_pairs
from lightning_sft.judging.significance import bootstrap_mean, length_controlled_win_rate, sign_test
from lightning_sft.judging.summary import (
    SCORES_NAME,
    answer_scores,
    judge_id,
    read_scores,
    summarize,
)
from lightning_sft.reporting.blind_vote import build_vote_page, read_votes
from lightning_sft.reporting.compare_page import describe_comparison, render_comparison
from lightning_sft.runs.responses import Response, as_list, read_responses, responses_path

WORST = 10  # regressions listed per run


class RunAnswers(NamedTuple):
    """One run's answers and what is known of each."""

    name: str
    responses: list[Response]
    records: list[dict[str, Any]]
    metrics: dict[str, list[float]]


def compare_answers(
    runs: list[Path],
    output: Path = Path("comparison"),
    pairwise: bool = False,
    judge: JudgeConfig = JudgeConfig(),  # noqa: B008 - frozen
    votes: Path | list[Path] | None = None,
    response_key: str = "model_response",
) -> None:
    """Compare the answers of two or more runs to the same entries.

    Args:
        runs: Run folders or responses files; the first is the baseline.
        output: Folder for comparison.html, comparison.json and blind-vote.html.
        pairwise: Ask the judge which of two answers is better, in both orders.
        judge: The judge for that.
        votes: Files that blind-vote.html exported.
        response_key: Field of the answers in the responses files.

    Raises:
        InputError: Fewer than two runs, unusable files, or runs on different entries.
        ServiceError: The judge is not there or stopped working.
        IncompleteError: Done, but some pairs could not be judged.
    """
    if len(runs) < 2:
        raise InputError(f"runs: {len(runs)} given; a comparison needs two or more")
    loaded = load_runs(runs, response_key)
    answers = [run.responses for run in loaded]
    cast = [vote for path in as_list(votes) for vote in read_votes(path, answers)]
    found: dict[str, Any] = {
        "runs": [run.name for run in loaded],
        "count": len(answers[0]),
        "judge": _common_judge(loaded) is not None,
        "notes": _notes(loaded),
        "comparisons": [],
    }
    replies = output / "pairwise.jsonl"
    for number, run in enumerate(loaded[1:], start=1):
        result = compare_two(loaded[0], run, _common_judge(loaded))
        if pairwise:
            judged = judge_pairs(answers[0], run.responses, judge, replies)
            result["preferences"]["pairwise"] = _pairwise_rates(loaded[0], run, judged)
        own = [(vote.entry, vote.value) for vote in cast if vote.run == number]
        if own:
            result["preferences"]["votes"] = _win_rates(loaded[0], run, _mean_per_entry(own))
        found["comparisons"].append(result)
    _write(output, found, answers)
    unjudged = sum(
        r["preferences"].get("pairwise", {}).get("unjudged", 0) for r in found["comparisons"]
    )
    if unjudged:
        raise IncompleteError(f"{unjudged} pairs have no judgement; {replies} says why")


def _write(output: Path, found: dict[str, Any], answers: list[list[Response]]) -> None:
    """The comparison as JSON, as a page and on the terminal, and the page to vote on."""
    output.mkdir(parents=True, exist_ok=True)
    files.write_json(output / "comparison.json", found)
    pages = {
        "comparison.html": render_comparison(found, answers[0]),
        "blind-vote.html": build_vote_page(answers),
    }
    for name, page in pages.items():
        with files.atomic_write(output / name) as file:
            file.write(page)
    print(describe_comparison(found))
    print(f"\nComparison: {output / 'comparison.html'}")


def load_runs(paths: Sequence[Path], response_key: str = "model_response") -> list[RunAnswers]:
    """Read the runs and make sure that they answer the same entries in the same order.

    Raises:
        InputError: They do not; names the first place where they part.
    """
    runs = []
    for path in paths:
        responses = read_responses(path, response_key)
        scores = read_scores(responses_path(path).parent / SCORES_NAME)
        measured = measure((r.text, r.entry.output) for r in responses)
        runs.append(RunAnswers(_name(path), responses, scores, measured))
    first = runs[0]
    for run, path in zip(runs[1:], paths[1:], strict=True):
        if len(run.responses) != len(first.responses):
            raise InputError(
                f"{path} has {len(run.responses)} answers, {paths[0]} has "
                f"{len(first.responses)}; a comparison needs the same entries"
            )
        for index, (a, b) in enumerate(zip(first.responses, run.responses, strict=True)):
            if a.entry != b.entry:
                raise InputError(
                    f"{path}: entry {index} is not entry {index} of {paths[0]}; a comparison "
                    "needs the same entries in the same order"
                )
    counts = Counter(run.name for run in runs)
    return [
        run._replace(name=f"{run.name} ({number})") if counts[run.name] > 1 else run
        for number, run in enumerate(runs, start=1)
    ]


def compare_two(first: RunAnswers, second: RunAnswers, judge: str | None) -> dict[str, Any]:
    """Differences second - first, preferences by score, and the worst regressions.

    Args:
        judge: Whose scores to use (`summary.judge_id`); None leaves scores out.
    """
    columns: dict[str, tuple[list, list]] = {}
    if judge:
        scored = [
            [row["score"] for row in answer_scores(run.responses, run.records, judge)]
            for run in (first, second)
        ]
        columns["score"] = (scored[0], scored[1])
    columns |= {name: (first.metrics[name], second.metrics[name]) for name in METRICS}
    measures = [_difference(name, *columns[name]) for name in columns]
    main = next(iter(columns)) if judge else "rouge_l"
    preferences = {}
    if judge:
        pairs = _both(*columns["score"])
        wins = [(i, 0.5 + 0.5 * ((b > a) - (b < a))) for i, a, b in pairs]
        preferences["scores"] = _win_rates(first, second, wins)
    drops = sorted((b - a, i, a, b) for i, a, b in _both(*columns[main]) if b < a)
    return {
        "first": first.name,
        "second": second.name,
        "measures": [measure for measure in measures if measure],
        "preferences": preferences,
        "main": main,
        "regressions": [
            {
                "index": i,
                "before": a,
                "after": b,
                "first": first.responses[i].text,
                "second": second.responses[i].text,
            }
            for _, i, a, b in drops[:WORST]
        ],
    }


def _difference(name: str, first: list, second: list) -> dict[str, Any] | None:
    """Means and their paired difference over the entries that have both values."""
    both = _both(first, second)
    if not both:
        return None
    a, b = [x for _, x, _ in both], [y for _, _, y in both]
    interval = bootstrap_mean([y - x for x, y in zip(a, b, strict=True)])
    signs = sign_test(a, b)
    verdict = "no difference shown"
    if interval.excludes_zero():
        verdict = "better" if interval.mean > 0 else "worse"
    return {
        "name": name,
        "count": len(both),
        "first": sum(a) / len(a),
        "second": sum(b) / len(b),
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "higher": signs.higher,
        "equal": signs.equal,
        "lower": signs.lower,
        "p": signs.p,
        "verdict": verdict,
    }


def _pairwise_rates(
    first: RunAnswers, second: RunAnswers, judged: Sequence[Preference]
) -> dict[str, Any]:
    """Win rates of the pairs that the judge decided, and how many it did not or contradicted."""
    pairs = [(i, p.value) for i, p in enumerate(judged) if p.value is not None]
    return _win_rates(first, second, pairs) | {
        "inconsistent": sum(p.value is not None and not p.consistent for p in judged),
        "unjudged": len(judged) - len(pairs),
    }


def _win_rates(
    first: RunAnswers, second: RunAnswers, pairs: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """Raw and length-controlled win rate of the second run; ties count half."""
    values = [value for _, value in pairs]
    lengths = [[len(run.responses[i].text) for i, _ in pairs] for run in (first, second)]
    mean = bootstrap_mean(values)
    controlled = length_controlled_win_rate(values, lengths[0], lengths[1])
    return {
        "count": len(values),
        "wins": sum(value > 0.5 for value in values),
        "ties": sum(value == 0.5 for value in values),
        "losses": sum(value < 0.5 for value in values),
        "win_rate": None if math.isnan(mean.mean) else mean.mean,
        "low": None if math.isnan(mean.low) else mean.low,
        "high": None if math.isnan(mean.high) else mean.high,
        "length_controlled": None if math.isnan(controlled) else controlled,
    }


def _mean_per_entry(votes: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """One value per entry: several people's votes on it are not independent cases."""
    by_entry: dict[int, list[float]] = {}
    for index, value in votes:
        by_entry.setdefault(index, []).append(value)
    return [(index, sum(values) / len(values)) for index, values in sorted(by_entry.items())]


def _common_judge(runs: Sequence[RunAnswers]) -> str | None:
    """The judge that scored last among those who scored every run."""
    judges = [[judge_id(r) for r in run.records if r["kind"] == "answer"] for run in runs]
    common = set.intersection(*map(set, judges))
    return next((judge for judge in reversed(judges[0]) if judge in common), None)


def _notes(runs: Sequence[RunAnswers]) -> list[str]:
    notes = []
    judge = _common_judge(runs)
    if judge is None and any(run.records for run in runs):
        notes.append("scores are left out: no one judge, with the same options, scored every run")
    for run in runs if judge else ():
        own = [record for record in run.records if judge_id(record) == judge]
        summary = summarize(run.responses, own)
        if summary["informative"] is False:
            notes.append(f"{run.name}: the judge is not informative; its scores prove nothing")
        if summary["scored"] < summary["count"]:
            unscored = summary["count"] - summary["scored"]
            notes.append(f"{run.name}: {unscored} answers without a score are left out of scores")
    return notes


def _both(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[int, Any, Any]]:
    """(index, a, b) where both have a value."""
    pairs = enumerate(zip(first, second, strict=True))
    return [(i, a, b) for i, (a, b) in pairs if a is not None and b is not None]


def _name(path: Path) -> str:
    """How a run is called: its last two folders, or a file's own name."""
    path = Path(path).expanduser().resolve()
    return path.stem if path.is_file() else f"{path.parent.name}/{path.name}"
