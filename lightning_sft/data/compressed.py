"""The bytes of a file, unpacked where it is packed with gzip or zstd.

What a file is packed with is seen by its first bytes, not by its name. Unpacking stops where a
plain file would be refused for its size, so that a small file cannot fill the memory.

    >>> read_content(Path("entries.jsonl.gz"))[:1]
    b'{'

zstd needs pyarrow, the extra `parquet`. This module does not import torch.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PACKED = (".gz", ".zst")


def content_suffix(path: Path) -> str:
    """The ending that says what is in a file, in small letters: `.csv` of `a.CSV.gz`."""
    name = Path(path.name.removesuffix(path.suffix)) if path.suffix in PACKED else path
    return name.suffix.lower()


def read_content(path: Path) -> bytes:
    """The whole content of a regular file, unpacked.

    Raises:
        InputError: No regular file, damaged, larger than allowed, or pyarrow is missing.
        OSError: It is missing, or may not be read.
    """
    with files.open_regular(path) as file:
        begin = file.read(4)
        file.seek(0)
        if begin[:2] == _GZIP:
            content = _unpack(path, gzip.GzipFile(fileobj=file))
        elif begin == _ZSTD:
            content = _unpack(path, _open_zstd(path, file))
        else:
            return files.read_bytes(path)
    if len(content) > files.MOST:
        raise InputError(f"{path}: is over {files.MOST:,} bytes once it is unpacked")
    return content


def read_text(path: Path) -> str:
    """The whole text of a regular file in UTF-8, unpacked, without a byte-order mark.

    Raises:
        InputError: As `read_content`; not UTF-8, with the offset; or it cannot be read.
    """
    try:
        # Some editors write a byte-order mark. The codec utf-8-sig would miscount offsets by it.
        return read_content(path).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def not_utf8(path: Path, byte: int) -> InputError:
    """The error for a file with a byte that no UTF-8 text has there."""
    return InputError(f"{path}: byte {byte} is not valid UTF-8; save the file as UTF-8")


def _unpack(path: Path, packed: Any) -> bytes:
    blocks, size = [], 0
    try:
        while size <= files.MOST and (block := packed.read(files.BLOCK)):
            blocks.append(block)
            size += len(block)
    except (OSError, EOFError, zlib.error) as error:  # pyarrow's own are OSErrors
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: cannot be unpacked ({reason})") from None
    return b"".join(blocks)


def _open_zstd(path: Path, file: Any) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError(
            f"{path}: unpacking zstd needs pyarrow: {files.install_command('parquet')}"
        ) from None
    return pyarrow.CompressedInputStream(file, "zstd")
