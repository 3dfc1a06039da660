"""Downloads from a server that misbehaves."""

from __future__ import annotations

import gzip
import hashlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_sft.common import downloads
from lightning_sft.common.errors import InputError, ServiceError
from support.drip import drip
from support.hub import Hub, Reply

BODY = bytes(range(256)) * 400  # 102,400 bytes, no two neighbouring blocks alike
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.01)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "file.bin"


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_download_checks_renames_and_records(hub, target):
    url = hub.serve("/file.bin", BODY)
    assert downloads.download(url, target, size=len(BODY), sha256=SHA256) == target
    assert target.read_bytes() == BODY
    assert Path(f"{target}.sha256").read_text() == f"{SHA256}  file.bin\n"
    assert names_in(target.parent) == {"file.bin", "file.bin.sha256", "file.bin.lock"}


@pytest.mark.parametrize("sha256", [None, SHA256])
def test_a_warm_cache_makes_no_request(hub, target, sha256):
    url = hub.serve("/file.bin", BODY)
    downloads.download(url, target, sha256=sha256)
    hub.requests.clear()
    downloads.download(url, target, sha256=sha256)
    downloads.download("http://127.0.0.1:9/file.bin", target, sha256=sha256)  # nobody listens there
    assert hub.requests == []
    Path(f"{target}.sha256").unlink()  # control: with neither file nor record it is asked
    target.unlink()
    downloads.download(url, target, sha256=sha256)
    assert len(hub.requests) == 1


def test_a_warm_cache_is_not_written_to(hub, target):
    """Many machines share one that they may only read."""
    url = hub.serve("/file.bin", BODY)
    downloads.download(url, target)
    Path(f"{target}.lock").unlink()
    downloads.download(url, target)
    assert names_in(target.parent) == {"file.bin", "file.bin.sha256"}


def test_a_compressed_transfer_is_refused(hub, target):
    """Its lengths and ranges count other bytes, so nothing about it could be checked."""
    url = hub.serve("/file.bin", BODY)
    body = gzip.compress(BODY)
    hub.script("/file.bin", Reply(body=body, headers={"Content-Encoding": "gzip"}))
    with pytest.raises(ServiceError, match="compressed"):
        downloads.download(url, target)
    downloads.download(url, target)
    assert [r.headers["accept-encoding"] for r in hub.requests] == ["identity", "identity"]


def test_a_file_put_there_by_hand_is_taken(hub, target):
    target.parent.mkdir(parents=True)
    target.write_bytes(BODY)
    assert downloads.download("http://127.0.0.1:9/file.bin", target) == target
    target.write_bytes(b"<!DOCTYPE html><title>Log in</title>")  # but not a saved error page
    with pytest.raises(ServiceError):
        downloads.download("http://127.0.0.1:9/file.bin", target)


@pytest.mark.parametrize("known", [True, False], ids=["given sha256", "own record"])
def test_a_file_damaged_later_is_fetched_again(hub, target, known):
    url, sha256 = hub.serve("/file.bin", BODY), SHA256 if known else None
    downloads.download(url, target, sha256=sha256)
    damaged = bytearray(BODY)
    damaged[5000] ^= 1
    target.write_bytes(damaged)
    downloads.download(url, target, sha256=sha256)
    assert target.read_bytes() == BODY
    assert len(hub.requests) == 2


def test_a_damaged_file_is_not_trusted_when_it_cannot_be_replaced(hub, target):
    url = hub.serve("/file.bin", BODY)
    downloads.download(url, target)
    target.write_bytes(BODY[:-1])
    hub.default["/file.bin"] = Reply(404, b"")
    for _ in range(2):  # the second run must not take it for a file put there by hand
        with pytest.raises(ServiceError):
            downloads.download(url, target)
    target.write_bytes(BODY)  # by hand, as the message says
    assert downloads.download(url, target) == target


