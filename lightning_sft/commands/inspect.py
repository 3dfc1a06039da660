"""`inspect`: what the model will see, before any of it is trained on.

Reads the data that a config names as `fit` does, and says how many tokens are supervised, cut or
left out, which prompts occur twice or in two splits, how much of a batch is padding, and how many
steps an epoch has. `--entries` shows single entries with their supervised tokens marked, `--fix`
writes clean splits.

    python -m lightning_sft inspect --config gpt2-medium.yaml --entries 0,5

This module does not import torch: the order of an epoch comes from `numpy`'s copy of the same
random number generator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_sft.common.arguments import PROGRAM, drop_options, read_layers
from lightning_sft.common.errors import IncompleteError, InputError
from lightning_sft.common.parser_messages import explain, option_names
from lightning_sft.data.config import DataConfig
from lightning_sft.data.entries import Splits
from lightning_sft.data.faults import (
    Counts,
    count,
    find_faults,
    find_headers,
    find_leaks,
    is_known,
    kept,
    write_clean,
)
from lightning_sft.data.order import count_tree, epoch_order
from lightning_sft.data.prompts import get_style
from lightning_sft.data.rows import Row, TokenRows, tokenize_entries
from lightning_sft.data.tokenizer import Tokenizer, gpt2_tokenizer

SUMMARY = "show what the model will see of the data"
BARS = 12  # of the histogram
BAR_WIDTH = 40


@dataclass(frozen=True)
class Schedule:
    """What cuts an epoch into steps."""

    seed: int
    max_epochs: int
    accumulate: int
    devices: int

    @classmethod
    def of(cls, settings: Any) -> Schedule:
        """From parsed options. `devices: auto` counts as one: to know it would take torch."""
        trainer = settings.trainer
        devices = trainer.devices
        if isinstance(devices, list):
            devices = len(devices)
        devices = int(devices) if str(devices).isdigit() else 1
        if trainer.accumulate_grad_batches < 1:
            raise InputError("trainer.accumulate_grad_batches must be >= 1")
        epochs, accumulate = trainer.max_epochs, trainer.accumulate_grad_batches
        return cls(settings.seed_everything, max(epochs, 1), accumulate, max(devices, 1))


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
    data, schedule, options = _parse(arguments)
    style = get_style(data.prompt_style, data.header_in_prompt)
    tokenizer = gpt2_tokenizer()
    splits = data.read_splits()
    rows = {
        name: tokenize_entries(entries, style, tokenizer)
        for name, entries in zip(Splits._fields, splits, strict=True)
    }
    if options.entries or options.show:
        show_entries(options, rows[options.split], data, tokenizer)
        return 0
    headers = find_headers(style)
    counts = {
        name: count(getattr(splits, name), rows[name], data, headers) for name in Splits._fields
    }
    findings = find_faults(splits, counts, data)
    _print_table(data, style.name, counts, splits)
    _print_lengths(rows["train"].lengths)
    findings += _print_batches(kept(rows["train"], data), data, schedule)
    for finding in findings:
        print(f"finding: {finding}")
    if options.fix:
        write_clean(Path(options.fix).expanduser(), splits)
    if options.strict and findings:
        raise IncompleteError(f"inspect: {len(findings)} findings; the first: {findings[0]}")
    return 0


def _parse(arguments: list[str]) -> tuple[DataConfig, Schedule, Any]:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"{PROGRAM} inspect", exit_on_error=False, description=SUMMARY, default_env=False
    )
    parser.add_argument("-c", "--config", help="YAML file; several compose, as for fit")
    parser.add_argument("--entries", help="show these entries, e.g. 0,5, instead of the counts")
    parser.add_argument("--show", type=int, default=0, help="show the first N entries instead")
    parser.add_argument(
        "--split", type=Literal["train", "test", "val"], default="train", help="what to show of"
    )
    parser.add_argument("--strict", action="store_true", help="exit code 4 if there are findings")
    parser.add_argument("--fix", help="write train.json, test.json and val.json without repeats")
    parser.add_argument("--seed_everything", type=int, default=123, help="orders the epochs")
    parser.add_argument("--trainer.max_epochs", type=int, default=2)
    parser.add_argument("--trainer.accumulate_grad_batches", type=int, default=1)
    parser.add_argument("--trainer.devices", type=int | str | list[int], default=1)
    parser.add_class_arguments(DataConfig, "data")
    layers, rest = read_layers(arguments)
    known = option_names(parser)
    config = {name: layers[name] for name in ("seed_everything", "data") if layers.get(name)}
    trainer = layers.get("trainer") or {}
    config["trainer"] = {k: v for k, v in trainer.items() if f"trainer.{k}" in known}
    rest = drop_options(rest, known)
    try:
        settings = parser.parse_args(rest, namespace=parser.parse_object(config))
    except ArgumentError as error:
        raise InputError(f"inspect: {explain(str(error), known)}") from None
    data = parser.instantiate_classes(settings).data
    return data, Schedule.of(settings), settings


def cut_batches(rows: TokenRows, data: DataConfig, schedule: Schedule) -> list[list[int]]:
    """The first epoch's batches, all devices' together, as places of rows."""
    order = epoch_order(len(rows), schedule.seed, 0)
    size = data.batch_size * schedule.devices
    if data.drop_last:
        order = order[: len(order) // size * size]
    if data.group_by_length:  # sorted within windows of 50 batches, as the loader does
        lengths, window = rows.lengths, 50 * size
        windows = [order[k : k + window] for k in range(0, len(order), window)]
        order = [p for part in windows for p in sorted(part, key=lambda place: int(lengths[place]))]
    return [order[k : k + size] for k in range(0, len(order), size)]


def show_entries(options: Any, rows: TokenRows, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Print entries as text and as ids, the supervised tokens marked.

    Colour on a terminal, double brackets elsewhere.
    """
    places = list(range(min(options.show, len(rows))))
    if options.entries:
        try:
            places = [int(place) for place in options.entries.split(",")]
        except ValueError:
            raise InputError(f"entries: {options.entries!r} is not a list such as 0,5") from None
    for place in places:
        if not 0 <= place < len(rows):
            raise InputError(
                f"entries: {options.split} has entries 0 to {len(rows) - 1}, not {place}"
            )
        print("\n".join(_describe(rows[place], options.split, data, tokenizer)))


