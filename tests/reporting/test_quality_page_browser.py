"""The page of `prepare` in a real browser: on a phone, in the dark, with hostile texts in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_sft.data.entries import Entry, Splits
from lightning_sft.data.quality import examine, summarize_quality
from lightning_sft.reporting.quality_page import render_quality
from support.browser import EVIL, chromium

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    train = [Entry(f"Task {n} of many: {EVIL}", "in" * n, "out" * n) for n in range(12)]
    train.append(Entry("Переведи это, пожалуйста", "", "я" * 5000))
    test = [Entry(f"Task 3 of many: {EVIL}!", "in" * 3, EVIL)]
    val = [Entry("A question without spaces: " + "w" * 300, "", "answer")]
    quality = examine(Splits(train, test=test, val=val), 0.9)
    assert quality.count_twins("test", "train") == 1
    summary = summarize_quality(quality) | {
        "written": "today",
        "data": [f"/a/rather/long/path/to/{'data' * 30}.json"],
        "policies": ["drop_leaks"],
        "output": {"path": "new.json", "train": 12, "test": 1, "val": 1},
    }
    path = tmp_path_factory.mktemp("page") / "data-quality.html"
    path.write_text(render_quality(quality, summary))
    return path


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page(browser, page: Path, width: int, dark: bool) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get_log("browser")
    browser.get(page.as_uri())
    for details in browser.find_elements("css selector", "details"):
        details.find_element("css selector", "summary").click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    text = browser.find_element("css selector", "body").text
    for words in (
        "Evaluation entries with a near-twin",
        "Groups of near-twins",
        "Cyrillic",
        "test 0",
    ):
        assert words in text
    assert EVIL in text  # as it was written
    assert browser.execute_script("return window.pwned") is None
    assert browser.get_log("browser") == []
