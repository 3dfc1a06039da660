"""Headless Chromium for the tests of pages.

Importing it skips a test module, with the reason, where Chromium, its driver or selenium is not
installed (Debian: `apt-get install chromium chromium-driver`, then `pip install selenium`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Select = pytest.importorskip("selenium.webdriver.support.select").Select
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("Chromium or its driver is not installed", allow_module_level=True)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
)
# What the pages under test are fed: were it not escaped, it would leave a mark.
EVIL = '<img src=x onerror="window.pwned=1"><script>window.pwned=2</script>'


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Any]:
    """A browser with a profile of its own in `folder`; downloads go to `folder/downloads`."""
    downloads = str(folder / "downloads")
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": downloads})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        behaviour = {"behavior": "allow", "downloadPath": downloads}
        driver.execute_cdp_cmd("Page.setDownloadBehavior", behaviour)
        yield driver
    finally:
        driver.quit()
