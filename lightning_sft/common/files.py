"""Files that are whole or not there, and reading that ends.

A name that exists holds a finished file: `atomic_write` writes a temporary file beside it and
renames, and `append_line` adds a line that survives a kill. Whatever is read goes through
`open_regular`: a pipe would be waited on for ever, and /dev/zero never ends.

    >>> with atomic_write("answer.txt") as file:
    ...     file.write("42")
    >>> read_text("answer.txt")
    '42'

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from lightning_sft.common.errors import InputError, ServiceError

BLOCK = 1024 * 1024  # bytes
MOST = (
    2 * 1024**3
)  # bytes of a file that is read whole; records and logs of long runs are tens of MB
MOST_SMALL = 16 * 1024**2  # of one that holds a few settings


def cache_dir() -> Path:
    """The folder for downloads: $LIGHTNING_SFT_CACHE, or lightning_sft in the user's cache."""
    if own := os.environ.get("LIGHTNING_SFT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_sft"


def shipped_folder() -> Path:
    """`configs/`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def open_regular(path: str | Path, most: int | None = None) -> BinaryIO:
    """Open a file for reading, if it is one and no larger than it may be.

    Args:
        most: Bytes; any size by default, for files that are read block by block or mapped.

    Raises:
        InputError: A pipe, device, socket or folder, or more than `most` bytes.
        OSError: It is missing, or may not be read.
    """
    # Without waiting: to open a pipe that nobody writes into would otherwise never return.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)  # of what was opened, not of what the name is by now
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: not a regular file")
        if most is not None and found.st_size > most:
            raise InputError(f"{path}: is over {most:,} bytes; it has {found.st_size:,}")
        return open(descriptor, "rb")  # noqa: PTH123 - it is open already
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, most: int = MOST) -> bytes:
    """The whole content of a regular file.

    Raises:
        InputError, OSError: As `open_regular`; also where the file grows beyond `most` meanwhile.
    """
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # files of /proc call themselves empty
        raise InputError(f"{path}: is over {most:,} bytes")
    return content


def read_text(path: str | Path, most: int = MOST) -> str:
    """The text of a regular file in UTF-8; a byte-order mark is left out, line ends are `\\n`.

    Raises:
        InputError: As `open_regular`, or not UTF-8 (with the offset).
        OSError: It is missing, or may not be read.
    """
    try:
        text = read_bytes(path, most).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not valid UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, most: int = MOST) -> Any:
    """The value in a JSON file, such as `write_json` makes.

    Raises:
        InputError: As `read_text`, or not JSON; however deeply a damaged file is nested.
        OSError: It is missing, or may not be read.
    """
    try:
        return json.loads(read_text(path, most))
    except (json.JSONDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise InputError(f"{path}: not valid JSON ({reason})") from None


def sha256_of(path: str | Path) -> str:
    """The sha256 of a regular file as 64 hexadecimal digits.

    Raises:
        InputError, OSError: As `open_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
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
        lines = read_bytes(path).split(b"\n")  # the last is empty, or has no line end
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
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
