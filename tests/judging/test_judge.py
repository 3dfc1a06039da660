"""What a judge is asked, how its reply is read, and what its settings refuse."""

from __future__ import annotations

import pytest

from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import Entry
from lightning_sft.judging.judge import JudgeConfig, environment_key
from lightning_sft.judging.prompt import load_prompt, parse_reply

KEY = "sk-planted0123456789abcdef"
ENTRY = Entry("What is the plural of 'mouse'?", "", "The plural of 'mouse' is 'mice'.")
WITH_INPUT = Entry("Name the tense.", "She sang.", "Past tense.")


def chapter_score(reply: str) -> int | None:
    """How section 7.8 reads a reply: the negative control of `parse_reply`."""
    try:
        return int(reply)
    except ValueError:
        return None


def test_chapter_prompt_is_word_for_word():
    question = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName the tense.\n\n### Input:\nShe sang."
    )
    expected = (
        f"Given the input `{question}` and correct output `Past tense.`, score the model response "
        "`Present.` on a scale from 0 to 100, where 100 is the best score. Respond with the "
        "integer number only."
    )
    assert load_prompt("chapter").fill(WITH_INPUT, "Present.") == expected


def test_placeholders_inside_an_answer_stay_text():
    filled = load_prompt("chapter").fill(ENTRY, "{output} {instruction}")
    assert "score the model response `{output} {instruction}` on" in filled


def test_own_template(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('Rate {response} for {instruction}/{input}/{output} as {"score": n}')
    prompt = load_prompt(str(path), low=1, high=10)
    assert prompt.fill(WITH_INPUT, "x") == (
        'Rate x for Name the tense./She sang./Past tense. as {"score": n}'
    )
    assert parse_reply("10", prompt).score == 10
    assert parse_reply("11", prompt).reason == "11 is outside 1 to 10"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Rate {answer} and {response}", "unknown placeholder {answer}"),
        ("Rate it", "no {response}"),
    ],
)
def test_own_template_refused(tmp_path, text, words):
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        load_prompt(str(path))
    with pytest.raises(InputError, match="allowed: chapter, rubric"):
        load_prompt(str(tmp_path / "missing.txt"))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("85", 85),
        (" 85\n", 85),
        ('{"score": 85}', 85),
        ('{"score": "85"}', 85),
        ('```json\n{"score": 85}\n```', 85),
        ('Because 3 of 4 are right: {"score": 85}', 85),
        ("Score: 85/100", 85),
        ("85 out of 100.", 85),
        ("85%", 85),
        ("85.0", 85),
        ("<think>80 or 90? Between.</think>\n85", 85),
        ("0", 0),
        ("100/100", 100),
    ],
)
def test_reply_with_a_score(reply, score):
    assert parse_reply(reply, load_prompt("chapter")) == (score, None)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty reply"),
        (" \n", "empty reply"),
        ("N/A", "no number in the reply"),
        ("250", "250 is outside 0 to 100"),
        ("-5", "-5 is outside 0 to 100"),
        ("85.5", "85.5 is not a whole number"),
        ("between 80 and 90", "2 numbers (80, 90)"),
        ("7/10", "2 numbers (7, 10)"),
        ('{"score": 250}', "250 is outside"),
        ('{"score": null}', "null, not a number"),
        ('{"score": true}', "true, not a number"),
        ('{"score": NaN}', "nan is outside"),
        ('{"rating": 85}', "has no `score`"),
        ("[85]", "[85], not a number"),
        ("9" * 6000, "is outside"),
        ("1" + "0" * 400, "is outside"),
        ("[" * 100_000, "no number"),
        ("gpt-4o", "no number"),
    ],
)
def test_reply_without_a_score_is_none_with_a_reason(reply, reason):
    verdict = parse_reply(reply, load_prompt("chapter"))
    assert verdict.score is None
    assert reason in verdict.reason


def test_negative_control_the_chapters_int_accepts_and_drops():
    """The rule is needed: `int` takes what is off the scale and loses what is a score."""
    assert chapter_score("250") == 250
    assert chapter_score("-5") == -5
    assert chapter_score('{"score": 85}') is None
    assert chapter_score("Score: 85/100") is None


def test_rubric_scale_and_schema():
    rubric = load_prompt("rubric")
    assert parse_reply('{"reason": "2 of 3 points", "score": 4}', rubric).score == 4
    assert parse_reply("4/5", rubric).score == 4
    assert parse_reply("0", rubric).reason == "0 is outside 1 to 5"
    assert rubric.schema()["required"] == ["reason", "score"]
    assert "Name the tense." in rubric.fill(WITH_INPUT, "x")


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@localhost:11434",
        f"https://api.example.com/v1?api_key={KEY}",
        f"https://api.example.com/{KEY}/v1",
        f"http://localhost:1/v1#{KEY}",
        f"http://localhost:{KEY}",
        f"{KEY}",
    ],
)
def test_key_in_url_is_refused_without_repeating_it(url):
    with pytest.raises(InputError) as caught:
        JudgeConfig(url=url)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["api_key", "model", "prompt"])
def test_key_in_config_is_refused_without_repeating_it(field):
    with pytest.raises(InputError, match="environment") as caught:
        JudgeConfig(**{field: KEY})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"protocol": "grpc"},
        {"url": "localhost:11434"},
        {"url": "ftp://localhost"},
        {"concurrency": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"retries": -1},
        {"max_tokens": 0},
        {"low": 5, "high": 5},
        {"temperature": -1},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(InputError, match=r"^judge\.") as caught:
        JudgeConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_keys(monkeypatch):
    for name in ("LIGHTNING_SFT_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_keys")
def test_own_key_goes_anywhere_openais_only_where_it_is_safe(monkeypatch):
    def key(protocol: str, url: str) -> str | None:
        return environment_key(JudgeConfig(protocol=protocol, url=url))

    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    assert key("openai", "https://api.openai.com") == "openai"
    assert key("openai", "http://localhost:8080") == "openai"
    assert key("openai", "http://192.168.1.7:8000") is None  # in the clear, to another machine
    assert key("ollama", "http://localhost:11434") is None  # Ollama has no use for it
    monkeypatch.setenv("LIGHTNING_SFT_JUDGE_KEY", " own\n")
    assert key("openai", "http://192.168.1.7:8000") == "own"
    assert key("ollama", "http://localhost:11434") == "own"


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize("key", ["two words", "line\nline", "schlüssel"])
def test_key_that_no_header_carries_is_refused_without_repeating_it(monkeypatch, key):
    monkeypatch.setenv("LIGHTNING_SFT_JUDGE_KEY", key)
    with pytest.raises(InputError, match="LIGHTNING_SFT_JUDGE_KEY") as caught:
        environment_key(JudgeConfig())
    assert key not in str(caught.value)
