"""Reading a data file: path or URL → the list of its records, whatever those are.

JSON (a list of objects) and JSONL (one object a line) are told apart by their first character,
packed with gzip or zstd or not; tables are read by `tables.py`. What is wrong with a file is said
in one line that names the file and the place in it.

    >>> read_records(local_path("instruction-data.json"))[0]["instruction"]
    'Evaluate the following phrase by transforming it into the spelling given.'

Source: listing 7.1 of "Build a Large Language Model (From Scratch)". This module does not import
torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sft.common import downloads, files
from lightning_sft.common.errors import KEY_SHAPE, InputError
from lightning_sft.data.compressed import content_suffix, read_text
from lightning_sft.data.hub_dataset import fetch_dataset, is_dataset
from lightning_sft.data.tables import is_saved_folder, is_table, read_table

BOOK_DATA_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/"
    "instruction-data.json"
)
# What a URL is known to hold. Only the chapter's own file is pinned.
KNOWN_SHA256 = {
    BOOK_DATA_URL: "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
}
_A_LIST = "it must be a list of entries ([{…}, …]) or one entry per line"
SECRET_NAME = re.compile("key|secret|passw|signature", re.IGNORECASE)


def is_url(text: str | Path) -> bool:
    """Whether `text` is an http or https address rather than a path."""
    return str(text).startswith(("http://", "https://"))


def local_path(path: str | Path) -> Path:
    """The local file or folder behind a path or address; what is elsewhere is fetched once.

    Raises:
        InputError: A local path is missing or not a regular file.
        ServiceError: The URL could not be fetched and is not in the cache.
    """
    if is_dataset(path):
        return fetch_dataset(str(path))
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
    if not is_file and not is_saved_folder(local):
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
    """Parse a file into its list of records, not yet validated.

    Whether it is JSON or JSONL shows in the first character: a list opens with `[`.

    Raises:
        InputError: Empty, not UTF-8 (with offset), bad syntax (with line and column), a key twice
            in one object, or neither a list nor one object per line.
    """
    if is_table(path):
        return read_table(path)
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold a list of entries")
    objects = KeysOnce()
    parse = _parse_json if text.lstrip()[0] == "[" else _parse_jsonl
    records = parse(text, path, objects)
    if not records:
        raise InputError(f"{path}: the list is empty; it must hold at least one entry")
    objects.check(path, records)
    return records


class KeysOnce:
    """Makes JSON's objects and notes the first one with a key twice, of which json keeps one."""

    def __init__(self) -> None:
        self.repeated: tuple[dict[str, Any], str] | None = None

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs) and self.repeated is None:
            ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
            self.repeated = record, key
        return record

    def check(self, path: Path, records: Sequence[Any], first: int = 0) -> None:
        """Refuse a key that was there twice.

        Args:
            records: What was parsed, which may be the object in question or hold it.
            first: The place of the first of them in the file.

        Raises:
            InputError: There was one; names the record if it is one of these.
        """
        if self.repeated is None:
            return
        found, key = self.repeated
        places = [place for place, record in enumerate(records, first) if record is found]
        where = f"entry {places[0]}" if places else "an object within an entry"
        raise InputError(f"{path}: {where}: the key {key!r} is there twice; keep one of them")


def _parse_json(text: str, path: Path, objects: KeysOnce) -> list[Any]:
    try:
        return json.loads(text, object_pairs_hook=objects)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: not usable as JSON ({_one_line(error)})") from None


def _parse_jsonl(text: str, path: Path, objects: KeysOnce) -> list[Any]:
    records: list[Any] = []
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(parse_line(line, number, path, objects))
        except InputError:
            # One object spread over many lines is a JSON file of the wrong shape, not bad JSONL.
            if not records and _is_json_value(text):
                raise InputError(f"{path}: the top level is one JSON value; {_A_LIST}") from None
            raise
    if len(records) == 1:
        check_lone_record(records[0], path)
    return records


def parse_line(line: str, number: int, path: Path, objects: KeysOnce) -> Any:
    """The record in line `number`, counted from 1.

    Raises:
        InputError: It is no JSON; says why, and names line and column.
    """
    try:
        return json.loads(line, object_pairs_hook=objects)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {number}, column {error.colno}: not valid JSON ({error.msg})"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(
            f"{path}: line {number}: not usable as JSON ({_one_line(error)})"
        ) from None


def check_lone_record(record: Any, path: Path) -> None:
    """A lone object is JSONL of one entry only where the name says JSONL.

    Raises:
        InputError: It is something else, or called otherwise.
    """
    if not (isinstance(record, dict) and content_suffix(path) == ".jsonl"):
        raise InputError(f"{path}: the top level is one {type_name(record)}; {_A_LIST}")


def _is_json_value(text: str) -> bool:
    try:
        json.loads(text)
    except (RecursionError, ValueError):
        return False
    return True


def type_name(value: Any) -> str:
    """What JSON calls a value, for messages."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
