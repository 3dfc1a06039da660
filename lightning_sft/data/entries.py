"""Reading and splitting instruction data: file or URL → validated `Entry` objects.

An entry is one instruction-response pair of the chapter's file: `instruction`, an optional `input`
and the wanted `output`. Whatever is wrong with a file is said in one line that names the file, the
record and what is allowed; nothing is skipped silently.

    >>> entries = read_entries("instruction-data.json")
    >>> train, test, val = split_entries(entries)

Source: listings 7.1 (download and load) and 7.3 (partition) of "Build a Large Language Model (From
Scratch)". This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import urllib.parse
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning_sft.common import downloads, files
from lightning_sft.common.errors import KEY_SHAPE, InputError

BOOK_DATA_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/"
    "instruction-data.json"
)
# What a URL is known to hold. Only the chapter's own file is pinned.
KNOWN_SHA256 = {
    BOOK_DATA_URL: "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
}
SECRET_NAME = re.compile("key|secret|passw|signature", re.IGNORECASE)
FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True, slots=True)
class Entry:
    """One instruction-response pair. `input` may be empty; the other two say something."""

    instruction: str
    input: str
    output: str


class Splits(NamedTuple):
    """The three parts of a data set, each in file order."""

    train: list[Entry]
    test: list[Entry]
    val: list[Entry]


def read_entries(
    path: str | Path,
    *,
    field_names: Mapping[str, str] | None = None,
    require_output: bool = True,
) -> list[Entry]:
    """Read instruction data from JSON (a list of objects) or JSONL (an object per line).

    Args:
        path: A file, or an http(s) URL that is downloaded once into the cache.
        field_names: Where the file calls a field otherwise, the file's name for it, for example
            `{"input": "context", "output": "response"}` for Dolly.
        require_output: Refuse empty outputs, as training needs. Answering does not.

    Raises:
        InputError: The file is missing, empty or malformed, or a record is; names the record.
        ServiceError: The URL could not be fetched.
    """
    names = _field_names(field_names)
    source = local_path(path)
    return [
        _entry(record, names, where, require_output)
        for where, record in _located(read_records(source), source)
    ]


def split_entries(
    entries: Sequence[Entry],
    fractions: Sequence[float] = (0.85, 0.10, 0.05),
    may_be_empty: Collection[str] = (),
) -> Splits:
    """Cut entries, in file order, into train, test and validation parts.

    The first two sizes are rounded down and validation takes the rest, as in the chapter: 1,100
    entries give 935, 110 and 55.

    Args:
        fractions: Shares of train, test and validation; they sum to 1.
        may_be_empty: Splits that have a file of their own and need no share.

    Raises:
        InputError: The fractions are not three shares that sum to 1, or a split stays empty.
    """
    if len(fractions) != 3 or not all(0 < share < 1 for share in fractions):
        raise InputError(f"fractions: {list(fractions)} is not three numbers between 0 and 1")
    if not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise InputError(f"fractions: {list(fractions)} sum to {sum(fractions):g}, not to 1")
    num_train = int(len(entries) * fractions[0])
    num_test = int(len(entries) * fractions[1])
    splits = Splits(
        train=list(entries[:num_train]),
        test=list(entries[num_train : num_train + num_test]),
        val=list(entries[num_train + num_test :]),
    )
    for name, part in zip(Splits._fields, splits, strict=True):
        if not part and name not in may_be_empty:
            raise InputError(
                f"fractions: {list(fractions)} of {len(entries)} entries leave the {name} split "
                "empty; give more entries or other fractions"
            )
    return splits


def is_url(text: str | Path) -> bool:
    """Whether `text` is an http or https address rather than a path."""
    return str(text).startswith(("http://", "https://"))


def local_path(path: str | Path) -> Path:
    """The local file behind a path or URL; a URL is downloaded once into the cache.

    Raises:
        InputError: A local path is missing or not a regular file.
        ServiceError: The URL could not be fetched and is not in the cache.
    """
    if is_url(path):
        try:
            url = _without_key(str(path))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a URL ({error})") from None
        # The name alone would let two addresses that end alike share one cached file.
        address = hashlib.sha256(url.encode()).hexdigest()[:8]
        try:
            name = Path(urllib.parse.urlsplit(url).path).name or "data.json"
        except ValueError as error:
            raise InputError(f"{url}: not a URL ({error})") from None
        cached = files.cache_dir() / "data" / address / name
        return downloads.download(url, cached, sha256=KNOWN_SHA256.get(url), check=read_records)
    try:
        local = Path(path).expanduser()
        exists, is_file = local.exists(), local.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a zero byte
        raise InputError(f"{str(path)[:80]!r} is not a path ({_one_line(error)})") from None
    if not exists and (files.shipped_folder() / local).is_file() and local.name == str(local):
        return files.shipped_folder() / local
    if not exists:
        raise InputError(f"{local}: no such file; give a JSON or JSONL file, or a URL")
    if not is_file:
        raise InputError(f"{local}: not a regular file; give a JSON or JSONL file, or a URL")
    return local


def _without_key(url: str) -> str:
    """The address, if it is nothing but one: what goes into a config ends up in logs and files."""
    parts = urllib.parse.urlsplit(url)
    keys = [name for name, _ in urllib.parse.parse_qsl(parts.query) if SECRET_NAME.search(name)]
    if parts.username or parts.password or keys or KEY_SHAPE.search(url):
        address = f"{parts.hostname}{parts.path}"
        raise InputError(f"{address}: the URL holds a key or password; download the file by hand")
    return url


def read_records(path: Path) -> list[Any]:
    """Parse a JSON or JSONL file into its list of records, not yet validated.

    Which of the two it is shows in the first character: a list opens with `[`.

    Raises:
        InputError: Empty, not UTF-8 (with offset), bad syntax (with line and column), or neither a
            list nor one object per line.
    """
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold a list of entries")
    records = _parse_json(text, path) if text.lstrip()[0] == "[" else _parse_jsonl(text, path)
    if not records:
        raise InputError(f"{path}: the list is empty; it must hold at least one entry")
    return records


def _read_text(path: Path) -> str:
    try:
        # Some editors write a byte-order mark. The codec utf-8-sig would miscount offsets by it.
        return files.read_bytes(path).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not valid UTF-8; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _parse_json(text: str, path: Path) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: not usable as JSON ({_one_line(error)})") from None


def _parse_jsonl(text: str, path: Path) -> list[Any]:
    records: list[Any] = []
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            # One object spread over many lines is a JSON file of the wrong shape, not bad JSONL.
            if not records and _is_json_value(text):
                raise InputError(
                    f"{path}: the top level is one JSON value; it must be a list of entries "
                    "([{…}, …]) or one entry per line"
                ) from None
            raise InputError(
                f"{path}: line {number}, column {error.colno}: not valid JSON ({error.msg})"
            ) from None
        except (RecursionError, ValueError) as error:
            raise InputError(
                f"{path}: line {number}: not usable as JSON ({_one_line(error)})"
            ) from None
    # A lone object is JSONL of one entry only where the name says JSONL.
    if len(records) == 1 and not (isinstance(records[0], dict) and path.suffix == ".jsonl"):
        raise InputError(
            f"{path}: the top level is one {_type_name(records[0])}; it must be a list of entries "
            "([{…}, …]) or one entry per line"
        )
    return records


def _is_json_value(text: str) -> bool:
    try:
        json.loads(text)
    except (RecursionError, ValueError):
        return False
    return True


def _located(records: list[Any], path: Path) -> Iterator[tuple[str, Any]]:
    for index, record in enumerate(records):
        yield f"{path}: entry {index}", record


def _field_names(field_names: Mapping[str, str] | None) -> dict[str, str]:
    names = dict(zip(FIELDS, FIELDS, strict=True))
    for field, name in (field_names or {}).items():
        if field not in names:
            raise InputError(f"field_names: unknown field {field!r}; allowed: {', '.join(FIELDS)}")
        names[field] = name
    return names


def _entry(record: Any, names: dict[str, str], where: str, require_output: bool) -> Entry:
    if not isinstance(record, dict):
        raise InputError(f"{where}: is a {_type_name(record)}; it must be an object")
    instruction = _text(record, names["instruction"], where)
    if not instruction.strip():
        raise InputError(f"{where}: {names['instruction']!r} is blank; it must hold text")
    output_missing_is_fine = not require_output and names["output"] not in record
    output = "" if output_missing_is_fine else _text(record, names["output"], where)
    if require_output and not output.strip():
        raise InputError(f"{where}: {names['output']!r} is blank; training needs an answer")
    has_input = names["input"] in record
    return Entry(instruction, _text(record, names["input"], where) if has_input else "", output)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        present = ", ".join(repr(name) for name in list(record)[:6]) or "no keys"
        raise InputError(
            f"{where}: {key!r} is missing (it has {present}); data.field_names maps other names"
        )
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is a {_type_name(value)}; it must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {key!r} has a lone surrogate at character {error.start}, which no UTF-8 "
            "text can hold"
        ) from None
    return value


def _type_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
