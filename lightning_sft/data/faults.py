"""What is wrong with a data set although every single entry is fine, and splits without it.

A prompt that is there twice counts twice, one that is in train and test makes the test easier than
it looks, and one that holds `### Response:` blurs where its answer begins.

    >>> find_leaks(splits)[("test", "train")]
    [36, 72]

This module does not import torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig
from lightning_sft.data.entries import Entry, Splits
from lightning_sft.data.prompts import STYLES, PromptStyle
from lightning_sft.data.rows import TokenRows

NAMED = 8  # entries that a finding lists before it says how many more there are


class Counts(NamedTuple):
    """What the table says of one split; lists hold the entries' places in it."""

    entries: int
    tokens: int
    supervised: int
    longest: int
    overlong: list[int]
    without_target: list[int]
    repeated: list[int]
    headers: list[int]


def count(
    entries: Sequence[Entry], rows: TokenRows, data: DataConfig, headers: Collection[str]
) -> Counts:
    """Count what training would take of a split.

    Args:
        headers: Texts that have a meaning in a prompt; an entry that holds one blurs it.
    """
    used = kept(rows, data)
    targets = rows.count_targets(data.max_length, data.mask_prompt)
    supervised = used.count_targets(data.max_length, data.mask_prompt)
    seen: set[tuple[str, str]] = set()
    repeated = [place for place, entry in enumerate(entries) if is_known(entry, seen)]
    return Counts(
        entries=len(entries),
        tokens=int(used.lengths.clip(max=data.max_length).sum()),
        supervised=int(supervised.clip(min=0).sum()),
        longest=int(rows.lengths.max()),
        overlong=np.flatnonzero(rows.lengths > data.max_length).tolist(),
        without_target=np.flatnonzero(targets <= 0).tolist(),
        repeated=repeated,
        headers=[
            place
            for place, entry in enumerate(entries)
            if any(header in "\n".join(_texts(entry)) for header in headers)
        ],
    )


def find_headers(style: PromptStyle) -> set[str]:
    """Lines that stand in the prompts of any built-in style or of `style`, whatever the entry."""
    templates = [
        template
        for known in (*STYLES.values(), style)
        for template in (known.instruction, known.input, known.header)
    ]
    lines = {line.strip() for template in templates for line in template.split("\n")}
    return {line for line in lines if line and "{" not in line}


def kept(rows: TokenRows, data: DataConfig) -> TokenRows:
    """The rows that stay in training: with `overlong: drop` the long ones do not."""
    fits = rows.lengths <= data.max_length
    return rows.select(fits) if data.overlong == "drop" and fits.any() else rows


def find_leaks(splits: Splits) -> dict[tuple[str, str], list[int]]:
    """Prompts of one split that another one holds as well.

    Returns:
        For (test, train), (val, train) and (val, test) the places in the first of the two.
    """
    prompts = {name: {_prompt(entry) for entry in getattr(splits, name)} for name in Splits._fields}
    return {
        (name, other): [
            place
            for place, entry in enumerate(getattr(splits, name))
            if _prompt(entry) in prompts[other]
        ]
        for name, other in (("test", "train"), ("val", "train"), ("val", "test"))
    }


def find_faults(splits: Splits, counts: dict[str, Counts], data: DataConfig) -> list[str]:
    """What someone should look at before training, one line each."""
    policy = {"truncate": "are cut", "drop": "are left out", "error": "make fit refuse the data"}
    faults = []
    for name, c in counts.items():
        for places, what in (
            (
                c.overlong,
                f"are longer than max_length {data.max_length} and {policy[data.overlong]}",
            ),
            (c.without_target, "have no target left, which fit refuses"),
            (c.repeated, "repeat an earlier one's instruction and input"),
            (c.headers, "hold a prompt header such as '### Response:' in their text"),
        ):
            if places:
                faults.append(f"{len(places)} {name} entries {what}: {_listed(places)}")
    for (name, other), places in find_leaks(splits).items():
        if places:
            faults.append(f"{len(places)} {name} prompts are also in {other}: {_listed(places)}")
    return faults


def clean(splits: Splits) -> Splits:
    """Every prompt once: in test if it is there, else in validation, else in train.

    The evaluation splits are small and keep what they have, so that scores stay comparable with
    those of the uncleaned data; what they hold leaves train, where it is missed least.
    """
    seen: set[tuple[str, str]] = set()
    parts = {
        name: [entry for entry in getattr(splits, name) if not is_known(entry, seen)]
        for name in ("test", "val", "train")
    }
    return Splits(**parts)


def write_clean(folder: Path, splits: Splits) -> None:
    """Write the clean splits into a new folder, all three or none, and say how to use them.

    Raises:
        InputError: The folder is there already and not empty, or a split would stay empty.
        ServiceError: The disk refused.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"fix: {folder} is already there; give a folder that does not exist yet")
    cleaned = clean(splits)
    for name, part in zip(Splits._fields, cleaned, strict=True):
        if not part:
            raise InputError(f"fix: the {name} split would stay empty; its prompts are elsewhere")
    staging = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        for name, part in zip(Splits._fields, cleaned, strict=True):
            files.write_json(staging / f"{name}.json", [asdict(entry) for entry in part])
        if folder.is_dir():
            folder.rmdir()
        staging.replace(folder)
    except OSError as error:
        raise files.disk_error(folder, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    before, after = ([len(part) for part in parts] for parts in (splits, cleaned))
    left_out = [old - new for old, new in zip(before, after, strict=True)]
    print(
        f"wrote {folder}: train {after[0]} (left out {left_out[0]}), test {after[1]} "
        f"({left_out[1]}), val {after[2]} ({left_out[2]}); to use them:\n\n"
        f"data:\n  path: {folder}/train.json\n  test_path: {folder}/test.json\n"
        f"  val_path: {folder}/val.json"
    )


def _prompt(entry: Entry) -> tuple[str, str]:
    return entry.instruction, entry.input


def _texts(entry: Entry) -> tuple[str, str, str]:
    return entry.instruction, entry.input, entry.output


def is_known(entry: Entry, seen: set[tuple[str, str]]) -> bool:
    """Whether the prompt was seen before; from now on it is."""
    known = _prompt(entry) in seen
    seen.add(_prompt(entry))
    return known


def _listed(places: list[int]) -> str:
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(map(str, places[:NAMED])) + more
