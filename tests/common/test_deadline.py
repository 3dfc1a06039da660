"""A deadline that no pace of bytes defeats."""

from __future__ import annotations

import time

import pytest
import requests

from lightning_sft.common.deadline import Deadline, DeadlineError, watched_session
from support.drip import drip
from support.hub import Hub, Reply

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Slow: "


def test_an_exchange_in_time_is_left_alone():
    with Hub() as hub, watched_session() as session:
        url = hub.serve("/a", b"whole")
        with Deadline(5.0):
            assert session.get(url).content == b"whole"
        assert session.get(url).content == b"whole"  # and none is needed


@pytest.mark.parametrize(
    ("scheme", "head"),
    [("http", HEADERS), ("https", b"\x16\x03\x03\x40\x00")],
    ids=["header", "TLS handshake"],
)
def test_what_trickles_is_shut(scheme, head):
    with drip(head) as address, watched_session() as session:
        start = time.monotonic()
        with pytest.raises(DeadlineError), Deadline(0.3):
            session.get(address.replace("http", scheme), timeout=5.0)
        assert 0.3 <= time.monotonic() - start < 3.0
        if scheme == "http":  # the negative control: the timeout alone does not end it
            with drip(head, b"y" * 50 + b"\r\n\r\nok") as slow:
                assert session.get(slow, timeout=0.3).content == b"ok"


def test_a_proxy_that_trickles_is_shut(monkeypatch):
    with drip(HEADERS) as address, watched_session() as session:
        session.proxies = {"https": address}
        with pytest.raises(DeadlineError), Deadline(0.3):
            session.get("https://example.org/", timeout=5.0)


def test_a_body_cut_by_the_deadline_is_not_taken_for_whole():
    """Without a length the shut connection looks like the end."""
    with (
        drip(b"HTTP/1.1 200 OK\r\n\r\n") as address,
        watched_session() as session,
        pytest.raises(DeadlineError),
        Deadline(0.3),
    ):
        session.get(address)


def test_a_connection_kept_open_is_watched_again():
    with Hub() as hub, watched_session() as session:
        hub.keep_open = True
        url = hub.serve("/a", b"whole")
        with Deadline(5.0):
            session.get(url)
        hub.script("/a", Reply(trickle=0.2, body=b"x" * 99))
        with pytest.raises(DeadlineError), Deadline(0.3):
            session.get(url, timeout=5.0)
        assert hub.connections == 1


def test_a_deadline_can_be_extended():
    with (
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 30) as address,
        watched_session() as session,
        Deadline(0.3) as deadline,
        session.get(address, stream=True) as response,
    ):
        for _ in response.iter_content(1):
            deadline.extend(0.3)


def test_a_keyboard_interrupt_is_not_replaced():
    def interrupted() -> None:
        with Deadline(0.05):
            time.sleep(0.2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_an_error_before_the_deadline_is_its_own():
    with pytest.raises(requests.ConnectionError), Deadline(5.0), watched_session() as session:
        session.get("http://127.0.0.1:9/")
