"""The pages in a real browser: clicked, sorted, searched, voted on, in headless Chromium."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_sft.common.pages import build_page
from lightning_sft.judging.judge import JudgeConfig
from lightning_sft.judging.score import score_responses
from lightning_sft.reporting import answers_table, pages
from lightning_sft.reporting.charts import line_chart
from lightning_sft.reporting.compare import compare_answers
from lightning_sft.reporting.report import report
from lightning_sft.runs.responses import RESPONSES_NAME
from support.browser import EVIL, Select, chromium, webdriver
from support.judge_server import JudgeServer
from support.serving import wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def downloads(folder) -> Path:
    return folder / "downloads"


@pytest.fixture(scope="module")
def browser(folder) -> Iterator:
    with chromium(folder) as driver:
        yield driver


def write_run(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    entries = [
        {
            "instruction": f"Task {i}: {EVIL}",
            "input": "given" if i % 2 else "",
            "output": f"wanted {i}",
            "model_response": f"answer {i} {rng.randrange(10**6)} {EVIL}",
        }
        for i in range(12)
    ]
    (folder / RESPONSES_NAME).write_text(json.dumps(entries))
    (folder / "metrics.csv").write_text(
        "step,train_loss,lr\n" + "".join(f"{i},{3 / i},1e-5\n" for i in range(1, 60))
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "tiny" / "version_0", seed=1)
    numbers = iter(random.Random(2).sample(range(100), 12))
    with JudgeServer("ollama", lambda prompt: f"{next(numbers)}") as server:
        score_responses(folder, JudgeConfig(url=server.url), controls=0)
    report(folder)
    return folder


def open_page(browser, path: Path, width: int = 1200, dark: bool = False) -> None:
    browser.get_log("browser")  # forget what other pages said
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(path.as_uri())


def column(browser, name: str) -> list[float]:
    """What the visible rows of the table hold, from top to bottom."""
    script = (
        "return [...document.querySelectorAll('#answers tbody tr')]"
        ".filter((row) => row.offsetParent).map((row) => Number(row.getAttribute(arguments[0])))"
    )
    return browser.execute_script(script, f"data-{name}")


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def test_sorting_by_list_and_by_heading(browser, run):
    open_page(browser, run / "report.html")
    scores = column(browser, "score")
    assert len(scores) == 12
    assert scores == sorted(scores)  # the worst first
    order = Select(find(browser, "#order"))
    order.select_by_visible_text("best first")
    assert column(browser, "score") == sorted(scores, reverse=True)
    assert find(browser, "[data-sort=score]").get_attribute("aria-sort") == "descending"
    order.select_by_visible_text("as in the file")
    assert column(browser, "index") == list(range(12))
    heading = find(browser, "[data-sort=chrf] button")
    heading.click()
    assert column(browser, "chrf") == sorted(column(browser, "chrf"))
    heading.click()
    assert column(browser, "chrf") == sorted(column(browser, "chrf"), reverse=True)


def test_searching(browser, run):
    open_page(browser, run / "report.html")
    search = find(browser, "#search")
    search.send_keys("TASK 7:")
    assert column(browser, "index") == [7]
    assert find(browser, "#shown").text == "1 of 12"
    search.clear()
    search.send_keys("chrF wanted")  # a heading and a text: only texts are searched
    assert column(browser, "index") == []
    search.send_keys(webdriver.Keys.CONTROL + "a" + webdriver.Keys.BACKSPACE)
    assert len(column(browser, "index")) == 12


def test_pages_of_answers(browser, run, monkeypatch, tmp_path):
    monkeypatch.setattr(answers_table, "PAGE", 5)
    report(run, output=tmp_path / "report.html")
    open_page(browser, tmp_path / "report.html")
    page, before, after = (find(browser, f"#{name}") for name in ("place", "previous", "next"))
    scores = column(browser, "score")
    assert (len(scores), page.text, before.is_enabled()) == (5, "page 1 of 3", False)
    for number in (2, 3):
        after.click()
        assert page.text == f"page {number} of 3"
        scores += column(browser, "score")
    assert len(scores) == 12
    assert scores == sorted(scores)  # the order goes on over the pages
    assert not after.is_enabled()
    before.click()
    assert page.text == "page 2 of 3"
    find(browser, "#search").send_keys("Task 7:")  # found wherever it is
    assert column(browser, "index") == [7]
    assert not page.is_displayed()
    assert find(browser, "#shown").text == "1 of 12"
    assert browser.execute_script("return window.pwned") is None
    open_page(browser, run / "report.html")  # control: what fits needs no pages
    assert not find(browser, "#place").is_displayed()


def test_the_script_draws_the_rows_that_the_page_came_with(browser, run):
    open_page(browser, run / "report.html")
    script = "return document.querySelector('#answers tbody').innerHTML"
    came = browser.execute_script(script)
    order = Select(find(browser, "#order"))
    order.select_by_visible_text("best first")
    assert browser.execute_script(script) != came
    order.select_by_visible_text("worst first")
    assert browser.execute_script(script) == came


def test_markup_in_answers_does_nothing_and_nothing_is_loaded(browser, run):
    open_page(browser, run / "report.html")
    assert browser.execute_script("return window.pwned") is None
    assert EVIL in find(browser, "dd.given").text
    resources = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert resources == []
    assert browser.get_log("browser") == []  # the policy had nothing to refuse


def test_policy_holds_where_escaping_fails(browser, run, monkeypatch, tmp_path):
    """The second lock: without escaping, the policy still keeps the markup from running."""
    monkeypatch.setattr(answers_table, "escape", lambda text: text)
    report(run, output=tmp_path / "report.html")
    open_page(browser, tmp_path / "report.html")
    assert browser.execute_script("return window.pwned") is None
    assert "Content Security Policy" in str(browser.get_log("browser"))
    # And the negative control: without either lock it does run.
    text = (tmp_path / "report.html").read_text()
    (tmp_path / "open.html").write_text(text.replace("Content-Security-Policy", "ignored"))
    open_page(browser, tmp_path / "open.html")
    assert browser.execute_script("return window.pwned") is not None


@pytest.mark.parametrize("width", [320, 390, 768, 1000, 1025, 1440])
def test_no_sideways_scrolling(browser, run, width):
    open_page(browser, run / "report.html", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_table_that_scrolls_is_shaded_where_it_goes_on(browser, comparison):
    open_page(browser, comparison / "comparison.html", 360)
    wide = "const wide = document.querySelector('.wide');"
    assert browser.execute_script(f"{wide} return wide.scrollWidth > wide.clientWidth")
    style = browser.execute_script(f"{wide} return getComputedStyle(wide).backgroundAttachment")
    assert style == "local, local, scroll, scroll"  # covers that move, shades that stay


def test_labels_of_charts_are_whole(browser, tmp_path):
    figure = line_chart("Loss", {"a": [(0, 0.0), (80_000, 80_000.0)]}, "step")
    page = tmp_path / "chart.html"
    page.write_text(build_page("Chart", figure, pages.SCRIPT))
    open_page(browser, page)
    script = (
        "const room = document.querySelector('.chart > svg').getBoundingClientRect();"
        "return [...document.querySelectorAll('.chart > svg text')].map((text) => {"
        "const box = text.getBoundingClientRect();"
        "return [text.textContent, box.left >= room.left && box.right <= room.right]})"
    )
    labels = dict(browser.execute_script(script))
    assert labels["80,000"]
    assert all(labels.values()), labels


def test_phone_shows_rows_as_cards(browser, run):
    open_page(browser, run / "report.html", 360)
    display = "return getComputedStyle(document.querySelector('#answers tbody tr')).display"
    assert browser.execute_script(display) == "flex"
    open_page(browser, run / "report.html", 1200)
    assert browser.execute_script(display) == "table-row"


def luminance(browser, name: str) -> float:
    script = f"return getComputedStyle(document.body).{name}"
    text = browser.execute_script(script)
    channels = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_have_contrast(browser, run, dark):
    open_page(browser, run / "report.html", dark=dark)
    ink, ground = luminance(browser, "color"), luminance(browser, "backgroundColor")
    assert (ground < 0.2) is dark
    low, high = sorted((ink, ground))
    assert (high + 0.05) / (low + 0.05) > 7  # WCAG's AAA


def test_page_is_whole_without_its_script(browser, run, tmp_path):
    text = (run / "report.html").read_text()
    still = tmp_path / "still.html"
    still.write_text(text.replace("script-src 'sha256-", "script-src 'sha256-no"))
    open_page(browser, still)
    assert len(column(browser, "score")) == 12
    assert "Average score" in find(browser, "body").text


@pytest.fixture(scope="module")
def comparison(run, tmp_path_factory) -> Path:
    other = write_run(tmp_path_factory.mktemp("runs") / "other" / "version_0", seed=9)
    output = tmp_path_factory.mktemp("comparison")
    compare_answers([run, other], output)
    return output


def votes_in(folder: Path) -> dict:
    for _ in range(100):
        done = list(folder.glob("votes*.json"))
        if done:
            return json.loads(max(done, key=lambda path: path.stat().st_mtime).read_text())
        time.sleep(0.05)
    raise AssertionError("nothing was downloaded")


def state_after_refresh(browser) -> str:
    browser.refresh()
    wait_for(lambda: bool(find(browser, "#state").text))
    return find(browser, "#state").text


def test_blind_vote_from_clicks_to_compare(browser, run, comparison, downloads, tmp_path):
    """A person who always picks what the second run said, told by nothing but the text."""
    other = json.loads((comparison / "comparison.json").read_text())["comparisons"][0]
    assert other["second"] == "other/version_0"
    second = {f"answer {i} {n} {EVIL}" for i, n in enumerate(random_numbers(9))}
    open_page(browser, comparison / "blind-vote.html")
    for number in range(12):
        assert find(browser, "#state").text == f"{number} of 12 voted"
        side = "left" if find(browser, "#left").text in second else "right"
        if number % 2:
            find(browser, f"[data-choice={side}]").click()
        else:
            key = webdriver.Keys.ARROW_LEFT if side == "left" else webdriver.Keys.ARROW_RIGHT
            find(browser, "body").send_keys(key)
    assert "thank you" in find(browser, "#state").text
    assert not find(browser, "#pair").is_displayed()
    # Votes are kept in the browser, which writes them down in its own time.
    wait_for(lambda: state_after_refresh(browser).startswith("12 of 12 voted"))
    find(browser, "#export").click()
    votes = tmp_path / "votes.json"
    votes.write_text(json.dumps(votes_in(downloads)))
    runs = [run, Path(run).parent]
    runs[1] = write_run(tmp_path / "other" / "version_0", seed=9)
    compare_answers(runs, tmp_path / "out", votes=votes)
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rates = result["comparisons"][0]["preferences"]["votes"]
    assert (rates["count"], rates["win_rate"]) == (12, 1.0)
    assert browser.execute_script("return window.pwned") is None


def random_numbers(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10**6) for _ in range(12)]


def test_blind_vote_back_and_tie(browser, comparison):
    open_page(browser, comparison / "blind-vote.html")
    browser.execute_script("localStorage.clear()")
    wait_for(lambda: state_after_refresh(browser).startswith("0 of 12 voted"))
    first = find(browser, "#instruction").text
    find(browser, "[data-choice=tie]").click()
    assert find(browser, "#instruction").text != first
    find(browser, "#back").click()
    assert find(browser, "#instruction").text == first
    find(browser, "[data-choice=left]").click()
    find(browser, "#back").click()
    assert "chosen" in find(browser, "#left-card").get_attribute("class")
    assert find(browser, "#state").text == "1 of 12 voted"


def test_comparison_page_in_the_browser(browser, comparison):
    for width in (360, 1200):
        open_page(browser, comparison / "comparison.html", width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert "no difference shown" in find(browser, "body").text
    find(browser, "a[href='blind-vote.html']").click()
    assert browser.title == "Blind vote"
    assert browser.execute_script("return window.pwned") is None
