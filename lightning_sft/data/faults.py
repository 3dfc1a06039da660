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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig, listed
from lightning_sft.data.conversation import Entry, Example, Message, as_conversation
from lightning_sft.data.counting import SplitCounts
from lightning_sft.data.entries import Splits
from lightning_sft.data.prompts import STYLES, PromptStyle


def find_repeats(entries: Sequence[Example]) -> list[int]:
    """Places of entries whose instruction and input an earlier entry has as well."""
    # Not the output: two answers to one question are still one question, asked twice.
    seen: set[tuple[str, str]] = set()
    repeats = []
    for place, entry in enumerate(entries):
        if _prompt(entry) in seen:
            repeats.append(place)
        seen.add(_prompt(entry))
    return repeats


def find_header_texts(entries: Sequence[Example], headers: Collection[str]) -> list[int]:
    """Places of entries that hold a text with a meaning in prompts, which blurs their own."""
    return [
        place
        for place, entry in enumerate(entries)
        if any(header in "\n".join(_texts(entry)) for header in headers)
    ]


def find_headers(style: PromptStyle) -> set[str]:
    """Lines that stand in the prompts of any built-in style or of `style`, whatever the entry."""
    templates = [
        template
        for known in (*STYLES.values(), style)
        for template in (known.instruction, known.input, known.header)
    ]
    # A heading alone on its line, such as "### Response:"; lines with a place for text vary.
    lines = {line.strip() for template in templates for line in template.split("\n")}
    return {line for line in lines if line and "{" not in line}


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


def find_faults(splits: Splits, counts: Mapping[str, SplitCounts], config: DataConfig) -> list[str]:
    """What someone should look at before training, one line each."""
    policy = {"truncate": "are cut", "drop": "are left out", "error": "make fit refuse the data"}
    long = f"are longer than max_length {config.max_length} and {policy[config.overlong]}"
    headers = find_headers(config.style())
    faults = []
    for name, entries in zip(Splits._fields, splits, strict=True):
        for places, what in (
            (counts[name].overlong, long),
            (counts[name].answerless, "are cut before their answer begins"),
            (counts[name].without_target, "have no target left, which fit refuses"),
            (find_repeats(entries), "repeat an earlier one's instruction and input"),
            (
                find_header_texts(entries, headers),
                "hold a prompt header such as '### Response:' in their text",
            ),
        ):
            if len(places):
                faults.append(f"{len(places)} {name} entries {what}: {listed(list(places))}")
    for (name, other), places in find_leaks(splits).items():
        if places:
            faults.append(f"{len(places)} {name} prompts are also in {other}: {listed(places)}")
    return faults


def clean(splits: Splits) -> Splits:
    """Every prompt once: in test if it is there, else in validation, else in train.

    The evaluation splits are small and keep what they have, so that scores stay comparable with
    those of the uncleaned data; what they hold leaves train, where it is missed least.
    """
    entries = [*splits.test, *splits.val, *splits.train]  # who comes first keeps the prompt
    repeats = set(find_repeats(entries))
    parts, begin = {}, 0
    for name in ("test", "val", "train"):
        end = begin + len(getattr(splits, name))
        parts[name] = [entries[place] for place in range(begin, end) if place not in repeats]
        begin = end
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
    # Written beside and renamed, so that the folder holds all three files or is not there.
    staging = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        for name, part in zip(Splits._fields, cleaned, strict=True):
            files.write_json(staging / f"{name}.json", _records(part))
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


def _records(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Entries as they are; where there is a conversation among them, all as messages."""
    if all(isinstance(example, Entry) for example in examples):
        return [asdict(example) for example in examples]
    plain = asdict(Message("", ""))  # what goes without saying
    return [
        {
            "messages": [
                {key: value for key, value in asdict(message).items() if value != plain[key]}
                for message in as_conversation(example).messages
            ]
        }
        for example in examples
    ]


def _prompt(entry: Example) -> tuple[str, str]:
    return entry.instruction, entry.input


def _texts(entry: Example) -> tuple[str, str, str]:
    return entry.instruction, entry.input, entry.output
