"""The page of a run: what `report.collect` found, section by section, as HTML.

Every section is left out where its part of the run is missing. See `pages.py` for what keeps the
page self-contained and harmless.
"""

from __future__ import annotations

from html import escape
from typing import Any

from lightning_sft.common.pages import build_page
from lightning_sft.judging.metrics import TITLES
from lightning_sft.judging.significance import Interval
from lightning_sft.judging.summary import CONTROLS, verdict
from lightning_sft.reporting import pages
from lightning_sft.reporting.answers_table import render_table, sort_answers, table_data
from lightning_sft.reporting.charts import bar_chart, line_chart
from lightning_sft.reporting.twin_scores import twins_section

# Which columns of metrics.csv share a picture, and what they are called there.
CHARTS = {
    "Loss": {
        "train_loss": "train, each step",
        "val_loss": "validation, whole split",
        "train_eval_loss": "train, the chapter's curve",
        "val_eval_loss": "validation, the chapter's curve",
    },
    "Reward margin": {
        "reward_margin": "train, each step",
        "val_reward_margin": "validation, whole split",
    },
    "Reward accuracy": {
        "reward_accuracy": "train, each step",
        "val_reward_accuracy": "validation, whole split",
    },
    "Learning rate": {"lr": "learning rate"},
    "Throughput": {"tokens_per_second": "tokens per second"},
}


def render(found: dict[str, Any], picture: str | None = None) -> str:
    """The page of what `collect` found.

    Args:
        picture: The run's loss-curve.png as a data URI; shown where there are no metrics to draw.
    """
    title = f"{found['run']} — run report"
    metrics = {name: Interval(**figures) for name, figures in found["metrics"].items()}
    answers = sort_answers(found["answers"])
    charts = []
    for name, columns in CHARTS.items():
        lines = {label: found["training"].get(column, []) for column, label in columns.items()}
        charts.append(line_chart(name, lines, "optimizer step", from_zero=name == "Throughput"))
    if picture and not charts[0]:
        shot = f'<img alt="Loss over training" src="{picture}">'
        charts[0] = f'<figure class="shot"><figcaption>Loss</figcaption>{shot}</figure>'
    body = [
        f"<header><h1>{escape(found['run'])}</h1>"
        f'<p class="sub">Run report, written {escape(found["written"])}</p></header>',
        *(f'<p class="warning">{escape(note)}</p>' for note in found["notes"]),
        _cards(found, metrics),
        pages.section("Training", f'<div class="charts">{"".join(charts)}</div>' * any(charts)),
        _scores_section(found["scores"]),
        pages.section(
            "Metrics without a judge",
            pages.metrics_table(metrics),
            note="From 0 to 100, against the wanted answer. They count shared words and "
            "characters, not meaning.",
        ),
        twins_section(found["near_twins"]),
        _benchmarks_section(found.get("evaluation", [])),
        _samples_section(found["samples"]),
        pages.section("Answers", render_table(answers) if answers else ""),
        _origin_section(found),
    ]
    return build_page(title, "".join(body), pages.SCRIPT, table_data(answers) if answers else None)


def _cards(found: dict[str, Any], metrics: dict[str, Interval]) -> str:
    scores, training, cards = found["scores"], found["training"], []
    if scores and scores["scored"]:
        low, high = scores["interval"]
        note = f"95 % interval {low:.1f} to {high:.1f}; {scores['scored']} of {scores['count']}"
        note += "; the judge is not informative" * (scores["informative"] is False)
        cards.append(pages.card("Average score", f"{scores['average']:.2f}", note))
    for column, label in (
        ("val_loss", "Validation loss"),
        ("val_perplexity", "Perplexity"),
        ("val_reward_accuracy", "Reward accuracy"),
    ):
        if training.get(column):
            step, value = training[column][-1]
            cards.append(pages.card(label, f"{value:.3f}", f"at step {step:,.0f}"))
    for name in ("rouge_l", "chrf"):
        if name in metrics:
            low, high = metrics[name].low, metrics[name].high
            note = f"95 % interval {low:.1f} to {high:.1f}"
            cards.append(pages.card(TITLES[name], f"{metrics[name].mean:.1f}", note))
    if training.get("tokens_seen"):
        cards.append(pages.card("Tokens seen", f"{training['tokens_seen'][-1][1]:,.0f}"))
    return f'<ul class="cards">{"".join(cards)}</ul>' if cards else ""