def _describe(row: Row, split: str, data: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    ids = [*map(int, row.ids), tokenizer.eos_token_id]
    seen = ids[: data.max_length + 1]
    # A row's first token is predicted from nothing, so it is never a target.
    first = max(row.prompt_length, 1) if data.mask_prompt else 1
    texts = [_printable(tokenizer.decode(part)) for part in (seen[:first], seen[first:])]
    yield (
        f"{split} entry {row.index}: {row.prompt_length} prompt and "
        f"{len(row.ids) - row.prompt_length} answer tokens, {max(len(seen) - first, 0)} supervised"
        + (f", {len(ids) - len(seen)} cut off" if len(ids) > len(seen) else "")
    )
    yield texts[0] + _marked(texts[1])
    yield " ".join(map(str, seen[:first])) + " " + _marked(" ".join(map(str, seen[first:])))
    yield ""


def _marked(text: str) -> str:
    if not text:
        return ""
    return f"\x1b[32m{text}\x1b[0m" if sys.stdout.isatty() else f"[[{text}]]"


def _printable(text: str) -> str:
    """Control characters spelled out: data must not steer the terminal it is shown on."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _print_table(data: DataConfig, style: str, counts: dict[str, Counts], splits: Splits) -> None:
    header = "in the prompt" if data.header_in_prompt else "written by the model"
    loss = "the answer" if data.mask_prompt else "prompt and answer"
    print(f"{data.path}\nprompt style {style}, header {header}, loss on {loss}\n")
    leaks = find_leaks(splits)
    is_cut, is_dropped = data.overlong == "truncate", data.overlong == "drop"
    lines: list[tuple[str, Callable[[str, Counts], int]]] = [
        ("entries", lambda name, c: c.entries),
        ("tokens", lambda name, c: c.tokens),
        ("supervised tokens", lambda name, c: c.supervised),
        ("longest row", lambda name, c: c.longest),
        (f"over {data.max_length} tokens", lambda name, c: len(c.overlong)),
        ("  truncated", lambda name, c: len(c.overlong) * is_cut),
        ("  dropped", lambda name, c: len(c.overlong) * is_dropped),
        ("without end-of-text", lambda name, c: len(c.overlong) * is_cut),
        ("without target", lambda name, c: len(c.without_target)),
        ("repeated prompts", lambda name, c: len(c.repeated)),
        ("prompts also in train", lambda name, c: len(leaks.get((name, "train"), []))),
        ("prompts also in test", lambda name, c: len(leaks.get((name, "test"), []))),
        ("texts with a header", lambda name, c: len(c.headers)),
    ]
    print(f"{'':<24}" + "".join(f"{name:>10}" for name in counts))
    for label, value in lines:
        print(f"{label:<24}" + "".join(f"{value(name, c):>10,}" for name, c in counts.items()))
    seen: set[tuple[str, str]] = set()
    total = sum(is_known(entry, seen) for part in splits for entry in part)
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


def _print_batches(rows: TokenRows, data: DataConfig, schedule: Schedule) -> list[str]:
    """Print steps and padding of the first epoch; returns what is wrong with its batches."""
    ids = [list(map(int, row.ids[: data.max_length])) for row in rows]
    batches = [[ids[place] for place in batch] for batch in cut_batches(rows, data, schedule)]
    steps = -(-len(batches) // schedule.accumulate)
    size = data.batch_size * schedule.devices
    print(
        f"\nbatches of {size}: {len(batches)} an epoch, {steps} optimizer steps an epoch, "
        f"{steps * schedule.max_epochs} in {schedule.max_epochs} epochs"
    )
    if not batches:
        return [f"{len(rows)} training rows do not fill one batch of {size}, which fit refuses"]
    if left_out := len(rows) - sum(map(len, batches)):
        print(f"drop_last leaves out {left_out} rows of each epoch, others each time")
    # Each device pads its own share of a batch.
    parts = [
        batch[k : k + data.batch_size]
        for batch in batches
        for k in range(0, len(batch), data.batch_size)
    ]
    real = sum(len(row) for part in parts for row in part)
    padded = sum(len(part) * max(map(len, part)) for part in parts)
    tree = sum(map(count_tree, parts))
    print(
        f"padding: {1 - real / padded:.1%} of {padded:,} tokens in the first epoch; padding_free "
        f"computes {real:,}, share_prefix {tree:,} ({1 - tree / padded:.1%} fewer than padded)\n"
    )
    return []