def test_half_the_body_is_resumed(hub, target):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(cut=30_000))
    downloads.download(url, target, sha256=SHA256)
    first, second = hub.requests
    assert "range" not in first.headers
    assert second.headers["range"] == "bytes=30000-"
    assert second.headers["if-range"].startswith('"')
    assert target.read_bytes() == BODY


def test_half_the_body_and_no_more_is_an_error(hub, target):
    url = hub.serve("/file.bin", BODY)
    hub.default["/file.bin"] = Reply(cut=30_000, ranges=False)
    with pytest.raises(ServiceError, match="connection broke: IncompleteRead, attempt 5"):
        downloads.download(url, target)
    assert len(hub.requests) == downloads.ATTEMPTS
    assert not target.exists()


def test_a_file_that_changes_between_two_halves_is_not_mixed(hub, target):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(cut=30_000, etag='"older"'))
    downloads.download(url, target)
    assert hub.requests[1].headers["if-range"] == '"older"'
    assert target.read_bytes() == BODY


def test_a_server_that_ignores_the_range_is_started_over(hub, target):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(cut=30_000), Reply(ranges=False))
    downloads.download(url, target)
    assert hub.requests[1].headers["range"] == "bytes=30000-"
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("status", [206, 416])
def test_a_server_that_ignores_if_range_is_not_believed(hub, target, status):
    """Some send the range of whatever file they have now; only the ETag gives it away."""
    url = hub.serve("/file.bin", BODY)
    rest = b"of another file" if status == 206 else b""
    span = f"bytes 30000-{len(BODY) - 1}/{len(BODY)}" if status == 206 else "bytes */30000"
    headers = {"Content-Range": span, "ETag": '"newer"'}
    hub.script("/file.bin", Reply(cut=30_000), Reply(status, rest, headers))
    downloads.download(url, target)
    assert hub.requests[1].headers["range"] == "bytes=30000-"
    assert "range" not in hub.requests[2].headers
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("etag", ["", 'W/"weak"', '"un\xadsendable"', '"folded\r\n line"'])
def test_without_a_strong_etag_nothing_is_resumed(hub, target, etag):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(cut=30_000, ranges=False, headers={"ETag": etag}))
    downloads.download(url, target)
    assert "range" not in hub.requests[1].headers
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=416, body=b"", headers={"Content-Range": "bytes */7"}),
        Reply(status=206, body=BODY[:9], headers={"Content-Range": "bytes 0-8/102400"}),
        Reply(status=206, body=BODY[:9]),
    ],
)
def test_a_wrong_range_starts_over(hub, target, reply):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(cut=30_000), reply)
    downloads.download(url, target)
    assert "range" not in hub.requests[2].headers
    assert target.read_bytes() == BODY


def test_a_part_that_is_already_whole_is_taken(hub, target):
    """A kill after the last byte and before the rename: the server answers 416."""
    url = hub.serve("/file.bin", BODY)
    downloads.download(url, target)
    etag = f'"{hashlib.md5(BODY).hexdigest()}"'
    target.rename(f"{target}.part")
    Path(f"{target}.part.etag").write_text(etag)
    hub.requests.clear()
    downloads.download(url, target, sha256=SHA256)
    assert target.read_bytes() == BODY
    assert [request.headers["range"] for request in hub.requests] == ["bytes=102400-"]


def test_no_content_length(hub, target):
    url = hub.serve("/file.bin", BODY)
    hub.default["/file.bin"] = Reply(length=False, ranges=False)
    downloads.download(url, target)
    assert target.read_bytes() == BODY
    hub.default["/file.bin"] = Reply(length=False, ranges=False, cut=1000)
    other = target.with_name("other")
    for known in ({"size": len(BODY)}, {"sha256": SHA256}):  # what reveals a short one
        with pytest.raises(ServiceError):
            downloads.download(url, other, **known)
        assert not other.exists()


