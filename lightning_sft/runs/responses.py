"""The answers a model gave: `Response` objects ↔ `instruction-data-with-response.json`.

A responses file is the chapter's: a list of objects with `instruction`, `input`, `output` and
`model_response`. `predict` writes it; `score`, `compare` and `report` all read it here, so all
refuse the same things.

    >>> responses = read_responses("runs/gpt2-medium/version_0")

Source: section 7.7 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lightning_sft.common import files
from lightning_sft.common.config_files import read_config
from lightning_sft.common.errors import InputError
from lightning_sft.data.config import describe_skipped
from lightning_sft.data.entries import Entry, read_entries
from lightning_sft.data.records import read_records

RESPONSES_NAME = "instruction-data-with-response.json"


@dataclass(frozen=True, slots=True)
class Response:
    """What a model answered to an entry. `text` may be empty."""

    entry: Entry
    text: str


def responses_path(path: str | Path) -> Path:
    """The responses file itself, where `path` may also be the run folder that holds it."""
    path = Path(path).expanduser()
    return path / RESPONSES_NAME if path.is_dir() else path


def as_list(paths: Path | list[Path] | None) -> list[Path]:
    """What an option that takes one file or several was given."""
    if paths is None:
        return []
    return list(paths) if isinstance(paths, list) else [paths]


def write_responses(path: str | Path, responses: Iterable[Response]) -> None:
    """Write a responses file, whole or not at all, to the byte as the chapter's code would.

    Raises:
        ServiceError: The disk is full, or the folder cannot be written.
    """
    records = [asdict(r.entry) | {"model_response": r.text} for r in responses]
    with files.atomic_write(path) as file:
        json.dump(records, file, indent=4)  # é as \u00e9, which is json's default


def read_responses(
    path: str | Path,
    key: str = "model_response",
    empty_output: Literal["error", "skip"] | None = None,
) -> list[Response]:
    """Read and check a responses file or the one in a run folder.

    Args:
        key: Field that holds the answer, for example `model 1 response`.
        empty_output: Whether an entry without a wanted answer is refused or left out, which is
            printed. By default as `data.empty_output` says in the `config.yaml` beside the file.

    Raises:
        InputError: The file is missing or malformed, an entry lacks its wanted output or answer
            (names the entry), or one entry occurs twice.
    """
    path = responses_path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; `lightning_sft predict` writes responses")
    entries = read_entries(path, require_output=False)
    records = read_records(path)
    responses = []
    skipped = []
    empty_output = empty_output or _empty_output_of_run(path.parent)
    first_seen: dict[Response, int] = {}
    for index, (entry, record) in enumerate(zip(entries, records, strict=True)):
        where = f"{path}: entry {index}"
        if not entry.output.strip():
            if empty_output == "skip":
                skipped.append(index)
                continue
            raise InputError(f"{where}: 'output' is blank; a score needs the wanted answer")
        if key not in record:
            raise InputError(
                f"{where}: {key!r} is missing (it has {', '.join(map(repr, record))}); "
                "name the field of the answers with --response_key"
            )
        text = record[key]
        if not isinstance(text, str):
            raise InputError(f"{where}: {key!r} is {text!r:.40}; it must be text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{where}: {key!r} has a lone surrogate; save it as UTF-8") from None
        response = Response(entry, text)
        # The same instruction may well be asked twice with other wanted answers, as in the
        # chapter's test set. A whole entry twice is what a distributed sampler's padding leaves.
        if response in first_seen:
            raise InputError(f"{where}: repeats entry {first_seen[response]}; keep it once")
        first_seen[response] = index
        responses.append(response)
    if not responses:
        raise InputError(f"{path}: the 'output' of every entry is blank; a score needs it")
    for line in describe_skipped({str(path): skipped}):
        print(line)
    return responses


def _empty_output_of_run(folder: Path) -> Literal["error", "skip"]:
    """`data.empty_output` of the run that a folder holds; `error` where it says nothing."""
    try:
        data = read_config(folder / "config.yaml")["data"]
        return "skip" if data["empty_output"] == "skip" else "error"
    except (InputError, OSError, KeyError, TypeError):
        return "error"
