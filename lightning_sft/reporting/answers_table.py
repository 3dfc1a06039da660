"""The table of answers: searchable, sortable, and in pages of `PAGE` rows.

The first page is HTML, so that it is there without the script too. The whole table is data for the
script (`page.js`), which draws the same rows: 100,000 of them as HTML would be more than a browser
bears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_sft.judging.metrics import METRICS, TITLES

PAGE = 500  # rows; long pages load slowly and scroll badly
Answer = Mapping[str, Any]


def sort_answers(answers: Sequence[Answer]) -> list[Answer]:
    """The worst first, by score or, where nothing was judged, by ROUGE-L.

    Args:
        answers: Each with index, instruction, input, output, response, metrics and, where it was
            judged, score, reason and reply.
    """
    first = list_columns(answers)[0] if is_judged(answers) else "rouge_l"
    return sorted(answers, key=lambda answer: (_figure(answer, first), answer["index"]))


def is_judged(answers: Sequence[Answer]) -> bool:
    """Whether any answer has a score."""
    return any(answer["score"] is not None for answer in answers)


def list_columns(answers: Sequence[Answer]) -> list[str]:
    """Names of the columns of figures behind the index."""
    return ["score"] * is_judged(answers) + list(METRICS)


def render_table(answers: Sequence[Answer]) -> str:
    """The table's tools and its first page as HTML.

    Args:
        answers: In the order of `sort_answers`.
    """
    columns = list_columns(answers)
    first = "score" if is_judged(answers) else "rouge_l"
    head = "".join(
        f'<th scope="col" data-sort="{name}"{_sorted_mark(name, first)}><button type="button">'
        f"{escape(title)}</button></th>"
        for name, title in [("index", "#"), *((name, TITLES[name]) for name in columns)]
    )
    rows = "".join(_render_row(answer, columns) for answer in answers[:PAGE])
    pager = (
        '<nav class="pager" aria-label="Pages of answers" hidden><button type="button" '
        'id="previous">← Previous</button><output id="place"></output>'
        '<button type="button" id="next">Next →</button></nav>'
    )
    return (
        '<div class="tools" data-for="answers">'
        '<label>Search <input type="search" id="search" autocomplete="off" '
        'placeholder="words in any text"></label>'
        f'<label>Order <select id="order"><option value="{first}:up">worst first</option>'
        f'<option value="{first}:down">best first</option>'
        '<option value="index:up">as in the file</option></select></label>'
        f'<output id="shown">{min(PAGE, len(answers)):,} of {len(answers):,}</output>{pager}</div>'
        f'<table id="answers"><thead><tr>{head}<th scope="col">Instruction</th>'
        f'<th scope="col">Wanted and given</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def table_data(answers: Sequence[Answer]) -> dict[str, Any]:
    """The whole table for the script: figures and texts of each row, in the order of `answers`."""
    columns = list_columns(answers)
    titles = {"index": "#"} | {name: TITLES[name] for name in columns}
    return {
        "page": PAGE,
        "columns": [[name, title] for name, title in titles.items()],
        "rows": [
            [*(_figure(answer, name) for name in titles), *_texts(answer)] for answer in answers
        ],
    }


def _texts(answer: Answer) -> tuple[str, str, str, str, str]:
    """What is to be read in a row: instruction, input, wanted, given, and the judge's words."""
    judge = " — ".join(str(text) for text in (answer["reply"], answer["reason"]) if text)
    return answer["instruction"], answer["input"], answer["output"], answer["response"], judge


def _render_row(answer: Answer, columns: Sequence[str]) -> str:
    keys = "".join(f' data-{name}="{_figure(answer, name):.10g}"' for name in ("index", *columns))
    figures = f'<td class="num" data-label="#">{answer["index"]}</td>'
    for name in columns:
        value = _figure(answer, name)
        shown = "–" if value < 0 else f"{value:g}"
        figures += f'<td class="num" data-label="{escape(TITLES[name])}">{shown}</td>'
    instruction, given, wanted, response, judge = map(escape, _texts(answer))
    question = f"<p>{instruction}</p>" + (f'<p class="input">{given}</p>' if given else "")
    texts = (
        f'<dl><dt>wanted</dt><dd class="wanted">{wanted}</dd>'
        f'<dt>given</dt><dd class="given">{response or "<i>nothing</i>"}</dd>'
    )
    if judge:
        texts += f'<dt>judge</dt><dd class="judge">{judge}</dd>'
    words = f'<td class="text">{question}</td><td class="text">{texts}</dl></td>'
    return f"<tr{keys}>{figures}{words}</tr>"


def _figure(answer: Answer, name: str) -> float:
    """What a column sorts by; a missing score comes before the lowest, so that it is seen."""
    value = answer[name] if name in ("index", "score") else answer["metrics"][name]
    return -1 if value is None else value


def _sorted_mark(name: str, first: str) -> str:
    return ' aria-sort="ascending"' if name == first else ""
