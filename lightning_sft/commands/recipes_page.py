"""What recipes came to: figures of each, one table as text, one page.

A figure is read from what the run left in its folder; one that is missing is a dash.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.pages import build_page
from lightning_sft.judging.metrics import METRICS, TITLES, measure
from lightning_sft.judging.summary import SCORES_NAME, read_scores, summarize
from lightning_sft.reporting import pages
from lightning_sft.reporting.compare import compare_answers
from lightning_sft.reporting.compare_page import describe_comparison
from lightning_sft.runs.responses import Response, read_responses

LOSS_NAME = "response-loss.json"  # of `recipes loss`
SESSIONS_NAME = "sessions.jsonl"  # what each process that trained took
HEAD = [
    "Recipe",
    "Val loss",
    *(TITLES[name] for name in METRICS),
    "Score",
    "Trained",
    "Peak GB",
    "Training",
]
NOTE = (
    "Val loss is per token of the answers and their end alone, whatever the loss in training was "
    "over, so it compares across maskings and prompts. Metrics and score are means over the test "
    "answers. Trained counts parameters. Peak GB is the most memory that the training process "
    "held, libraries included. Training is the time of the training steps, without start, "
    "validation and samples."
)


def summarize_recipes(folder: Path, runs: Mapping[str, Path | None]) -> str:
    """Write recipes.json, recipes.html and the comparison of the answers.

    Args:
        folder: Of the study; the files go there.
        runs: Recipe → its run folder; the first is the baseline.

    Returns:
        The table as text.
    """
    found = {name: collect_figures(run) for name, run in runs.items() if run is not None}
    answers = {name: read_responses(runs[name] or folder) for name in found}
    first = next(iter(answers.values()))
    alike = [name for name, own in answers.items() if _entries(own) == _entries(first)]
    others = [name for name in answers if name not in alike]
    notes = [
        f"{name}: answers other entries than {next(iter(found))}; its figures do not compare"
        for name in others
    ]
    differences = None
    if len(alike) > 1:
        compare_answers([runs[name] or folder for name in alike], output=folder / "comparison")
        differences = files.read_json(folder / "comparison" / "comparison.json")
    record = {"recipes": found, "notes": notes, "comparison": differences}
    files.write_json(folder / "recipes.json", record)
    with files.atomic_write(folder / "recipes.html") as file:
        file.write(render_recipes(folder, runs, found, notes, differences))
    lines = [_as_text([HEAD, *(table_row(name, one) for name, one in found.items())])]
    return "\n".join(["", *lines, *notes, "", f"Recipes: {folder / 'recipes.html'}"])


def collect_figures(run: Path) -> dict[str, Any]:
    """What one run cost and came to; None for what its folder does not tell."""
    responses = read_responses(run)
    records = read_scores(run / SCORES_NAME)
    scores = summarize(responses, records) if records else None
    loss = _read_json(run / LOSS_NAME)
    sessions = files.read_jsonl(run / SESSIONS_NAME) if (run / SESSIONS_NAME).exists() else []
    measured = measure((r.text, r.entry.output) for r in responses)
    return {
        "run": str(run),
        "val_loss": loss.get("val_loss"),
        "metrics": {name: sum(values) / len(values) for name, values in measured.items()},
        "score": scores["average"] if scores else None,
        "judge": scores["judge"] if scores else None,
        "parameters": loss.get("parameters"),
        "trained": loss.get("trained"),
        "peak_gb": max((session["peak_gb"] for session in sessions), default=None),
        "training_seconds": count_training_seconds(run / "metrics.csv"),
        "fit_seconds": sum(session["seconds"] for session in sessions) if sessions else None,
        "starts": len(sessions),
    }


def count_training_seconds(metrics: Path) -> float | None:
    """Time of the training steps that a run kept: tokens of each over its rate."""
    seconds, seen = 0.0, 0.0
    if not metrics.exists():
        return None
    for row in csv.DictReader(files.read_text(metrics).splitlines()):
        if row.get("tokens_seen") and row.get("tokens_per_second"):
            seconds += (float(row["tokens_seen"]) - seen) / float(row["tokens_per_second"])
            seen = float(row["tokens_seen"])
    return seconds if seen else None


def table_row(name: str, figures: Mapping[str, Any]) -> list[str]:
    """The cells under `HEAD`."""

    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        name,
        show(figures["val_loss"], ".3f"),
        *(show(figures["metrics"][metric], ".1f") for metric in METRICS),
        show(figures["score"], ".1f"),
        show(figures["trained"], ","),
        show(figures["peak_gb"], ".2f"),
        show_time(figures["training_seconds"]),
    ]


def show_time(seconds: float | None) -> str:
    """Seconds below two minutes, then minutes."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def render_recipes(
    folder: Path,
    runs: Mapping[str, Path | None],
    found: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str],
    differences: Mapping[str, Any] | None,
) -> str:
    """The page; links lead to the report of each run."""
    rows = [table_row(name, figures) for name, figures in found.items()]
    links = "".join(
        f'<li><a href="{escape(str((run / "report.html").relative_to(folder)))}">{escape(name)}</a>'
        "</li>"
        for name, run in runs.items()
        if run is not None
    )
    weighed = ""
    if differences is not None:
        link = '<p><a href="comparison/comparison.html">Answer by answer</a></p>'
        weighed = f"<pre>{escape(describe_comparison(dict(differences)))}</pre>{link}"
    body = [
        f"<header><h1>{escape(folder.name)}: {escape(', '.join(found))}</h1>"
        f'<p class="sub">{len(found)} recipes; the first is the baseline.</p></header>',
        *(f'<p class="warning">{escape(note)}</p>' for note in notes),
        pages.section("Figures", pages.plain_table(HEAD, rows), note=NOTE),
        pages.section(
            "Differences",
            weighed,
            note="Paired, answer by answer, against the first recipe, with 95 % intervals. “No "
            "difference shown” means that the interval holds 0, not that there is none.",
        ),
        pages.section("Reports", f"<ul>{links}</ul>"),
    ]
    return build_page(f"{folder.name} — recipes", "".join(body), pages.SCRIPT)


def _entries(responses: Sequence[Response]) -> list[Any]:
    return [response.entry for response in responses]


def _as_text(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first one left, figures right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
