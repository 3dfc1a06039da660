"""A comparison as text and as a page: differences, win rates, worst regressions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lightning_sft.common.pages import build_page
from lightning_sft.judging.metrics import TITLES
from lightning_sft.reporting import pages
from lightning_sft.runs.responses import Response

PREFERENCES = {
    "scores": "Judge's scores, the higher one wins",
    "pairwise": "Judge asked in both orders",
    "votes": "People's blind votes",
}


def render_comparison(found: dict[str, Any], baseline: Sequence[Response]) -> str:
    """The page of what `compare` found.

    Args:
        baseline: The first run's responses, for the texts of the entries.
    """
    names = " · ".join(found["runs"])
    body = [
        f"<header><h1>{escape(names)}</h1>"
        f'<p class="sub">{found["count"]} answers to the same entries; the first run is the '
        'baseline. <a href="blind-vote.html">Vote blind</a> on which answers are better.</p>'
        "</header>",
        *(f'<p class="warning">{escape(note)}</p>' for note in found["notes"]),
        *(_section(result, baseline) for result in found["comparisons"]),
    ]
    return build_page(f"{names} — comparison", "".join(body), pages.SCRIPT)


def describe_comparison(found: dict[str, Any]) -> str:
    """The comparison as text."""
    lines = [f"{found['count']} answers to the same entries. Baseline: {found['runs'][0]}"]
    lines += [f"Note: {note}" for note in found["notes"]]
    for result in found["comparisons"]:
        lines += ["", f"{result['second']} against {result['first']}"]
        for row in result["measures"]:
            lines.append(
                f"  {TITLES[row['name']]:<12}{row['first']:>7.2f} →{row['second']:>7.2f}  "
                f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]  "
                f"p {chance(row['p'], '= ')}  {row['verdict']}"
            )
        for source, rates in result["preferences"].items():
            lines.append(
                f"  win rate by {source}: {percent(rates['win_rate'])} of {rates['count']}, length "
                f"controlled {percent(rates['length_controlled'])}"
            )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share with one decimal, or a dash where there is none."""
    return "–" if share is None else f"{share:.1%}"


def chance(p: float, equals: str = "") -> str:
    """A p-value with three decimals; one that they would round to nothing as a bound."""
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def _section(result: dict[str, Any], baseline: Sequence[Response]) -> str:
    rows = [
        (
            TITLES[row["name"]],
            pages.number(row["first"]),
            pages.number(row["second"]),
            f"{row['difference']:+.2f}",
            f"{row['low']:+.2f} to {row['high']:+.2f}",
            f"{row['higher']} / {row['equal']} / {row['lower']}",
            chance(row["p"]),
            row["verdict"],
        )
        for row in result["measures"]
    ]
    head = ["Measure", "Baseline", "This run", "Difference", "95 % interval"]
    measures = pages.plain_table([*head, "Up / equal / down", "Sign test p", "Verdict"], rows)
    preferences = [_preference_row(*item) for item in result["preferences"].items()]
    head = ["Win rate by", "Win rate", "95 % interval", "Length controlled"]
    wins = pages.plain_table([*head, "Won / tied / lost", "Contradicted itself"], preferences)
    return pages.section(
        f"{result['second']} against {result['first']}",
        measures,
        "<h3>Win rates</h3>" + wins if preferences else "",
        _regressions(result, baseline),
        note="Differences are paired, entry by entry. “No difference shown” means that the "
        "interval holds 0, not that there is none.",
    )


def _preference_row(source: str, rates: dict[str, Any]) -> tuple[str, ...]:
    return (
        PREFERENCES[source],
        percent(rates["win_rate"]),
        f"{percent(rates['low'])} to {percent(rates['high'])}",
        percent(rates["length_controlled"]),
        f"{rates['wins']} / {rates['ties']} / {rates['losses']}",
        str(rates.get("inconsistent", "–")),
    )


def _regressions(result: dict[str, Any], baseline: Sequence[Response]) -> str:
    """The entries that lost most, with both answers."""
    items = []
    for drop in result["regressions"]:
        entry = baseline[drop["index"]].entry
        given = f'<p class="input">{escape(entry.input)}</p>' if entry.input else ""
        texts = (
            ("wanted", "wanted", entry.output),
            (result["first"], "given", drop["first"]),
            (result["second"], "given", drop["second"]),
        )
        answers = "".join(
            f'<dt>{escape(label)}</dt><dd class="{kind}">{escape(text) or "<i>nothing</i>"}</dd>'
            for label, kind, text in texts
        )
        items.append(
            f"<details open><summary>{escape(entry.instruction)} "
            f'<small class="num">{drop["before"]:g} → {drop["after"]:g}</small></summary>'
            f"<div>{given}<dl>{answers}</dl></div></details>"
        )
    title = f"<h3>Worst regressions, by {escape(TITLES[result['main']])}</h3>"
    return title + "".join(items) if items else ""
