"""The chapter's "human preference comparison": a page to vote on, and reading the votes back.

`compare` writes `blind-vote.html`: two unnamed answers side by side, a person picks the better one.
The page does not hold which run an answer is from. The side is decided by a hash of the comparison,
which `compare --votes` works out again when it reads the exported file; so not even the page's
source gives it away. Votes stay in the browser until they are exported.

    python -m lightning_sft compare A B --votes votes-anna.json votes-ben.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.common.pages import build_page
from lightning_sft.reporting import pages
from lightning_sft.runs.responses import Response

FORMAT = "lightning_sft votes 1"
CHOICES = ("left", "right", "tie")


class Vote(NamedTuple):
    """A person's choice on one entry of run number `run` against the first run."""

    run: int
    entry: int
    value: float  # 1 if the later run's answer is better, 0 if the first run's, 0.5 for a tie


def fingerprint(runs: Sequence[Sequence[Response]]) -> str:
    """What tells one comparison from another: a hash of all its texts, in order."""
    texts = [
        [[r.entry.instruction, r.entry.input, r.entry.output, r.text] for r in run] for run in runs
    ]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]


def first_run_is_left(comparison: str, item: str) -> bool:
    """On which side an item shows the first run's answer."""
    return hashlib.sha256(f"{comparison} {item}".encode()).digest()[0] % 2 == 0


def build_vote_page(runs: Sequence[Sequence[Response]]) -> str:
    """The page, with every pair whose answers differ, in an order that mixes the runs."""
    comparison = fingerprint(runs)
    items = []
    for run, responses in enumerate(runs[1:], start=1):
        for index, (a, b) in enumerate(zip(runs[0], responses, strict=True)):
            item = f"{run}-{index}"
            if a.text.strip() == b.text.strip():
                continue
            left, right = (a, b) if first_run_is_left(comparison, item) else (b, a)
            items.append(
                {
                    "item": item,
                    "instruction": a.entry.instruction,
                    "input": a.entry.input,
                    "wanted": a.entry.output,
                    "left": left.text,
                    "right": right.text,
                }
            )
    items.sort(key=lambda entry: hashlib.sha256(f"{comparison}{entry['item']}".encode()).digest())
    data = {"format": FORMAT, "comparison": comparison, "items": items}
    return build_page("Blind vote", _body(len(items)), pages.FOLDER / "blind_vote.js", data)


def read_votes(path: Path, runs: Sequence[Sequence[Response]]) -> list[Vote]:
    """The votes of one exported file, each turned back to the run it is for.

    Raises:
        InputError: Not a file of votes, or votes on another comparison.
    """
    try:
        exported = files.read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"votes: {path} cannot be read ({type(error).__name__})") from None
    if not isinstance(exported, dict) or exported.get("format") != FORMAT:
        raise InputError(f"votes: {path}: not a file that blind-vote.html exported")
    comparison = fingerprint(runs)
    if exported.get("comparison") != comparison:
        raise InputError(f"votes: {path}: its votes are on other runs, or in another order")
    votes = []
    choices = exported.get("votes")
    for item, choice in choices.items() if isinstance(choices, dict) else ():
        run, _, index = item.partition("-")
        known = run.isdecimal() and index.isdecimal() and choice in CHOICES
        if not known or not (0 < int(run) < len(runs) and int(index) < len(runs[0])):
            raise InputError(f"votes: {path}: {item[:20]!r}: {choice!r:.20} is no vote")
        first_chosen = (choice == "left") == first_run_is_left(comparison, item)
        value = 0.5 if choice == "tie" else 0.0 if first_chosen else 1.0
        votes.append(Vote(int(run), int(index), value))
    return votes


def _body(count: int) -> str:
    keys = "<kbd>←</kbd> left, <kbd>→</kbd> right, <kbd>t</kbd> tie, <kbd>⌫</kbd> back"
    return f"""<main class="vote">
<header><h1>Which answer is better?</h1>
<p class="sub">{count} pairs. Which model wrote which answer is not on this page. {keys}</p>
</header>
<progress id="progress" max="{count}" value="0"></progress>
<p class="sub" id="state" role="status"></p>
<section id="pair">
<h2 id="instruction"></h2><p class="input" id="input"></p>
<details><summary>The wanted answer</summary><p id="wanted"></p></details>
<div class="pair">
<article id="left-card"><p id="left"></p>
<button type="button" data-choice="left">Left is better</button></article>
<article id="right-card"><p id="right"></p>
<button type="button" data-choice="right">Right is better</button></article>
</div></section>
<div class="choices">
<button type="button" data-choice="tie">Equally good</button>
<button type="button" id="back">Back</button>
<button type="button" id="export">Export votes (JSON)</button>
</div></main>"""
