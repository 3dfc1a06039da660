"""`results.json` and `results.md`: all that is known so far.

This module does not import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

Results = dict[str, Any]


def write_report(folder: Path, results: Results) -> None:
    """Both files, each put into place whole."""
    for name, text in (
        ("results.json", json.dumps(results, indent=1, ensure_ascii=False)),
        ("results.md", render(results)),
    ):
        path = folder / f"{name}.tmp"
        path.write_text(text + "\n", encoding="utf-8")
        path.replace(folder / name)


def render(results: Results) -> str:
    """Markdown: the machine, then each part with its checks, its figures and what was skipped."""
    lines = ["# GPU check", ""]
    for key, value in results["machine"].items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        lines.append(f"- {key}: {shown}")
    lines.append(f"- setting: {json.dumps(results['setting'])}")
    lines += ["", "| part | status | seconds |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {part['status']} | {part['seconds']:.0f} |"
        for name, part in results["parts"].items()
    ]
    for name, part in results["parts"].items():
        lines += ["", f"## {name}: {part['status']}", ""]
        lines += _render_part(part["entries"])
    return "\n".join(lines)


def _render_part(entries: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in entries:
        facts = {key: value for key, value in entry.items() if key not in ("name", "losses")}
        if "passed" in entry:
            word = "passed" if facts.pop("passed") else "FAILED"
            shown = ", ".join(f"{key} {value}" for key, value in facts.items())
            lines.append(f"- {word}: {entry['name']} ({shown})")
        elif "skipped" in entry:
            lines.append(f"- skipped: {entry['name']} ({entry['skipped']})")
        elif "error" in entry:
            lines.append(f"- ERROR: {entry['name']} ({entry['error']})")
    rounds: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if "tokens_per_second" in entry:
            rounds.setdefault(entry["name"], []).append(entry)
    return lines + (["", *_tabulate(rounds)] if rounds else [])


def _tabulate(rounds: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Medians over the rounds; the other figures are of the last one."""
    head = (
        "",
        "tokens/s",
        "lowest–highest",
        "run, s",
        "first step, s",
        "peak GB",
        "forecast",
    )
    lines = [f"| {' | '.join(head)} | aim |", "| --- " * (len(head) + 1) + "|"]
    for name, entries in rounds.items():
        rates, last = [entry["tokens_per_second"] for entry in entries], entries[-1]
        cells = [name, f"{median(rates):,.0f}", f"{min(rates):,.0f}–{max(rates):,.0f}"]
        for key in ("run_seconds", "first_step", "peak_gb", "forecast_gb"):
            cells.append("–" if last.get(key) is None else f"{last[key]:.2f}")
        aim = last.get("aim") or last.get("aim_seconds")
        cells.append("–" if aim is None else f"{aim:,}{' s' if 'aim_seconds' in last else ''}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
