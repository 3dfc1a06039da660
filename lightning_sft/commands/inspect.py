"""`inspect`: what the model will see, before any of it is trained on.

Reads the data that a config names as `fit` does, and says how many tokens are supervised, cut or
left out, which prompts occur twice or in two splits, how much of a batch is padding, and how many
steps an epoch has. `--entries` shows single entries with their supervised tokens marked, `--html`
writes them as a page, `--fix` writes clean splits.

    python -m lightning_sft inspect --config gpt2-medium.yaml --entries 0,5

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_sft.commands.inspect_entries import find_rows, parse_places, show_entries, write_page
from lightning_sft.common.arguments import PROGRAM, drop_options, read_layers
from lightning_sft.common.errors import IncompleteError, InputError
from lightning_sft.common.parser_messages import explain, option_names
from lightning_sft.data.config import DataConfig, describe_skipped
from lightning_sft.data.counting import (
    SplitCounts,
    count_epoch_steps,
    count_run_steps,
    count_split,
    limit_batches,
    measure_batch,
)
from lightning_sft.data.encoding import check_style
from lightning_sft.data.entries import Splits
from lightning_sft.data.faults import (
    SplitTexts,
    find_faults,
    find_headers,
    read_texts,
    write_clean,
)
from lightning_sft.data.find_tokenizer import tokenizer_of_model
from lightning_sft.data.mixture import describe_mixture
from lightning_sft.data.order import BatchOrder, row_places
from lightning_sft.data.ordering import make_order, plan_mixture
from lightning_sft.data.rows import TokenRows
from lightning_sft.data.split_rows import take_rows, tokenize_split
from lightning_sft.data.template import bind_style

SUMMARY = "show what the model will see of the data"
MODEL_KEYS = ("architecture", "weights", "tokenizer")
SHOWN_ON_PAGE = 20  # entries, where nobody says how many
BARS = 12  # of the histogram
BAR_WIDTH = 40


def inspect(arguments: list[str]) -> int:
    """Print what the data holds.

    Args:
        arguments: The command line behind `inspect`.

    Returns:
        0; with `--strict` there is an error instead where there are findings.

    Raises:
        InputError: The command line, a config or the data is wrong.
        IncompleteError: `--strict`, and there are findings.
    """
    config, options = _parse(arguments)
    tokenizer = tokenizer_of_model({key: options.model[key] for key in MODEL_KEYS})
    style = bind_style(config.style(), tokenizer)
    if config.format == "preference":
        raise InputError(
            "inspect: counts no preferences; fit says how many pairs and tokens there are, and "
            "data.format: instruction counts the outputs beside them"
        )
    check_style(style, tokenizer)
    data = config.read()
    splits = data.splits
    rows = {
        name: tokenize_split(entries, config, style, tokenizer, f"{name} split")
        for name, entries in zip(Splits._fields, splits, strict=True)
    }
    if options.entries or options.show or options.html:
        shown, count = rows[options.split], len(splits._asdict()[options.split])
        first = range(min(options.show or SHOWN_ON_PAGE, count))
        places = parse_places(options.entries) if options.entries else first
        found = find_rows(places, options.split, shown)
        if options.html:
            write_page(Path(options.html).expanduser(), found, options.split, config, tokenizer)
            print(f"{len(found)} rows of {options.split} written to {options.html}")
        else:
            show_entries(found, options.split, config, tokenizer)
        return 0
    counts = {name: count_split(part, config, style, tokenizer) for name, part in rows.items()}
    texts = read_texts(splits, find_headers(config.style()))
    _print_table(config, counts, texts)
    for line in [*data.notes, *describe_skipped(data.skipped)]:
        print(line)
    _print_lengths(rows["train"].lengths)
    findings = find_faults(texts, counts, config)
    try:
        for name, part in rows.items():
            trained, _ = take_rows(part, config, style, tokenizer, f"{name} split")
            if name == "train":
                print(_describe_batches(trained, config, options, data.counts))
    except InputError as error:
        findings.append(f"fit refuses this: {error}")
    for finding in findings:
        print(f"finding: {finding}")
    if options.fix:
        write_clean(Path(options.fix).expanduser(), splits)
    if options.strict and findings:
        raise IncompleteError(f"inspect: {len(findings)} findings; the first: {findings[0]}")
    return 0


def _parse(arguments: list[str]) -> tuple[DataConfig, Any]:
    """The data section, and all options."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"{PROGRAM} inspect", exit_on_error=False, description=SUMMARY, default_env=False
    )
    parser.add_argument("-c", "--config", help="YAML file; several compose, as for fit")
    parser.add_argument("--entries", help="show these entries, e.g. 0,5, instead of the counts")
    parser.add_argument("--show", type=int, default=0, help="show the first N entries instead")
    parser.add_argument("--html", help="write these, or the first 20, token by token into a page")
    parser.add_argument(
        "--split", type=Literal["train", "test", "val"], default="train", help="what to show of"
    )
    parser.add_argument("--strict", action="store_true", help="exit code 4 if there are findings")
    parser.add_argument("--fix", help="write train.json, test.json and val.json without repeats")
    parser.add_argument("--seed_everything", type=bool | int, default=123, help="orders the epochs")
    # What of the trainer decides about batches and steps, in the types that the Trainer takes.
    parser.add_argument("--trainer.max_epochs", type=int | None, default=2)
    parser.add_argument("--trainer.max_steps", type=int, default=-1)
    parser.add_argument("--trainer.limit_train_batches", type=int | float | None, default=None)
    parser.add_argument("--trainer.accumulate_grad_batches", type=int, default=1)
    parser.add_argument("--trainer.devices", type=list[int] | str | int, default=1)
    parser.add_class_arguments(DataConfig, "data")
    for key in MODEL_KEYS:  # they say which tokenizer it is
        parser.add_argument(f"--model.{key}", type=Any, default=None)
    layers, rest = read_layers(arguments)
    known = option_names(parser)
    sections = ("seed_everything", "data")
    given = {name: layers[name] for name in sections if layers.get(name) is not None}
    trainer = layers.get("trainer") or {}
    given["trainer"] = {k: v for k, v in trainer.items() if f"trainer.{k}" in known}
    model = layers.get("model") or {}
    given["model"] = {key: model[key] for key in MODEL_KEYS if key in model}
    rest = drop_options(rest, known)
    try:
        settings = parser.parse_args(rest, namespace=parser.parse_object(given))
    except ArgumentError as error:
        raise InputError(f"inspect: {explain(str(error), known)}") from None
    if settings.trainer.accumulate_grad_batches < 1:
        raise InputError("trainer.accumulate_grad_batches must be >= 1")
    return parser.instantiate(settings).data, settings


