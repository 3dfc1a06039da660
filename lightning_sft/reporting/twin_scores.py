"""A report's figures with and without the entries that training has a near-twin of.

`prepare --run` says which they are. A model that saw nearly the same question may remember the
answer; how much of a figure rests on that shows when those entries are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_sft.judging.metrics import METRICS, TITLES
from lightning_sft.judging.significance import bootstrap_mean
from lightning_sft.reporting import pages
from lightning_sft.runs.data_quality_file import NearTwins, entry_key
from lightning_sft.runs.responses import Response

PARTS = ("all", "without", "twins")  # all answers, those to no near-twin, those to near-twins


def weigh_twins(
    twins: NearTwins | None, responses: Sequence[Response], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Mean and interval of each figure over all answers, without near-twins, and over these alone.

    Args:
        answers: The responses' figures as a report holds them: `score`, which may be None, and
            `metrics`.

    Returns:
        Plain JSON values; None where nothing is known of any of the answers.
    """
    if twins is None:
        return None
    keys = [entry_key(response.entry) for response in responses]
    known = [n for n, key in enumerate(keys) if key in twins.similarity]
    if not known:
        return None
    near = [n for n in known if twins.similarity[keys[n]] is not None]
    places = {"all": known, "without": sorted(set(known) - set(near)), "twins": near}
    measures = {
        name: {part: _summarize(name, [answers[n] for n in places[part]]) for part in PARTS}
        for name in ("score", *METRICS)
    }
    return {
        "threshold": twins.threshold,
        "answers": len(responses),
        "known": len(known),
        "twins": len(near),
        "measures": {name: m for name, m in measures.items() if m["all"]["count"]},
    }


def _summarize(name: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [a["score"] if name == "score" else a["metrics"][name] for a in answers]
    values = [value for value in values if value is not None]
    interval = bootstrap_mean(values)
    found = interval._asdict() if values else dict.fromkeys(interval._fields)
    return {"count": len(values), **found}


def twins_section(found: Mapping[str, Any] | None) -> str:
    """The section of a report; "" where near-twins are not known."""
    if not found:
        return ""
    rows = [
        (TITLES[name], *(_cell(measure[part]) for part in PARTS))
        for name, measure in found["measures"].items()
    ]
    known = "" if found["known"] == found["answers"] else f" of the {found['known']} known ones"
    return pages.section(
        "With and without near-twins",
        pages.plain_table(
            ["Measure", "All answers", "Without near-twins", "Near-twins alone"], rows
        ),
        note=f"Training has a near-twin (cosine of character n-grams {found['threshold']:g} or "
        f"more) of {found['twins']} of {found['answers']} entries{known}. Mean, 95 % interval, and "
        "number of answers; where the intervals overlap widely, the near-twins decide nothing.",
    )


def _cell(part: Mapping[str, Any]) -> str:
    if not part["count"]:
        return "–"
    return f"{part['mean']:.2f} ({part['low']:.2f} to {part['high']:.2f}; {part['count']})"
