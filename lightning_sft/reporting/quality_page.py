"""The page of what `prepare` found: counts, every near-leak with its twin, groups, outliers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from lightning_sft.common.pages import build_page
from lightning_sft.data.entries import Splits
from lightning_sft.data.near_duplicates import comparison_text
from lightning_sft.data.outliers import FENCE, NO_LETTERS
from lightning_sft.data.quality import Quality
from lightning_sft.reporting import pages
from lightning_sft.reporting.charts import bar_chart

TITLES = {"train": "Training", "test": "Test", "val": "Validation"}
# The page is for looking, the JSON beside it holds every evaluation entry.
MOST_LEAKS, MOST_GROUPS, MOST_IN_GROUP, MOST_OUTLIERS = 200, 20, 6, 20
SHOWN = 600  # characters of a text
BARS = 10


def render_quality(quality: Quality, summary: Mapping[str, Any]) -> str:
    """The page.

    Args:
        summary: What goes into `data-quality.json`.
    """
    title = f"{', '.join(summary['data'])} — data quality"
    body = [
        f"<header><h1>{escape(', '.join(summary['data']))}</h1>"
        f'<p class="sub">Data quality, written {escape(summary["written"])}</p></header>',
        _cards(quality),
        _written(summary["output"], summary["policies"]),
        _twins_table(summary),
        _leaks(quality),
        _groups(quality),
        _lengths(quality),
        _scripts(quality),
    ]
    return build_page(title, "".join(body), pages.SCRIPT)


def _cards(quality: Quality) -> str:
    cards = [pages.card("Entries", f"{len(quality.split_of):,}")]
    for name in ("test", "val"):
        count, size = quality.count_twins(name, "train"), len(quality.places(name))
        label = f"{TITLES[name]} entries with a near-twin in training"
        cards.append(pages.card(label, f"{count:,}", f"of {size:,}, {count / size:.1%}"))
    cards.append(pages.card("Repeated prompts", f"{quality.repeats['all']:,}", "word for word"))
    if quality.blank:
        cards.append(pages.card("Blank answers", f"{len(quality.blank):,}"))
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _written(output: Mapping[str, Any] | None, policies: Sequence[str]) -> str:
    if not output:
        return ""
    rows = [(TITLES[name], f"{output[name]:,}") for name in Splits._fields]
    return pages.section(
        "The new file",
        f"<p>{escape(output['path'])}, by {escape(', '.join(policies))}</p>",
        pages.plain_table(["Split", "Entries"], rows),
        note="All other figures on this page are of the data as it was.",
    )


def _twins_table(summary: Mapping[str, Any]) -> str:
    near, repeats = summary["near_twins"], summary["repeats"]
    rows = [
        (
            TITLES[name],
            f"{summary['splits'][name]:,}",
            f"{repeats[name]:,}",
            *(f"{near[name][other]:,}" for other in Splits._fields),
        )
        for name in Splits._fields
    ]
    head = ["Split", "Entries", "Repeats in it"]
    head += [f"Twin in {TITLES[name].lower()}" for name in Splits._fields]
    return pages.section(
        "Near-twins",
        pages.plain_table(head, rows),
        note="A near-twin is another entry whose instruction and input are alike: TF-IDF over "
        f"1 to 3 characters, a cosine of {summary['threshold']:g} or more. Repeats are word for "
        "word and count among them.",
    )


def _leaks(quality: Quality) -> str:
    """Evaluation entries beside the training entry that they are most like."""
    nearest, entries = quality.nearest["train"], quality.entries
    leaks = [
        (float(nearest.similarity[place]), name, place)
        for name in ("test", "val")
        for place in quality.places(name).tolist()
        if nearest.place[place] >= 0
    ]
    leaks.sort(key=lambda leak: (-leak[0], leak[2]))
    items = []
    for similarity, name, place in leaks[:MOST_LEAKS]:
        twin = int(nearest.place[place])
        texts = [
            (_name(quality, place), "given", comparison_text(entries[place])),
            ("its answer", "judge", entries[place].output),
            (_name(quality, twin), "given", comparison_text(entries[twin])),
            ("its answer", "judge", entries[twin].output),
        ]
        label = f'<small class="num">{similarity:.3f} · {escape(TITLES[name].lower())}</small>'
        items.append(_details(f"{_start(entries[place].instruction)} {label}", texts))
    return pages.section(
        "Evaluation entries with a near-twin in training",
        *items,
        note=_how_many(len(leaks), MOST_LEAKS, "most alike first"),
    )


def _groups(quality: Quality) -> str:
    """The largest groups, each in a few of its entries."""
    sizes = np.bincount(quality.groups)
    order = np.argsort(-sizes, kind="stable")
    large = [int(group) for group in order[: MOST_GROUPS + 1] if sizes[group] > 1][:MOST_GROUPS]
    entries, items = quality.entries, []
    for group in large:
        places = np.flatnonzero(quality.groups == group).tolist()
        texts = [
            (_name(quality, p), "given", comparison_text(entries[p]))
            for p in places[:MOST_IN_GROUP]
        ]
        count = f'<small class="num">{len(places):,} entries</small>'
        items.append(_details(f"{_start(entries[places[0]].instruction)} {count}", texts))
    return pages.section(
        "Groups of near-twins",
        *items,
        note=_how_many(int((sizes > 1).sum()), MOST_GROUPS, "the largest first")
        + ". A group is all that a chain of twins connects. Short questions of one form, such as "
        "symbols of two elements, are alike and still ask for different things.",
    )


def _lengths(quality: Quality) -> str:
    entries = quality.entries
    parts = {"Prompt": quality.prompts, "Answer": quality.answers}
    head = ["Characters", *quality.prompts.quantiles]
    rows = [
        (name, *(f"{value:,}" for value in found.quantiles.values()))
        for name, found in parts.items()
    ]
    texts = {"Prompt": map(comparison_text, entries), "Answer": (entry.output for entry in entries)}
    charts = [
        bar_chart(f"{name} lengths", _length_bars(texts[name]), "characters, up to")
        for name in parts
    ]
    far = [
        f"<h3>{name}s far out</h3>{_outliers(quality, found.short + found.long)}"
        for name, found in parts.items()
        if found.short or found.long
    ]
    return pages.section(
        "Lengths",
        f'<div class="charts">{"".join(charts)}</div>',
        pages.plain_table(head, rows),
        *far,
        note=f"Far out is more than {FENCE:g} interquartile ranges beyond the quartiles of the "
        "logarithm; worth a look, not wrong for that.",
    )


def _length_bars(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Counts of lengths up to 2, 4, 8, …, from the shortest on; at most `BARS`."""
    powers = [max(len(text) - 1, 1).bit_length() for text in texts]
    first = max(min(powers), max(powers) - BARS + 1)
    counts = np.bincount([max(power, first) for power in powers], minlength=first + 1)
    return [(f"{2**power:,}", int(counts[power])) for power in range(first, len(counts))]