@pytest.mark.parametrize("cut", [None, 7000])
def test_a_chunked_body_must_end_as_promised(hub, target, cut):
    chunks = (
        b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (BODY[:5000], BODY[5000:])) + b"0\r\n\r\n"
    )
    hub.default["/file.bin"] = Reply(
        body=chunks, length=False, cut=cut, headers={"Transfer-Encoding": "chunked"}
    )
    if cut is None:
        assert downloads.download(f"{hub.address}/file.bin", target).read_bytes() == BODY
    else:
        with pytest.raises(ServiceError):
            downloads.download(f"{hub.address}/file.bin", target)
        assert not target.exists()


def test_one_flipped_bit(hub, target):
    url = hub.serve("/file.bin", BODY)
    flipped = bytearray(BODY)
    flipped[70_000] ^= 0x10
    hub.script("/file.bin", Reply(body=bytes(flipped)))
    downloads.download(url, target, sha256=SHA256)  # the second attempt brings the right one
    assert target.read_bytes() == BODY
    other = target.with_name("other")
    hub.default["/file.bin"] = Reply(body=bytes(flipped))
    with pytest.raises(ServiceError, match=f"not {SHA256}"):
        downloads.download(url, other, sha256=SHA256)
    assert not other.exists()
    downloads.download(url, other)  # control: only the digest can tell
    assert other.read_bytes() == bytes(flipped)


def test_another_size_is_refused_before_it_is_transferred(hub, target):
    url = hub.serve("/file.bin", BODY)
    with pytest.raises(ServiceError, match="102400 bytes instead of 5"):
        downloads.download(url, target, size=5)
    assert len(hub.requests) == 1
    assert not target.exists()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204, 304])
def test_a_final_status_is_not_retried(hub, target, status):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(status=status, body=b""))
    with pytest.raises(ServiceError, match=f"HTTP {status}"):
        downloads.download(url, target)
    assert len(hub.requests) == 1
    assert downloads.download(url, target).read_bytes() == BODY  # control: the next run gets it


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_status_is_retried(hub, target, status):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", *[Reply(status=status, body=b"busy")] * 2)
    assert downloads.download(url, target).read_bytes() == BODY
    assert len(hub.requests) == 3


def test_attempts_end(hub, target):
    hub.default["/file.bin"] = Reply(status=503, body=b"")
    with pytest.raises(ServiceError, match="HTTP 503 Service Unavailable, attempt 5 of 5"):
        downloads.download(f"{hub.address}/file.bin", target)
    assert len(hub.requests) == downloads.ATTEMPTS


def test_retry_after_is_obeyed_and_bounded(hub, target):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(status=429, body=b"", headers={"Retry-After": "1"}))
    start = time.monotonic()
    downloads.download(url, target)
    assert 1.0 <= time.monotonic() - start < 5.0
    other = target.with_name("other")
    hub.script("/file.bin", Reply(status=503, body=b"", headers={"Retry-After": "86400"}))
    with pytest.raises(ServiceError, match="attempt 1 of 5"):
        downloads.download(url, other)  # at once: nobody waits a day


def test_a_trickling_server_counts_as_broken(hub, target, monkeypatch):
    url = hub.serve("/file.bin", BODY)
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.3)
    hub.script("/file.bin", Reply(trickle=0.02))
    start = time.monotonic()
    downloads.download(url, target)
    assert time.monotonic() - start < 5.0  # the whole file would trickle for half an hour
    assert int(hub.requests[1].headers["range"].strip("bytes=-")) > 5  # and none of it was lost
    assert target.read_bytes() == BODY
    monkeypatch.setattr(downloads, "STALL_BYTES", 1)  # control: no such limit, no second request
    hub.requests.clear()
    hub.script("/file.bin", Reply(trickle=0.02, body=BODY[:40]))
    downloads.download(url, target.with_name("other"))
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x" * 9999),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n", b"0" * 9999),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" " * 9999),  # the end of the connection ends it
    ],
    ids=["header", "continue", "length of a chunk", "body"],
)
def test_nothing_that_trickles_lasts(target, monkeypatch, head, rest):
    """Each byte comes in time for the socket's own timeout."""
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    start = time.monotonic()
    with drip(head, rest) as address, pytest.raises(ServiceError, match=r"less than 64 KiB in 0.3"):
        downloads.download(f"{address}/file.bin", target)
    assert time.monotonic() - start < 5.0
    assert not target.exists()


