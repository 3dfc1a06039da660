"""Downloads that are checked by size and sha256 before they take their name.

A `.part` file is resumed, one process transfers while the others wait, and only what was checked
is renamed. The sha256 stays beside the file (`model.safetensors.sha256`, as `sha256sum -c` reads
it), so that a file damaged later is noticed and fetched again.

    >>> download("https://example.org/data.json", cache_dir() / "data.json")

This module does not import torch, and what it needs for the network only when that is used.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.common.files import (
    BLOCK,
    MOST_SMALL,
    atomic_write,
    disk_error,
    lock,
    read_bytes,
    read_text,
    replace_durably,
    sha256_of,
)

if TYPE_CHECKING:
    import requests

    from lightning_sft.common.deadline import Deadline

# All in seconds, but for ATTEMPTS and STALL_BYTES. Waits between attempts double from FIRST_WAIT
# on; a server counts as stuck when the headers, or any STALL_BYTES of the body after them, take it
# longer than STALL_SECONDS.
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0
ATTEMPTS, FIRST_WAIT, TOTAL_WAIT = 5, 0.5, 120.0
STALL_BYTES, STALL_SECONDS = 64 * 1024, 60.0

Check = Callable[[Path], object]


def download(
    url: str,
    path: str | Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    check: Check | None = None,
) -> Path:
    """Fetch `url` to `path`, unless the right file is there already: then no request is made.

    Args:
        size: Expected bytes; where not given, what the server announces.
        sha256: Expected digest; where not given, what a Hugging Face hub announces.
        check: Called with the finished file before it takes its name; an InputError refuses it.

    Returns:
        `path`.

    Raises:
        InputError: `url` is not an http or https address.
        ServiceError: The file could not be had after all attempts, or not be written.
    """
    path = Path(path)
    shown = re.sub(r"(?<=://)[^/]*@", "", re.split("[?#]", url)[0])  # no user, password, token
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{shown}: not an http or https address")
    try:
        if not _is_intact(path, size, sha256):
            with lock(path):
                if not _is_intact(path, size, sha256):  # another process may have fetched it
                    _fetch(url, path, size, sha256, check)
    except _Refused as reason:
        raise ServiceError(
            f"{shown}: download failed ({reason}); run the command again, or put the file at "
            f"{path} by hand"
        ) from None
    except OSError as error:
        raise disk_error(path, error) from None
    return path


class _Refused(Exception):  # noqa: N818 - `download` turns it into the error that users see
    """What the server sends is not the file, and would not be next time."""


class _Broken(_Refused):
    """This attempt failed, the next may not; `wait` is the pause in seconds a server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def _fetch(url: str, path: Path, size: int | None, sha256: str | None, check: Check | None) -> None:
    record = Path(f"{path}.sha256")
    if record.exists():  # ours, and damaged since; a file put there by hand has no record
        path.unlink(missing_ok=True)
        record.unlink()
    waited = 0.0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _publish(path, *_transfer(url, path, size, sha256), check)
        except _Broken as broken:
            wait = FIRST_WAIT * 2 ** (attempt - 1) if broken.wait is None else broken.wait
            waited += wait
            if attempt == ATTEMPTS or waited > TOTAL_WAIT:
                raise _Refused(f"{broken}, attempt {attempt} of {ATTEMPTS}") from None
            time.sleep(wait)
    return None


