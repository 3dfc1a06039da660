"""Parts that the report pages share: cards, sections, tables of figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from lightning_sft.judging.metrics import TITLES
from lightning_sft.judging.significance import Interval

FOLDER = Path(__file__).parent
SCRIPT = FOLDER / "page.js"  # of the pages with a table of answers


def card(label: str, value: str, note: str = "") -> str:
    """A figure that is seen first."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<li><span>{escape(label)}</span><strong class="num">{escape(value)}</strong>{small}</li>'
    )


def section(title: str, *content: str, note: str = "") -> str:
    """A heading with what belongs under it; "" when there is nothing."""
    if not any(content):
        return ""
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{small}{''.join(content)}</section>"


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table; the first column is text, the others are figures. Escapes all cells."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table class="plain"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def metrics_table(metrics: Mapping[str, Interval]) -> str:
    """Mean and interval of each metric."""
    rows = [
        (TITLES[name], number(m.mean), f"{number(m.low)} to {number(m.high)}")
        for name, m in metrics.items()
    ]
    return plain_table(["Metric", "Mean", "95 % interval"], rows) if rows else ""


def number(value: float | None) -> str:
    """Two decimals, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"