@pytest.mark.parametrize("name", ["Retry-After", "X-Linked-Size", "Content-Range"])
@pytest.mark.parametrize("value", ["²", "9" * 5000, "-1"])
def test_a_header_that_is_no_number_is_passed_over(hub, target, name, value):
    url = hub.serve("/file.bin", BODY)
    status = 503 if name == "Retry-After" else 206 if name == "Content-Range" else 200
    value = f"bytes 30000-/{value}" if name == "Content-Range" else value
    hub.script("/file.bin", Reply(cut=30_000), Reply(status, BODY, {name: value}))
    assert downloads.download(url, target).read_bytes() == BODY


def test_no_more_than_the_file_is_taken(hub, target, monkeypatch):
    """A body without an end is not read to the end of the disk."""
    monkeypatch.setattr(downloads, "BLOCK", 4096)
    hub.default["/file.bin"] = Reply(body=bytes(5_000_000), length=False)
    written = []
    publish = downloads._publish
    monkeypatch.setattr(
        downloads,
        "_publish",
        lambda path, *rest: (
            written.append(Path(f"{path}.part").stat().st_size),
            publish(path, *rest),
        ),
    )
    with pytest.raises(ServiceError, match="bytes arrived instead of 10000"):
        downloads.download(f"{hub.address}/file.bin", target, size=10_000)
    assert max(written) <= 10_000 + 4096


def test_a_silent_server_times_out(hub, target, monkeypatch):
    url = hub.serve("/file.bin", BODY)
    monkeypatch.setattr(downloads, "READ_TIMEOUT", 0.2)
    silence = threading.Event()
    hub.script("/file.bin", Reply(cut=100, hold=silence))
    downloads.download(url, target)
    silence.set()
    assert hub.requests[1].headers["range"] == "bytes=100-"


@pytest.mark.parametrize(
    "page",
    [
        Reply(body=b"Log in", headers={"Content-Type": "text/html; charset=utf-8"}),
        Reply(
            body=b"\xef\xbb\xbf \n<!doctype HTML><p>Log in", headers={"Content-Type": "text/plain"}
        ),
        Reply(body=b"<HTML><body>Log in"),
    ],
)
def test_a_web_page_is_not_a_file(hub, target, page):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", page)
    with pytest.raises(ServiceError, match="an HTML page"):
        downloads.download(url, target)
    assert not target.exists()
    assert len(hub.requests) == 1
    assert downloads.download(url, target).read_bytes() == BODY


def test_a_cached_web_page_is_fetched_again(hub, target):
    url = hub.serve("/file.bin", BODY)
    target.parent.mkdir(parents=True)
    target.write_bytes(b"<html>Log in</html>")
    assert downloads.download(url, target).read_bytes() == BODY


def test_a_file_that_fails_its_check_is_refused(hub, target):
    def check(path: Path) -> None:
        raise InputError("not what it should be")

    with pytest.raises(ServiceError, match="not what it should be"):
        downloads.download(hub.serve("/file.bin", BODY), target, check=check)
    assert names_in(target.parent) <= {"file.bin.lock", "file.bin.part.etag"}
    downloads.download(f"{hub.address}/file.bin", target, check=lambda path: None)
    assert target.exists()


