"""`report`: everything about a run on one page, and the same as JSON.

    python -m lightning_sft report runs/gpt2-medium/version_0

Reads what is in the run folder, whatever is missing, and writes `report.html` and `report.json`
into it: loss, learning rate and throughput, samples over the epochs, scores with their interval and
controls, metrics that need no judge, both again without the entries that training has near-twins
of (where `prepare` has looked), benchmarks, every answer (worst first, searchable, sortable), the
config and the versions. The page is one file that loads nothing, and works without its script.
"""

from __future__ import annotations

import base64
import csv
import datetime
import importlib.metadata
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, hide_keys
from lightning_sft.judging.metrics import measure
from lightning_sft.judging.metrics import summarize as summarize_metrics
from lightning_sft.judging.summary import SCORES_NAME, answer_scores, read_scores, summarize
from lightning_sft.reporting.charts import Point
from lightning_sft.reporting.report_page import render
from lightning_sft.reporting.twin_scores import weigh_twins
from lightning_sft.runs.data_quality_file import DATA_QUALITY_NAME, read_near_twins
from lightning_sft.runs.evaluation_file import EVALUATION_NAME, read_evaluation
from lightning_sft.runs.responses import RESPONSES_NAME, Response, read_responses

PNG_START = b"\x89PNG\r\n\x1a\n"
PACKAGES = ("lightning-sft", "torch", "lightning", "tiktoken", "numpy")


def report(run: Path, output: Path | None = None) -> None:
    """Write report.html and report.json for a run.

    Args:
        run: The run folder; a responses file stands for the folder it is in.
        output: Where the page goes; `report.html` in the run folder by default. The JSON goes
            beside it.

    Raises:
        InputError: The folder is missing, or holds no part of a run.
    """
    run = Path(run).expanduser()
    if not run.exists():
        raise InputError(f"{run}: no such run folder")
    folder = run if run.is_dir() else run.parent
    page = Path(output or folder / "report.html")
    found = collect(folder)
    picture = found.pop("picture")
    files.write_json(page.with_suffix(".json"), found)
    with files.atomic_write(page) as file:
        file.write(render(found, picture))
    print(f"Report: {page}")


def collect(folder: Path) -> dict[str, Any]:
    """All that the folder tells, as plain JSON values; a part that is missing is None or empty.

    A part that cannot be read is left out and named under `notes`.

    Raises:
        InputError: There is no part at all.
    """
    notes: list[str] = []

    def load(name: str, read: Callable[[Path], Any]) -> Any:
        try:
            path = _find_part(folder, name)
            return None if path is None else read(path)
        except (InputError, OSError, ValueError, csv.Error) as error:
            notes.append(f"{name} is left out: {error}")
        return None

    responses = load(RESPONSES_NAME, read_responses) or []
    records = load(SCORES_NAME, read_scores) or []
    judged = judge_answers(responses, records)
    twins = load(DATA_QUALITY_NAME, read_near_twins)
    weighed = weigh_twins(twins, responses, judged["answers"])
    if twins and responses and weighed is None:
        notes.append(f"{DATA_QUALITY_NAME} is left out: it is of other data than these answers")
    found = {
        "run": f"{folder.resolve().parent.name}/{folder.resolve().name}",
        "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "training": load("metrics.csv", _read_training) or {},
        "samples": load("samples.jsonl", files.read_jsonl) or [],
        **judged,
        "near_twins": weighed,
        "evaluation": load(EVALUATION_NAME, read_evaluation) or [],
        "config": load("config.yaml", _read_text),
        "versions": load("versions.json", files.read_json),
        "picture": load("loss-curve.png", _read_picture),
        "versions_here": _versions_here(),
        "notes": notes,
    }
    parts = ("training", "samples", "answers", "evaluation", "config", "versions", "picture")
    if not any(found[part] for part in parts):
        why = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(f"{folder}: holds no part of a run, such as metrics.csv{why}")
    return found


def judge_answers(responses: Sequence[Response], records: list[dict[str, Any]]) -> dict[str, Any]:
    """`metrics`, `scores` and `answers` of a report: each answer beside what is said of it."""
    measured = measure((r.text, r.entry.output) for r in responses)
    rows = answer_scores(responses, records)
    answers = [
        {
            "index": index,
            "instruction": response.entry.instruction,
            "input": response.entry.input,
            "output": response.entry.output,
            "response": response.text,
            "score": row["score"],
            "reason": row["reason"] if records else None,
            "reply": row["reply"],
            "metrics": {name: column[index] for name, column in measured.items()},
        }
        for index, (response, row) in enumerate(zip(responses, rows, strict=True))
    ]
    return {
        "metrics": {k: v._asdict() for k, v in summarize_metrics(measured).items() if responses},
        "scores": summarize(responses, records) if responses and records else None,
        "answers": answers,
    }


def _read_training(path: Path) -> dict[str, list[Point]]:
    """Column → (step, value) pairs. Empty and torn cells are skipped: the file is sparse."""
    series: dict[str, list[Point]] = {}
    for row in csv.DictReader(files.read_text(path).splitlines()):
        step = _figure(row.get("step"))
        for column, text in row.items():
            value = _figure(text)
            if column not in (None, "step") and step is not None and value is not None:
                series.setdefault(column, []).append((step, value))
    return series


def _figure(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _read_text(path: Path) -> str:
    """The file's text. Keys are refused in configs; should one be there, it goes no further."""
    return hide_keys(files.read_text(path))


def _read_picture(path: Path) -> str:
    """The picture as a data URI."""
    content = files.read_bytes(path, files.MOST_SMALL)
    if not content.startswith(PNG_START):
        raise InputError("it is no PNG picture")
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _find_part(folder: Path, name: str) -> Path | None:
    """A file of the run; None where there is none.

    Raises:
        InputError: It is a link to something outside the run, which is not the report's to show.
    """
    path = folder / name
    if not path.exists():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError("it is a link that leaves the run folder")
    return path


def _versions_here() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
