"""Files that are whole or not there.

A name that exists holds a finished file: `atomic_write` writes a temporary file beside it and
renames, and `append_line` adds a line that survives a kill.

    >>> with atomic_write("answer.txt") as file:
    ...     file.write("42")

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lightning_sft.common.errors import InputError, ServiceError

BLOCK = 1024 * 1024  # bytes


def expand_user(path: str | Path, what: str) -> Path:
    """`~` and `~name` written out.

    Args:
        what: What a complaint calls the path.

    Raises:
        InputError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{what}: {path}: there is no such user") from None


def cache_dir() -> Path:
    """The folder for downloads: $LIGHTNING_SFT_CACHE, or lightning_sft in the user's cache."""
    if own := os.environ.get("LIGHTNING_SFT_CACHE"):
        return expand_user(own, "LIGHTNING_SFT_CACHE")
    cache = expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")
    return cache / "lightning_sft"


def shipped_folder() -> Path:
    """`configs/`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def install_command(extra: str) -> str:
    """What to type for an extra of this package: the project is on no index, so from its folder."""
    root = Path(__file__).parents[2]
    here = (root / "pyproject.toml").is_file()
    return f"pip install -e '{root}[{extra}]'" if here else f"pip install 'lightning-sft[{extra}]'"


def sha256_of(path: str | Path) -> str:
    """The file's sha256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold `<path>.lock` against other processes; the kernel frees it when its holder dies."""
    import filelock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        yield


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that takes the name `path` when the block ends without an error.

    Args:
        mode: `w` (UTF-8 text) or `wb`.

    Raises:
        ServiceError: The disk is full, or the folder cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode.replace("w", "x"), encoding="utf-8" if mode == "w" else None) as f:
            yield f
        replace_durably(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save makes a RuntimeError of a full disk, with the reason as its context.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise disk_error(path, reason) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=4, ensure_ascii=False)


def append_line(path: str | Path, text: str) -> None:
    """Append one JSON record to a file of lines; it is on disk when this returns.

    The torn line that a kill may have left at the end is cut off first.

    Raises:
        ServiceError: The disk is full, or the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            if file.read() not in (b"", b"\n"):  # no line end: a kill, or an editor
                file.seek(0)
                start = file.read().rfind(b"\n") + 1
                file.seek(start)
                if _parse_record(file.read()) is None:
                    file.truncate(start)
                else:
                    file.write(b"\n")
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if end == 0:
            _sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a file of lines; a torn last line is left out.

    Raises:
        InputError: The file is missing, or another line is not a JSON object; names the line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")  # the last is empty, or has no line end
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse_record(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            raise InputError(f"{path}: line {number} is not a JSON object")
    return records


def replace_durably(temporary: Path, path: Path) -> None:
    """Give a finished file its final name, such that a power cut leaves the old or the new."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def disk_error(path: Path, error: OSError) -> ServiceError:
    """The one-line error for a file that could not be written."""
    if isinstance(error, ServiceError):
        return error
    return ServiceError(f"{path}: cannot be written ({error.strerror or error})")


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