def test_a_hub_says_size_and_sha256_in_its_redirect(hub, target):
    hub.serve("/cdn/file.bin", BODY)
    url = hub.redirect(
        "/resolve/file.bin", "/cdn/file.bin", X_Linked_Size="102400", X_Linked_Etag=f'"{SHA256}"'
    )
    flipped = Reply(body=BODY[:-1] + b"!")
    hub.script("/cdn/file.bin", flipped)
    downloads.download(url, target)
    assert target.read_bytes() == BODY
    assert len(hub.asked("/cdn/file.bin")) == 2  # the first was found out
    hub.script("/cdn/file.bin", flipped)  # control: without the header nothing can tell
    url = hub.redirect("/resolve/other", "/cdn/file.bin")
    assert downloads.download(url, target.with_name("other")).read_bytes() != BODY
    url = hub.redirect("/resolve/third", "/cdn/file.bin", X_Linked_Size="5")
    with pytest.raises(ServiceError, match="instead of 5"):
        downloads.download(url, target.with_name("third"))


def test_a_refused_connection_says_what_to_do(target):
    with socket.socket() as unused:  # a port where surely nobody listens
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
        with pytest.raises(ServiceError) as error:
            downloads.download(url, target)
    message = str(error.value)
    assert url in message
    assert f"put the file at {target} by hand" in message
    assert "Connection refused" in message
    assert "\n" not in message


def test_no_secret_of_a_url_is_repeated(hub, target):
    host = hub.address.removeprefix("http://")
    secret = f"http://user:PLANTED@PLANTED@{host}/file.bin?token=PLANTED#PLANTED"
    hub.script("/file.bin", Reply(status=503, body=b""), Reply(status=404, body=b""))
    for url in (secret, secret.replace(host, "127.0.0.1:9"), secret.replace("http:", "ftp:")):
        with pytest.raises((ServiceError, InputError)) as error:
            downloads.download(url, target)
        assert "PLANTED" not in str(error.value)
        assert "/file.bin" in str(error.value)
    for entry in target.parent.iterdir():
        assert b"PLANTED" not in entry.read_bytes()
    assert "Basic" in hub.requests[0].headers["authorization"]  # control: it was really used


def test_a_full_disk_is_said(hub, target, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_read_blocks", full)
    with pytest.raises(ServiceError, match="No space left on device"):
        downloads.download(hub.serve("/file.bin", BODY), target)
    assert len(hub.requests) == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


CHILD = (
    "import contextlib, sys; from lightning_sft.common import downloads; "
    "{}downloads.download(*sys.argv[1:3])"
)


def start_download(url: str, path: Path, patch: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD.format(patch), url, str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "control"])
def test_eight_processes_make_one_transfer(hub, target, locked):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(cut=50_000, hold=(gate := threading.Event())))
    if not locked:
        target.parent.mkdir()
    patch = "" if locked else "downloads.lock = contextlib.nullcontext; "
    children = [start_download(url, target, patch) for _ in range(8 if locked else 2)]
    wait_until(lambda: len(hub.requests) >= (1 if locked else 2))
    time.sleep(1.0 if locked else 0.0)  # time for the others to show that they do not wait
    assert len(hub.requests) == (1 if locked else 2)  # all the others wait
    gate.set()  # the first transfer breaks in the middle; its process goes on with the rest
    outcomes = [(child.communicate(timeout=60)[1], child.returncode) for child in children]
    if locked:
        assert outcomes == [(b"", 0)] * 8
        assert [r.headers.get("range") for r in hub.requests] == [None, "bytes=50000-"]
        assert target.read_bytes() == BODY


def test_a_killed_download_frees_the_lock_and_is_resumed(hub, target):
    url = hub.serve("/file.bin", BODY)
    hub.script("/file.bin", Reply(cut=50_000, hold=(gate := threading.Event())))
    child = start_download(url, target)
    part = Path(f"{target}.part")
    wait_until(lambda: part.exists() and part.stat().st_size > 0)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    gate.set()
    assert not target.exists()
    have = part.stat().st_size
    downloads.download(url, target)
    assert hub.requests[1].headers["range"] == f"bytes={have}-"
    assert target.read_bytes() == BODY


def test_importing_downloads_is_cheap():
    code = (
        "import sys, lightning_sft.common.downloads; "
        "print({'torch', 'requests'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