def count_devices(devices: list[int] | str | int) -> int:
    """How many share a batch. What only torch could say, such as `auto`, counts as one."""
    if isinstance(devices, list):
        return max(len(devices), 1)
    if isinstance(devices, str) and "," in devices:  # their numbers, as in 0,2
        return len([number for number in devices.split(",") if number.strip()])
    return max(int(devices), 1) if str(devices).isdecimal() else 1


def _print_table(config: DataConfig, counts: dict[str, SplitCounts], texts: SplitTexts) -> None:
    style = config.style()
    header = "in the prompt" if config.header_in_prompt else "written by the model"
    loss = "the answer" if config.mask_prompt else "prompt and answer"
    paths = ", ".join(source.path for source in config.sources())
    print(f"{paths}\nprompt style {style.name}, header {header}, loss on {loss}\n")
    leaks = texts.leaks()
    is_cut, is_dropped = config.overlong == "truncate", config.overlong == "drop"
    has_more = any(c.rows != c.entries for c in counts.values())
    lines: list[tuple[str, Callable[[str, SplitCounts], int]]] = [
        ("entries", lambda name, c: c.entries),
        *([("rows", lambda name, c: c.rows)] if has_more else []),
        ("tokens", lambda name, c: c.tokens),
        ("supervised tokens", lambda name, c: c.supervised),
        ("longest row", lambda name, c: c.longest),
        (f"over {config.max_length} tokens", lambda name, c: len(c.overlong)),
        ("  truncated", lambda name, c: len(c.overlong) * is_cut),
        ("  dropped", lambda name, c: len(c.overlong) * is_dropped),
        ("without end-of-text", lambda name, c: len(c.overlong) * is_cut),
        ("without answer", lambda name, c: len(c.answerless)),
        ("without target", lambda name, c: len(c.without_target)),
        ("repeated prompts", lambda name, c: len(texts.repeats(name))),
        ("prompts also in train", lambda name, c: len(leaks.get((name, "train"), []))),
        ("prompts also in test", lambda name, c: len(leaks.get((name, "test"), []))),
        ("texts with a header", lambda name, c: len(texts.with_header[name])),
    ]
    table = [
        (label, [f"{value(name, c):,}" for name, c in counts.items()]) for label, value in lines
    ]
    # Of millions of entries the tokens take more room than a column has.
    width = max(10, *(len(cell) + 2 for _, cells in table for cell in cells))
    for label, cells in [("", list(counts)), *table]:
        print(f"{label:<24}" + "".join(f"{cell:>{width}}" for cell in cells))
    total = len(texts.repeats(*Splits._fields))
    print(f"\n{total} repeated instruction-input pairs in all three together")


