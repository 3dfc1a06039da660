"""Single entries as the model will see them, for `inspect --entries`, `--show` and `--html`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.common.pages import build_page
from lightning_sft.data.config import DataConfig
from lightning_sft.data.rows import Row, TokenRows
from lightning_sft.data.token_view import Run, view_row, view_tokens
from lightning_sft.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parent
GREEN, BOLD, STRUCK, PLAIN = "\x1b[32m", "\x1b[1m", "\x1b[9;31m", "\x1b[0m"
LEGEND = (
    '<p class="note"><span class="supervised">carries loss</span> <span>is only read</span> '
    '<span class="cut">is cut off</span> <span class="special">is a special token</span></p>'
)


def parse_places(text: str) -> list[int]:
    """The numbers of a list such as `0,5`."""
    try:
        return [int(place) for place in text.split(",")]
    except ValueError:
        raise InputError(f"entries: {text!r} is not a list such as 0,5") from None


def find_rows(places: Sequence[int], split: str, rows: TokenRows) -> list[Row]:
    """The rows of some entries; a conversation may have more than one.

    Raises:
        InputError: There is no such entry.
    """
    found = []
    for place in places:
        of_entry = np.flatnonzero(rows.indices == place)
        if not len(of_entry):
            last = int(rows.indices.max())
            raise InputError(f"entries: {split} has entries 0 to {last}, not {place}")
        found += [rows[int(row)] for row in of_entry]
    return found


def show_entries(rows: Sequence[Row], split: str, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Print rows as text and as ids, the supervised tokens marked.

    On a terminal these are green, special tokens bold and cut ones struck through; elsewhere they
    stand in [[double brackets]] (a weight behind them) and ~~double tildes~~.
    """
    for row in rows:
        runs = view_row(row, config, tokenizer)
        print(_title(row, runs, split))
        print(_join((run, run.text) for run in runs))
        print(_join(((run, " ".join(map(str, run.ids))) for run in runs), " "))
        print()


def write_page(
    path: Path, rows: Sequence[Row], split: str, config: DataConfig, tokenizer: Tokenizer
) -> None:
    """Write rows as a page, token by token; a token's id is shown when it is pointed at.

    Raises:
        ServiceError: The disk refused.
    """
    style = config.style().name
    body = [f"<h1>{escape(split)} of {escape(config.path)}</h1>"]
    body.append(f"<p>prompt style {escape(style)}; at most {config.max_length} tokens</p>{LEGEND}")
    for row in rows:
        runs = view_row(row, config, tokenizer)
        tokens = "".join(
            _token(run, token, text) for run in runs for token, text in view_tokens(run, tokenizer)
        )
        body.append(f'<h2>{escape(_title(row, runs, split))}</h2><p class="row">{tokens}</p>')
    page = build_page(
        f"{split} entries",
        "".join(body),
        FOLDER / "inspect_page.js",
        style=FOLDER / "inspect_page.css",
    )
    with files.atomic_write(path) as file:
        file.write(page)


def _title(row: Row, runs: Sequence[Run], split: str) -> str:
    counts = {
        kind: sum(len(r.ids) for r in runs if r.kind == kind) for kind in ("supervised", "cut")
    }
    return (
        f"{split} entry {row.index}: {row.prompt_length} prompt and "
        f"{len(row.ids) - row.prompt_length} answer tokens, {counts['supervised']} supervised"
        + (f", {counts['cut']} cut off" if counts["cut"] else "")
    )


def _join(parts: Iterator[tuple[Run, str]], between: str = "") -> str:
    if sys.stdout.isatty():
        return between.join(_coloured(run, text) for run, text in parts)
    # Without colours special tokens are known by their names: neighbours are one.
    groups = itertools.groupby(parts, key=lambda part: (part[0].kind, part[0].weight))
    return between.join(
        _marked(kind, weight, between.join(text for _, text in group))
        for (kind, weight), group in groups
    )


def _coloured(run: Run, text: str) -> str:
    colour = {"supervised": GREEN, "cut": STRUCK, "context": ""}[run.kind]
    colour += BOLD if run.is_special else ""
    return f"{colour}{text}{PLAIN}" if colour else text


def _marked(kind: str, weight: float, text: str) -> str:
    if kind == "context":
        return text
    if kind == "cut":
        return f"~~{text}~~"
    return f"[[{text}]]" + ("" if weight == 1.0 else f"×{weight:g}")


def _token(run: Run, token: int, text: str) -> str:
    kinds = [run.kind, *(["special"] if run.is_special else [])]
    weight = "" if run.weight == 1.0 else f", weight {run.weight:g}"
    shown = escape(text).replace("\n", "⏎\n") or "∅"
    return f'<span class="{" ".join(kinds)}" title="{token}{weight}">{shown}</span>'
