"""Which shape the records of a file have, and what the file calls their fields.

| format | a record |
|---|---|
| `instruction` | `instruction`, perhaps `input`, `output`: the chapter's and Alpaca's |
| `messages` | `messages`: a list of `role` and `content`, as OpenAI and Hugging Face have it |
| `sharegpt` | `conversations`: a list of `from` and `value` |
| `prompt_completion` | `prompt` and `completion`, texts or lists of messages |
| `preference` | `chosen` and `rejected` answers to a `prompt` or an instruction |

    >>> recognise([{"prompt": "1 + 1?", "completion": "2"}])
    'prompt_completion'

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_sft.common.arguments import nearest
from lightning_sft.common.errors import InputError

Format = Literal["auto", "instruction", "messages", "sharegpt", "prompt_completion", "preference"]
FORMATS: tuple[str, ...] = get_args(Format)
# The fields of a record and, behind them, of each message in it.
FIELDS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "output"),
    "messages": ("messages", "role", "content"),
    "sharegpt": ("conversations", "from", "value"),
    "prompt_completion": ("prompt", "completion", "role", "content"),
    "preference": (
        "prompt", "chosen", "rejected", "instruction", "input", "output", "role", "content",
    ),
}  # fmt: skip


def recognise(records: Iterable[Any], field_names: Mapping[str, str] | None = None) -> str:
    """The format of a file's records, by what its first object holds.

    Args:
        field_names: The file's names; the fields that it renames say which format is meant.
    """
    record = next((record for record in records if isinstance(record, dict)), {})
    # Under the names that the formats have for them.
    renamed = {name: field for field, name in (field_names or {}).items()}
    held = {renamed.get(key, key): value for key, value in record.items()}
    keys = held.keys()
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if {"instruction", "output"} <= keys:  # whatever else there is beside them
        return "instruction"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        turns = held["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else {}
        is_openai = isinstance(first, dict) and "role" in first and "from" not in first
        return "messages" if is_openai else "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    return "instruction"


def settle_names(
    format: str, records: Iterable[Any], field_names: Mapping[str, str] | None
) -> dict[str, str]:
    """The file's name of each field of a format.

    Raises:
        InputError: `field_names` has a field that the format has not.
    """
    fields = FIELDS[format]
    names = dict(zip(fields, fields, strict=True))
    for field, name in (field_names or {}).items():
        if field not in names:  # as in {context: input}, the wrong way round
            raise InputError(f"field_names: unknown field {field!r}; allowed: {', '.join(fields)}")
        names[field] = name
    # What OpenAI's fields are called in a list under ShareGPT's name.
    first = next((record for record in records if isinstance(record, dict)), {})
    if format == "messages" and names["messages"] not in first and "conversations" in first:
        names["messages"] = "conversations"
    return names


def check_input_name(records: Iterable[Any], name: str, source: Path) -> None:
    """A record may lack its input, so a misspelt name for it would empty all inputs silently.

    Raises:
        InputError: No record has a field of that name.
    """
    if name == "input":
        return
    first = None
    for record in records:
        if isinstance(record, dict):
            first = record if first is None else first
            if name in record:
                return
    if first is None:
        return
    keys = list(first)
    raise InputError(
        f"{source}: data.field_names calls the input {name!r}, which no entry has"
        f"{nearest(name, keys)}; entry 0 has {', '.join(map(repr, keys[:6])) or 'no keys'}"
    )


def describe_format(source: Path, count: int, format: str, is_told: bool) -> str:
    """One line for a person: what a file was taken for.

    Args:
        is_told: `data.format` says so; else the records did.
    """
    kinds = {".jsonl": "JSONL", ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}
    suffixes = [suffix for suffix in source.suffixes if suffix in kinds]
    kind = "a folder of tables" if source.is_dir() else kinds.get("".join(suffixes[-1:]), "JSON")
    how = "as data.format says" if is_told else "recognised by its fields"
    return f"{kind}, {count:,} records in the format {format} ({how})"