def _scripts(quality: Quality) -> str:
    scripts = quality.scripts
    rows = [(name.title(), f"{count:,}") for name, count in scripts.counts.items()]
    others = _outliers(quality, scripts.others) if scripts.others else ""
    return pages.section(
        "Scripts",
        pages.plain_table(["Most letters are", "Entries"], rows),
        f"<h3>In another script than most</h3>{others}" if others else "",
        note="Counted by letters of prompt and answer. A script is no language: Latin holds "
        f"English and German alike. “{NO_LETTERS.capitalize()}” are numbers and signs alone.",
    )


def _outliers(quality: Quality, places: Sequence[int]) -> str:
    entries = quality.entries
    items = []
    for place in places[:MOST_OUTLIERS]:
        entry, prompt = entries[place], comparison_text(entries[place])
        sizes = f"{len(prompt):,} and {len(entry.output):,} characters"
        texts = [(_name(quality, place), "given", prompt), ("its answer", "judge", entry.output)]
        label = f'{_start(entry.instruction)} <small class="num">{sizes}</small>'
        items.append(_details(label, texts))
    note = _how_many(len(places), MOST_OUTLIERS, "in the order of the data")
    return f'<p class="note">{note}</p>{"".join(items)}'


def _details(summary: str, texts: Sequence[tuple[str, str, str]]) -> str:
    """A line that opens; `summary` is HTML, the texts (label, class, text) are not."""
    items = "".join(
        f'<dt>{escape(label)}</dt><dd class="{kind}">{_shorten(text)}</dd>'
        for label, kind, text in texts
    )
    return f"<details><summary>{summary}</summary><dl>{items}</dl></details>"


def _name(quality: Quality, place: int) -> str:
    """An entry by its split and its place there."""
    split = Splits._fields[quality.split_of[place]]
    return f"{TITLES[split].lower()} {place - int(quality.places(split)[0])}"


def _start(text: str) -> str:
    return escape(text[:120] + "…" * (len(text) > 120))


def _shorten(text: str) -> str:
    more = f" <i>… {len(text) - SHOWN:,} more characters</i>" if len(text) > SHOWN else ""
    return (escape(text[:SHOWN]) or "<i>nothing</i>") + more


def _how_many(count: int, most: int, order: str) -> str:
    return f"{count:,}, {order}" + (f"; the first {most} are shown" if count > most else "")