def _scores_section(scores: dict[str, Any] | None) -> str:
    if not scores:
        return ""
    judge, low = scores["judge"], scores["scale"][0]
    bars = [(str(part["low"]), part["count"]) for part in scores["distribution"]]
    wide = scores["distribution"][0]["high"] - low + 1
    unit = "score" if wide == 1 else f"score, from this to the next {wide}"
    rows = [
        ("Scored", f"{scores['scored']} of {scores['count']}"),
        ("Average", pages.number(scores["average"])),
        (f"Average with failures as {low}", pages.number(scores["average_failures_low"])),
        ("Empty answers, lowest score by rule", str(scores["empty"])),
    ]
    rows += [(f"Not scored: {why}", str(count)) for why, count in scores["failures"].items()]
    if scores["self_agreement"]:
        rows.append(("Same score when asked again", f"{scores['self_agreement']['same']:.0%}"))
    told_apart = {True: "yes", False: "NO", None: "–"}
    controls = [
        (CONTROLS[kind], pages.number(c["mean"]), str(c["count"]), told_apart[c["apart"]])
        for kind, c in scores["controls"].items()
    ]
    trust = "" if scores["informative"] else ' class="warning"'
    return pages.section(
        "Scores by the judge",
        f"<p{trust}>{escape(verdict(scores))}</p>",
        f'<div class="charts">{bar_chart("Distribution", bars, unit)}'
        f"<div>{pages.plain_table(['', 'Figure'], rows)}</div></div>",
        "<h3>Controls</h3>" * bool(controls),
        pages.plain_table(["Answer given to the judge", "Mean", "Scored", "Told apart"], controls)
        if controls
        else "",
        note=f"{judge['model']} ({judge['protocol']}, {judge['url']}), prompt {scores['prompt']}, "
        f"scale {scores['scale'][0]} to {scores['scale'][1]}",
    )


def _benchmarks_section(rows: list[dict[str, Any]]) -> str:
    """What `evaluate` measured with lm-eval."""
    if not rows:
        return ""
    table = []
    for row in rows:
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        chat = "chat template" if row.get("chat_template") else "plain text"
        asked = f"{row['samples']} questions, {row['shots']} shots, {chat}"
        table.append((row["task"], row["metric"], f"{row['value']:.4f}{error}", asked))
    models = ", ".join(sorted({str(row.get("model", "?")) for row in rows}))
    return pages.section(
        "Benchmarks",
        pages.plain_table(["Task", "Metric", "Figure", "Asked"], table),
        note=f"lm-eval on {models}; ± is the standard error.",
    )


def _samples_section(samples: list[dict[str, Any]]) -> str:
    """The answers of each epoch, under the entry they belong to."""
    entries: dict[tuple[str, str], list[str]] = {}
    for sample in samples:
        key = (str(sample.get("instruction", "")), str(sample.get("input", "")))
        where = f"epoch {sample.get('epoch', '?')}, step {sample.get('step', '?')}"
        answer = escape(str(sample.get("response", "")))
        entries.setdefault(key, []).append(f"<li><b>{escape(where)}</b>{answer}</li>")
    blocks = [
        f"<h3>{escape(instruction)}</h3>"
        + (f'<p class="input">{escape(given)}</p>' if given else "")
        + f'<ol class="samples">{"".join(items)}</ol>'
        for (instruction, given), items in entries.items()
    ]
    return pages.section("Samples over the epochs", *blocks)


def _origin_section(found: dict[str, Any]) -> str:
    versions, source = found["versions"], "at the time of the run"
    if not isinstance(versions, dict) or not versions:
        versions, source = found["versions_here"], "on the machine that wrote this report"
    rows = [(str(name), str(version)) for name, version in versions.items()]
    config = ""
    if found["config"]:
        config = f"<details><summary>Config</summary><pre>{escape(found['config'])}</pre></details>"
    table = pages.plain_table(["Package", "Version"], rows)
    return pages.section(
        "Where it comes from",
        config,
        f"<details><summary>Versions {source}</summary>{table}</details>",
    )