def _transfer(
    url: str, path: Path, size: int | None, sha256: str | None
) -> tuple[int | None, str | None]:
    """Make one request, add what it brings to `<path>.part`; returns size and sha256 to expect."""
    import requests
    import tqdm
    import urllib3

    from lightning_sft.common.deadline import Deadline, DeadlineError, watched_session

    part, etag = Path(f"{path}.part"), Path(f"{path}.part.etag")
    version = (
        read_bytes(etag, MOST_SMALL).decode("utf-8", "replace")
        if etag.exists() and part.exists()
        else ""
    )
    # A weak ETag (W/"…") does not promise the same bytes, and a malformed one cannot be sent.
    have = part.stat().st_size if re.fullmatch(r'"[\x21\x23-\x7e]*"', version) else 0
    headers = {"Accept-Encoding": "identity"}
    if have:  # If-Range: a server whose file has changed sends all of it, with status 200
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    timeouts = (CONNECT_TIMEOUT, READ_TIMEOUT)
    try:
        with (
            Deadline(STALL_SECONDS) as deadline,
            watched_session() as session,
            session.get(url, headers=headers, stream=True, timeout=timeouts) as response,
        ):
            _check_status(response)
            start, total = _find_place(response, have, version, etag)
            size, sha256 = _find_promise(response, total, size, sha256)
            progress: dict[str, Any] = {
                "total": size,
                "initial": start,
                "unit": "B",
                "unit_scale": True,
            }
            with (
                part.open("ab" if start else "wb") as file,
                tqdm.tqdm(desc=path.name, disable=None, **progress) as bar,
            ):
                if not start:  # only now that the old part is emptied may its ETag change
                    etag.write_text(response.headers.get("ETag", ""), "utf-8")
                for block in _read_blocks(response, deadline) if start != total else ():
                    start += file.write(block)
                    bar.update(len(block))
                    if size is not None and start > size:  # found out when the part is checked
                        break
    except DeadlineError:
        wanted = f"{STALL_BYTES >> 10} KiB in {STALL_SECONDS:g} s"
        raise _Broken(f"the server sent less than {wanted}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _Broken(_find_cause(error)) from None
    return size, sha256


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    reason = f"HTTP {status} {http.client.responses.get(status, '')}".strip()
    if status in (408, 429) or status >= 500:
        raise _Broken(reason, _read_number(response.headers.get("Retry-After")))
    if status not in (200, 206, 416):
        raise _Refused(reason)
    if status == 200 and response.headers.get("Content-Type", "").startswith("text/html"):
        raise _Refused("an HTML page instead of the file")
    if "Content-Encoding" in response.headers:  # lengths and ranges would count other bytes
        raise _Refused("it is sent compressed, though asked for as it is")


def _find_place(
    response: requests.Response, have: int, version: str, etag: Path
) -> tuple[int, int | None]:
    """Where in the file the body starts, and how long the whole file is.

    Args:
        have: Bytes of the part, which are from the file whose ETag is `version`.
        etag: File that holds `version`; removed where the part cannot be continued.
    """
    if response.status_code == 200:
        return 0, _read_number(response.headers.get("Content-Length"))
    span, _, total = response.headers.get("Content-Range", "").partition("/")
    # The first comes with 416: an earlier run was killed after the last byte.
    fits = (span == "bytes *" and total == str(have)) or span.startswith(f"bytes {have}-")
    # Some servers know ranges and not If-Range: what they send may be of a file that has changed.
    if fits and response.headers.get("ETag") == version:
        return have, _read_number(total)
    etag.unlink(missing_ok=True)  # without it the part is not continued
    what = "is of another version of the file" if fits else f"does not continue at byte {have}"
    raise _Broken(f"HTTP {response.status_code} {what}")


def _find_promise(
    response: requests.Response, total: int | None, size: int | None, sha256: str | None
) -> tuple[int | None, str | None]:
    """The whole file's size and sha256: the caller's word, else the hub's, else its length."""
    for answer in (*response.history, response):  # the hub says it in its redirect
        size = _read_number(answer.headers.get("X-Linked-Size")) if size is None else size
        linked_etag = answer.headers.get("X-Linked-Etag", "").strip('"')
        sha256 = sha256 or (linked_etag if re.fullmatch("[0-9a-f]{64}", linked_etag) else None)
    if total is not None and size not in (None, total):
        raise _Refused(f"it has {total} bytes instead of {size}")
    return total if size is None else size, sha256


def _read_blocks(response: requests.Response, deadline: Deadline) -> Iterator[bytes]:
    deadline.extend(STALL_SECONDS)
    received = 0
    # read1 returns what has come in; read would wait for a full block, however slowly it trickles.
    while block := response.raw.read1(BLOCK):
        yield block
        received += len(block)
        if received >= STALL_BYTES:
            deadline.extend(STALL_SECONDS)
            received = 0


def _read_number(text: str | None) -> int | None:
    """A header's whole number; None where there is none. (`isdigit` would take a ² for one.)"""
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def _publish(path: Path, size: int | None, sha256: str | None, check: Check | None) -> None:
    """Give `<path>.part` its final name if it is what it should be."""
    part = Path(f"{path}.part")
    have = part.stat().st_size
    if size is not None and have < size:
        raise _Broken(f"the connection broke after {have} of {size} bytes")
    digest = sha256_of(part)
    try:
        if size is not None and have > size:
            raise _Broken(f"{have} bytes arrived instead of {size}")
        if sha256 is not None and digest != sha256:
            raise _Broken(f"its sha256 is {digest}, not {sha256}")
        if _is_html(part):
            raise _Refused("an HTML page instead of the file")
        if check is not None:
            check(part)
    except (_Refused, InputError) as error:
        part.unlink()
        if isinstance(error, _Refused):
            raise
        raise _Refused(str(error)) from None
    # First the record, then the name: no file of ours stands there without one.
    with atomic_write(f"{path}.sha256") as file:
        file.write(f"{digest}  {path.name}\n")
    replace_durably(part, path)
    Path(f"{path}.part.etag").unlink(missing_ok=True)


def _is_intact(path: Path, size: int | None, sha256: str | None) -> bool:
    try:
        if size not in (None, path.stat().st_size):
            return False
        with contextlib.suppress(FileNotFoundError):
            sha256 = sha256 or read_text(f"{path}.sha256", MOST_SMALL)[:64]
        if sha256 is not None:
            return sha256_of(path) == sha256
        return path.stat().st_size > 0 and not _is_html(path)
    except FileNotFoundError:
        return False


def _is_html(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _find_cause(error: BaseException) -> str:
    """The innermost cause in words. The library's own text repeats the URL with its query."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return getattr(error, "strerror", None) or f"the connection broke: {type(error).__name__}"
