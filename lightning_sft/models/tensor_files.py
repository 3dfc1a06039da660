"""Tensors in a file, read as data and checked on the way: one reader for weights and checkpoints.

Before anything is built from a file it must be
- a regular file, and not empty;
- whole. Where a digest is known (a checkpoint's sidecar `FILE.json`, a download's `FILE.sha256`, an
  export's `export.json`) the file's sha256 must be it. Else the file's own means count: the zip
  archive that `torch.save` writes has a CRC of every member; safetensors knows its length and
  nothing more, so a changed bit among its numbers is seen only by the digest;
- no larger than it looks: `torch.save` never compresses, so a compressed member is refused, which
  could become a thousand times the file.

Nothing in a file is run. Each check reads the file once, in blocks, and the tensors are mapped into
memory. For gpt2-medium's 1.6 GB the CRCs took 3.3 s on a busy machine, the sha256 4.6 s.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import safetensors
import torch

from lightning_sft.common import files
from lightning_sft.common.errors import InputError

ZIP_START = b"PK\x03\x04"  # how torch tells its archive from the pickles before version 1.6
EXPORT_MARK = "export.json"  # of an exported folder; names its files and their digests


class DamagedError(InputError):
    """A file is not the one whose digest was written down."""


def read_torch(
    path: Path, map_location: Any = "cpu", *, check: bool = True, mmap: bool = True
) -> Any:
    """What `torch.save` wrote.

    Args:
        check: Compare with the digest, else the CRCs; leave it out only where it was just done.
        mmap: Map tensors, copied when they are written to; False reads them.

    Raises:
        InputError: Not such a file, damaged, or it holds more than tensors and plain values.
    """
    is_zip = check_torch(path, check)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles: what matters is said below
            return torch.load(path, map_location, weights_only=True, mmap=mmap and is_zip)
    except Exception:  # a damaged pickle can fail in any way
        raise InputError(
            f"{path}: refused; it is damaged, or holds more than tensors (nothing in a file is run)"
        ) from None


def check_torch(path: Path, content: bool = True) -> bool:
    """Make sure that a file of `torch.save` is whole, and takes no more memory than its size.

    Args:
        content: Also what is in it, not its structure alone.

    Returns:
        Whether it is a zip archive, which can be mapped. The older form has no CRCs.

    Raises:
        InputError: It is not.
    """
    with _open(path) as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START
    is_known = content and check_digest(path)
    if is_zip:
        with _open(path) as file:
            _check_archive(path, file, content and not is_known)
    return is_zip


def check_digest(path: Path) -> bool:
    """Compare a file with the sha256 that was written down for it.

    Returns:
        Whether one was.

    Raises:
        InputError: It is another one.
    """
    expected, record = _known_digest(path)
    if expected is None:
        return False
    if files.sha256_of(path) != expected:
        raise DamagedError(f"{path} is damaged (its sha256 differs from {record})")
    return True


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, mapped.

    Raises:
        InputError: Not such a file, not whole, or not the one of its digest.
    """
    _open(path).close()
    check_digest(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({' '.join(str(error).split())[:200]})"
        ) from None


def check_finite(tensors: Iterable[tuple[str, Any]], where: object) -> None:
    """Refuse tensors that hold NaN or infinity.

    Args:
        tensors: With their names; what is not of floating point is passed over.
        where: For the message.

    Raises:
        InputError: One does; it is named.
    """
    for name, tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        # The extremes of a tensor with NaN are NaN: no mask of the tensor's size is made.
        if tensor.numel() and not all(torch.isfinite(end) for end in tensor.detach().aminmax()):
            raise InputError(f"{where}: {name} holds NaN or infinity")


def _open(path: Path) -> IO[bytes]:
    try:
        file = files.open_regular(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not file.seek(0, 2):
        file.close()
        raise InputError(f"{path}: the file is empty")
    file.seek(0)
    return file


def _check_archive(path: Path, file: IO[bytes], content: bool) -> None:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise InputError(f"{path}: refused; it is compressed, as torch.save never does")
            if sum(member.file_size for member in members) > size:
                raise InputError(f"{path}: refused; its parts are larger than the file")
            for member in members if content else ():
                with archive.open(member) as part:
                    while part.read(files.BLOCK):  # compares the CRC at the end
                        pass
    except InputError:
        raise
    except Exception as error:  # of zipfile: a damaged archive can fail in any way
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"{path} is damaged ({reason})") from None


def _known_digest(path: Path) -> tuple[str | None, Path]:
    """The sha256 that one of our own records gives, and the record."""
    for record in (path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.sha256")):
        try:
            if record.suffix == ".json":
                found = files.read_json(record, files.MOST_SMALL)["sha256"]
            else:
                found = files.read_text(record, files.MOST_SMALL)[:64]
        except (OSError, InputError, KeyError, TypeError):
            continue
        if isinstance(found, str):
            return found, record
    record = path.with_name(EXPORT_MARK)
    try:
        found = files.read_json(record, files.MOST_SMALL)["files"][path.name]["sha256"]
    except (OSError, InputError, KeyError, TypeError, IndexError):
        found = None
    return (found if isinstance(found, str) else None), record
