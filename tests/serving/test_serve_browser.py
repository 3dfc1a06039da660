"""The page of `serve` in headless Chromium: asked, stopped, compared, by hand and by keyboard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_sft.data.conversation import Conversation, Message
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import get_style
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.decoding.batch import RunningBatch
from lightning_sft.decoding.generation import generate
from support.browser import EVIL, chromium, webdriver
from support.serving import Served, answer_alone, make_talker, serving, wait_for

pytestmark = pytest.mark.timeout(120)
TOKEN = "a-token-of-more-than-sixteen"
STYLE = get_style("alpaca")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving({"first": make_talker(), "second": make_talker(1)}) as running:
        yield running


@pytest.fixture
def slow(monkeypatch) -> None:
    """Steps that take 30 ms: an answer of 200 tokens takes 6 seconds."""
    feed = RunningBatch.feed

    def dawdle(*arguments: Any) -> Any:
        time.sleep(0.03)
        return feed(*arguments)

    monkeypatch.setattr(RunningBatch, "feed", dawdle)


def open_page(browser, served: Served, width: int = 1000, dark: bool = False) -> None:
    browser.get_log("browser")  # forget what other pages said
    size = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(served.url)
    wait_for(lambda: find(browser, "#about").text != "Connecting …")


def find(browser, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def find_all(browser, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def set_field(browser, name: str, value: str) -> None:
    if not find(browser, f"#{name}").is_displayed():
        find(browser, "#settings summary").click()
    field = find(browser, f"#{name}")
    field.clear()
    field.send_keys(value)


def choose(browser, name: str) -> None:
    if not find(browser, "#who").is_displayed():
        find(browser, "#settings summary").click()
    find(browser, f"input[name=who][value='{name}']").click()


def ask(browser, text: str, wait: bool = True) -> None:
    find(browser, "#instruction").send_keys(text + webdriver.Keys.ENTER)
    if wait:
        wait_for(lambda: find_all(browser, ".answer") and not find_all(browser, ".running"))


def answers(browser) -> list[str]:
    return [answer.get_attribute("textContent") for answer in find_all(browser, ".answer .text")]


def expect(seed: int, question: str, count: int, given: str = "") -> str:
    prompt = STYLE.prompt(Entry(question, given, ""))
    ids = answer_alone(make_talker(seed), prompt, max_new_tokens=count)
    return STYLE.extract(gpt2_tokenizer().decode(ids))


def test_a_question_is_answered_by_both(browser, served):
    open_page(browser, served)
    assert browser.title == "first and second · talk"
    set_field(browser, "max_tokens", "12")
    ask(browser, "Name a colour.")
    assert answers(browser) == [expect(seed, "Name a colour.", 12) for seed in (0, 1)]
    assert [who.text for who in find_all(browser, ".who")] == ["first", "second"]
    facts = find(browser, ".facts").text
    assert facts.startswith("12 tokens in ")
    assert "cut off" in facts
    assert find(browser, "#instruction").get_attribute("value") == ""
    assert browser.get_log("browser") == []  # nor did the policy refuse anything


def test_one_model_with_an_input_and_the_prompt_it_got(browser, served):
    open_page(browser, served)
    set_field(browser, "max_tokens", "6")
    choose(browser, "second")
    find(browser, "#input-part summary").click()
    find(browser, "#input").send_keys("red, green")
    ask(browser, "Which is redder?")
    assert answers(browser) == [expect(1, "Which is redder?", 6, "red, green")]
    find(browser, ".answer summary").click()
    wait_for(lambda: find(browser, ".answer pre").text != "")
    prompt = STYLE.prompt(Entry("Which is redder?", "red, green", ""))
    assert find(browser, ".answer pre").get_attribute("textContent") == prompt
    count = len(gpt2_tokenizer().encode(prompt))
    assert f"({count} tokens)" in find(browser, ".answer summary").text


def test_the_answer_streams_and_stops(browser, served, slow):
    open_page(browser, served)
    choose(browser, "first")
    set_field(browser, "max_tokens", "200")
    before = served.engine.steps
    ask(browser, "Go on", wait=False)
    wait_for(lambda: len("".join(answers(browser))) > 5)
    early = answers(browser)[0]
    wait_for(lambda: len(answers(browser)[0]) > len(early) + 20)  # it grows
    assert answers(browser)[0].startswith(early)
    assert not find(browser, "#ask-button").is_displayed()
    find(browser, "#stop-button").click()
    wait_for(lambda: not find_all(browser, ".running"))
    served.wait_idle(3)  # the server stops as well
    assert served.engine.steps - before < 150
    assert find(browser, ".facts").text == "stopped"
    assert find(browser, "#ask-button").is_displayed()
    shown = answers(browser)[0]
    assert expect(0, "Go on", 200).startswith(shown)
    find(browser, "#clear").click()
    assert find_all(browser, ".exchange") == []
    assert find(browser, "#empty").is_displayed()
    set_field(browser, "max_tokens", "3")
    ask(browser, "Again")  # and it goes on
    assert answers(browser) == [expect(0, "Again", 3)]


def test_all_by_keyboard(browser, served, slow):
    open_page(browser, served)
    focused = lambda: browser.switch_to.active_element  # noqa: E731
    keys = webdriver.Keys
    assert focused().get_attribute("id") == "instruction"  # ready to type
    focused().send_keys("two" + keys.SHIFT + keys.ENTER + keys.NULL + "lines")
    assert focused().get_attribute("value") == "two\nlines"
    order = []
    for _ in range(3):
        focused().send_keys(keys.TAB)
        order.append(focused().text)
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        assert browser.execute_script(outline) == "solid"
    assert order == ["Input for the instruction", "Settings temperature 0", "Ask"]
    focused().send_keys(keys.ENTER)
    wait_for(lambda: len("".join(answers(browser))) > 5)
    assert find(browser, ".question").text == "two\nlines"
    assert focused().get_attribute("id") == "instruction"
    focused().send_keys(keys.ESCAPE)
    wait_for(lambda: not find_all(browser, ".running"))
    assert find(browser, ".facts").text == "stopped"


def test_what_a_screen_reader_hears(browser, served):
    open_page(browser, served)
    set_field(browser, "max_tokens", "4")
    choose(browser, "first")
    assert find(browser, "#spoken").get_attribute("aria-live") == "polite"
    ask(browser, "Hi")
    spoken = find(browser, "#spoken").get_attribute("textContent")
    assert spoken.startswith(f"first: {answers(browser)[0]} 4 tokens")
    unlabelled = browser.execute_script(
        "return [...document.querySelectorAll('input, textarea, button, summary')].map((part) =>"
        "part.labels?.length || part.textContent.trim() ? '' : part.id).filter(Boolean)"
    )
    assert unlabelled == []


def test_earlier_turns_go_along_when_they_are_asked_to(browser, served):
    open_page(browser, served)
    set_field(browser, "max_tokens", "4")
    choose(browser, "first")
    ask(browser, "One")
    first = answers(browser)[0]
    ask(browser, "Two")
    assert answers(browser)[1] == expect(0, "Two", 4)  # by itself
    find(browser, "#clear").click()
    ask(browser, "One")
    find(browser, "#earlier").click()
    ask(browser, "Two")
    prompt = "".join(STYLE.split(Entry("One", "", first))) + "\n\n"
    prompt += STYLE.prompt(Entry("Two", "", ""))
    tokens = generate(make_talker(), [gpt2_tokenizer().encode(prompt)], max_new_tokens=4)[0]
    assert answers(browser)[1] == STYLE.extract(gpt2_tokenizer().decode(tokens))


def test_settings_reach_the_model(browser, served):
    open_page(browser, served)
    choose(browser, "first")
    for name, value in (("max_tokens", "8"), ("temperature", "1.5"), ("seed", "7")):
        set_field(browser, name, value)
    ask(browser, "Hi")
    ask(browser, "Hi")
    set_field(browser, "seed", "8")
    ask(browser, "Hi")
    one, again, other = answers(browser)
    assert one == again != other
    assert "temperature 1.5" in find(browser, "#settings-note").text
    set_field(browser, "temperature", "9")
    find(browser, "#settings summary").click()
    find(browser, "#instruction").send_keys("Hi" + webdriver.Keys.ENTER)
    assert find(browser, "#temperature").is_displayed()  # the browser says what is wrong there
    assert len(answers(browser)) == 3


def test_markup_does_nothing_and_nothing_is_loaded(browser, served):
    open_page(browser, served)
    set_field(browser, "max_tokens", "2")
    ask(browser, EVIL)
    assert find(browser, ".question").text == EVIL
    find(browser, ".answer summary").click()
    wait_for(lambda: EVIL in find(browser, ".answer pre").get_attribute("textContent"))
    assert browser.execute_script("return window.pwned") is None
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert {name.removeprefix(served.url) for name in loaded} <= {
        "/v1/models",
        "/v1/chat/completions",
        "/v1/chat/prompt",
    }


def test_the_policy_lets_no_other_script_run(browser, served):
    open_page(browser, served)
    browser.execute_script(
        "const part = document.createElement('div'); part.innerHTML = arguments[0];"
        "document.body.append(part)",
        '<img src="data:," onerror="window.pwned=1">',
    )
    time.sleep(0.2)
    assert browser.execute_script("return window.pwned") is None
    assert "Content Security Policy" in str(browser.get_log("browser"))
    fetched = browser.execute_async_script(
        "fetch('http://localhost:9').then(() => arguments[0]('yes'), (e) => arguments[0](`${e}`))"
    )
    assert "Failed" in fetched
    assert "connect-src" in str(browser.get_log("browser"))


@pytest.mark.parametrize("width", [320, 360, 768, 1400])
def test_no_sideways_scrolling(browser, served, width):
    open_page(browser, served, width)
    set_field(browser, "max_tokens", "20")
    ask(browser, "A_long_word_" * 30)
    find(browser, ".answer summary").click()
    wait_for(lambda: find(browser, ".answer pre").text != "")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for button in ("#ask-button", "#clear"):
        box = find(browser, button).rect
        assert box["height"] >= 40  # a thumb finds it
        assert box["x"] + box["width"] <= width
    tops = [card.rect["y"] for card in find_all(browser, ".answer")]
    assert (tops[0] == tops[1]) is (width > 740)  # side by side where there is room


def luminance(browser, selector: str, name: str) -> float:
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    text = browser.execute_script(script, selector, name)
    channels = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_have_contrast(browser, served, dark):
    open_page(browser, served, dark=dark)
    set_field(browser, "max_tokens", "2")
    ask(browser, "Hi")
    for text, ground in (
        ("body", "body"),
        (".question", ".question"),
        (".answer .text", ".answer"),
        (".facts", ".answer"),
        (".who", ".answer"),
        (".answer:nth-child(2) .who", ".answer"),
        ("#ask-button", "#ask-button"),
    ):
        low, high = sorted(
            [luminance(browser, text, "color"), luminance(browser, ground, "backgroundColor")]
        )
        assert (high + 0.05) / (low + 0.05) > 4.5, text  # WCAG's AA
    assert (luminance(browser, "body", "backgroundColor") < 0.2) is dark


def test_motion_can_be_reduced(browser, served, slow):
    open_page(browser, served)
    moving = (
        "return getComputedStyle(document.querySelector('.answer .text'), '::after').animationName"
    )
    for value, expected in (("reduce", "none"), ("no-preference", "blink")):
        feature = {"name": "prefers-reduced-motion", "value": value}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        ask(browser, "Go on", wait=False)
        wait_for(lambda: bool(find_all(browser, ".running")))
        assert browser.execute_script(moving) == expected
        find(browser, "#clear").click()
        wait_for(lambda: find(browser, "#ask-button").is_displayed())


def test_a_token_is_asked_for_and_kept_in_memory_only(browser):
    with serving({"only": make_talker()}, token=TOKEN) as running:
        open_page(browser, running)
        assert find(browser, "#token").is_displayed()
        assert not find(browser, "#ask").is_displayed()
        find(browser, "#token").send_keys("wrong" + webdriver.Keys.ENTER)
        wait_for(lambda: find(browser, "#token-note").text == "That was not it.")
        find(browser, "#token").clear()
        find(browser, "#token").send_keys(TOKEN + webdriver.Keys.ENTER)
        wait_for(lambda: find(browser, "#ask").is_displayed())
        assert find(browser, "#title").text == "Talk to only"
        assert not find(browser, "#who").is_displayed()  # there is no choice
        set_field(browser, "max_tokens", "3")
        ask(browser, "Hi")
        assert answers(browser) == [expect(0, "Hi", 3)]
        kept = "return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        assert browser.execute_script(kept) == '[{},{},""]'
        assert TOKEN not in browser.page_source
        browser.refresh()
        wait_for(lambda: find(browser, "#token").is_displayed())


def test_a_server_that_goes_away_is_said(browser):
    with serving({"only": make_talker()}) as running:
        open_page(browser, running)
    ask(browser, "Hi")
    assert "fault" in find(browser, ".facts").get_attribute("class")
    assert find(browser, ".facts").text


# --- Conversations ---


def ask_turns(browser, system: str, questions: list[str], count: int) -> None:
    """Each answer against one pass over all that was said before, by a model of its own."""
    model, style, tokenizer = make_talker(), get_style("chatml"), gpt2_tokenizer()
    said = [Message("system", system)]
    set_field(browser, "system", system)
    set_field(browser, "max_tokens", f"{count}")
    for place, question in enumerate(questions):
        ask(browser, question)
        said.append(Message("user", question))
        ids = encode_prompt(Conversation(tuple(said)), style, tokenizer)
        expected = style.extract(tokenizer.decode(generate(model, [ids], max_new_tokens=count)[0]))
        assert answers(browser)[place] == expected
        said.append(Message("assistant", expected))


def test_five_turns_with_a_system_prompt(browser):
    with serving({"only": make_talker()}, "chatml") as running:
        open_page(browser, running)
        assert find(browser, "#earlier").get_attribute("checked")  # the style closes answers
        assert "go along" in find(browser, "#turns-note").text
        ask_turns(browser, "Be brief.", ["One?", "Two?", "Three?", "Four?", "Five?"], 6)
        assert "system prompt" in find(browser, "#settings-note").text
        assert "left out" not in find(browser, "#log").text
        find_all(browser, ".answer summary")[-1].click()
        shown = find_all(browser, ".answer pre")[-1]
        wait_for(lambda: shown.text != "")
        assert shown.get_attribute("textContent").startswith("<|im_start|>system\nBe brief.")
        assert shown.get_attribute("textContent").count("<|im_start|>user") == 5


def test_turns_that_no_longer_fit_are_said(browser):
    with serving({"only": make_talker()}, "chatml") as running:
        open_page(browser, running)
        set_field(browser, "max_tokens", "6")
        for place in range(4):
            ask(browser, f"Question {place} " + "and more " * 25)
        notes = [facts.text for facts in find_all(browser, ".facts")]
        assert "left out" not in notes[0] + notes[1]
        assert notes[-1].endswith("the oldest 2 turns left out, for want of context")