def _print_lengths(lengths: npt.NDArray[np.int64]) -> None:
    print("\ntokens of a training row")
    low = int(lengths.min())
    width = -(-(int(lengths.max()) + 1 - low) // BARS)
    bins = np.bincount((lengths - low) // width)
    for place, number in enumerate(bins.tolist()):
        bar = "#" * -(-number * BAR_WIDTH // int(bins.max()))
        begin = low + place * width
        print(f"{begin:>6}-{begin + width - 1:<6}{number:>8,}  {bar}".rstrip())


def _describe_batches(
    rows: TokenRows, config: DataConfig, options: Any, counts: Sequence[int]
) -> str:
    """Steps and padding of the first epoch.

    Args:
        counts: Training entries of each file of a mixture.

    Raises:
        InputError: The rows do not fill one batch.
    """
    trainer, devices = options.trainer, count_devices(options.trainer.devices)
    stretches = plan_mixture(rows, config, counts)
    order = make_order(rows, config, int(options.seed_everything), devices, stretches)
    size = config.batch_size * devices
    what = f"of {size}" if config.max_tokens is None else f"of at most {config.max_tokens} tokens"
    batches = limit_batches(len(order), trainer.limit_train_batches)
    accumulate = trainer.accumulate_grad_batches
    steps = count_run_steps(batches, accumulate, trainer.max_epochs, trainer.max_steps)
    lines = [
        f"\nbatches {what}: {batches} an epoch, {count_epoch_steps(batches, accumulate)} "
        f"optimizer steps an epoch"
        + (f", {steps} in {_describe_end(trainer)}" if steps is not None else "")
    ]
    left_out = order.num_rows % size if isinstance(order, BatchOrder) else 0
    if config.drop_last and left_out:
        lines.append(f"drop_last leaves out {left_out} rows of each epoch, others each time")
    if config.mixture:
        lengths = rows.lengths.clip(max=config.max_length)
        lines += describe_mixture(config.sources(), stretches, lengths)
    padded = free = tree = 0
    # Each device pads its own share of a batch.
    for share in (share for batch in order.plan(epoch=0)[:batches] for share in batch):
        part = [rows[place].ids[: config.max_length] for place in row_places(share)]
        padded += measure_batch(part).tokens
        free += measure_batch(part, padding_free=True).tokens
        tree += measure_batch(part, share_prefix=True).tokens
    return "\n".join(
        [
            *lines,
            f"padding: {1 - free / padded:.1%} of {padded:,} tokens in the first epoch; "
            f"padding_free computes {free:,}, share_prefix {tree:,} "
            f"({1 - tree / padded:.1%} fewer than padded)\n",
        ]
    )


def _describe_end(trainer: Any) -> str:
    """Which limit ends the run, for a count of its steps."""
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return "all"
    return f"{trainer.max_epochs} epochs" + (" at most" if trainer.max_steps >= 0 else "")
