"""Parts that the report pages share: cards, sections, tables of figures and of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_sft.judging.metrics import METRICS, TITLES
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


def answers_table(answers: Sequence[Mapping[str, Any]]) -> str:
    """The answers, searchable and sortable; starts with the worst, by score or else by ROUGE-L.

    Args:
        answers: Each with index, instruction, input, output, response, metrics and, where it was
            judged, score, reason and reply.
    """
    judged = any(answer["score"] is not None for answer in answers)
    columns = (["score"] if judged else []) + list(METRICS)
    first = "score" if judged else "rouge_l"
    ordered = sorted(answers, key=lambda answer: (_value(answer, first), answer["index"]))
    head = "".join(
        f'<th scope="col" data-sort="{name}"{_sorted_mark(name, first)}><button type="button">'
        f"{escape(title)}</button></th>"
        for name, title in [("index", "#"), *((name, TITLES[name]) for name in columns)]
    )
    rows = "".join(_answer_row(answer, columns) for answer in ordered)
    return (
        '<div class="tools" data-for="answers">'
        '<label>Search <input type="search" id="search" autocomplete="off" '
        'placeholder="words in any text"></label>'
        f'<label>Order <select id="order"><option value="{first}:up">worst first</option>'
        f'<option value="{first}:down">best first</option>'
        '<option value="index:up">as in the file</option></select></label>'
        f'<output id="shown">{len(answers)} of {len(answers)}</output></div>'
        f'<table id="answers"><thead><tr>{head}<th scope="col">Instruction</th>'
        f'<th scope="col">Wanted and given</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def number(value: float | None) -> str:
    """Two decimals, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _answer_row(answer: Mapping[str, Any], columns: Sequence[str]) -> str:
    keys = "".join(f' data-{name}="{_value(answer, name)}"' for name in ("index", *columns))
    figures = f'<td class="num" data-label="#">{answer["index"]}</td>'
    for name in columns:
        value = _value(answer, name)
        shown = "–" if value < 0 else f"{value:g}"
        figures += f'<td class="num" data-label="{escape(TITLES[name])}">{shown}</td>'
    question = f"<p>{escape(answer['instruction'])}</p>"
    if answer["input"]:
        question += f'<p class="input">{escape(answer["input"])}</p>'
    texts = (
        f'<dl><dt>wanted</dt><dd class="wanted">{escape(answer["output"])}</dd>'
        f'<dt>given</dt><dd class="given">{escape(answer["response"]) or "<i>nothing</i>"}</dd>'
    )
    words = " — ".join(str(text) for text in (answer["reply"], answer["reason"]) if text)
    if words:
        texts += f'<dt>judge</dt><dd class="judge">{escape(words)}</dd>'
    words_cells = f'<td class="text">{question}</td><td class="text">{texts}</dl></td>'
    return f"<tr{keys}>{figures}{words_cells}</tr>"


def _value(answer: Mapping[str, Any], name: str) -> float:
    """What a column sorts by; a missing score comes before the lowest, so that it is seen."""
    value = answer[name] if name in ("index", "score") else answer["metrics"][name]
    return -1 if value is None else value


def _sorted_mark(name: str, first: str) -> str:
    return ' aria-sort="ascending"' if name == first else ""
