"""Every test hears what the server says, whatever was said in the second before it."""

from __future__ import annotations

import pytest

from lightning_sft.serving import log


@pytest.fixture(autouse=True)
def forget_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_said", {})
