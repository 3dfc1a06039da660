"""Batched, cached decoding gives what a plain loop gives, and sampling what its numbers say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.decoding import generation
from lightning_sft.decoding.batch import read_rows
from lightning_sft.decoding.generation import GenerationConfig, decode, generate, sample
from lightning_sft.models.gpt2 import GPTModel

CONTEXT = 32
# 20 prompts of 1 to 12 tokens, unsorted, some with a common beginning, two of them equal.
PROMPTS = [[(7 * place + k) % 61 for k in range(1 + 5 * place % 12)] for place in range(15)]
PROMPTS += [[1, 2, 3, *range(10, 10 + place)] for place in range(4)] + [[1, 2, 3]]


@pytest.fixture(scope="module")
def model(make_model) -> GPTModel:
    """In float64, so that no two logits are as good as equal."""
    return make_model(dtype=torch.float64).requires_grad_(False)


def answer_plainly(model: GPTModel, prompt: Sequence[int], max_new_tokens: int = 256) -> list[int]:
    """The loop of section 5.3: the whole text again for each token, no cache, one prompt."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + max_new_tokens, CONTEXT):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def endless(model) -> list[list[int]]:
    """The plain loop's answers until the context is full."""
    return [answer_plainly(model, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def end(endless) -> int:
    """A token that ends about half of the answers early."""
    containing = {token: sum(token in answer for answer in endless) for token in range(61)}
    return min(containing, key=lambda token: abs(containing[token] - len(PROMPTS) // 2))


def cut(answer: list[int], max_new_tokens: int, eos_token_id: int | None) -> list[int]:
    """A greedy answer that ends early is the beginning of the one that does not."""
    place = answer.index(eos_token_id) if eos_token_id in answer else len(answer)
    return answer[: min(place, max_new_tokens)]


# --- Greedy ---


@pytest.mark.parametrize("batch_size", [1, 3, 20, 50])
@pytest.mark.parametrize("max_new_tokens", [256, 4])
@pytest.mark.parametrize("ends", [True, False])
def test_greedy_equals_a_plain_loop(model, endless, end, batch_size, max_new_tokens, ends):
    settings = {"max_new_tokens": max_new_tokens, "eos_token_id": end if ends else None}
    expected = [cut(answer, **settings) for answer in endless]
    assert generate(model, PROMPTS, batch_size=batch_size, **settings) == expected


def test_the_plain_loop_covers_every_way_to_end(endless, end):
    """Control for the test above: some answers end early, some at the context, some at neither."""
    answers = [cut(answer, 256, end) for answer in endless]
    full = [len(p) + len(a) == CONTEXT for p, a in zip(PROMPTS, answers, strict=True)]
    assert 3 <= sum(full) <= len(PROMPTS) - 3
    assert len({len(answer) for answer in answers}) > 3
    assert 0 < sum(len(answer) < 4 for answer in answers) < len(PROMPTS)


def test_one_prompt(model):
    expected = answer_plainly(model, [5, 6, 7], 8)
    assert len(expected) == 8
    answers = generate(model, [[5, 6, 7]], max_new_tokens=8, eos_token_id=None)
    assert answers == [expected]
    assert {type(token) for token in answers[0]} == {int}
    assert generate(model, []) == []


def test_the_context_ends_an_answer(model):
    for length in (29, 30, 31):
        prompt = [k % 61 for k in range(length)]
        (answer,) = generate(model, [prompt], eos_token_id=None)
        assert len(answer) == CONTEXT - length
        assert answer == answer_plainly(model, prompt)
    short, long = generate(model, [[1], list(range(31))], eos_token_id=None)
    assert (len(short), len(long)) == (31, 1)


def test_an_answer_may_be_empty(model):
    first = answer_plainly(model, [5], 1)[0]
    told = []
    answers = generate(
        model, [[5]], eos_token_id=first, on_answer=lambda *answer: told.append(answer)
    )
    assert answers == [[]]
    assert told == [(0, [])]


def make_stubborn(model: GPTModel, token: int) -> GPTModel:
    """The model, writing nothing but this token."""
    with torch.no_grad():
        model.final_norm.scale.zero_()
        model.final_norm.shift.fill_(1.0)
        model.out_head.weight.zero_()
        model.out_head.weight[token] = 1.0
    return model


def test_the_settings_default_to_gpt2s_end_of_text(make_model, tiny_config):
    config = dataclasses.replace(tiny_config, vocab_size=50257)
    model = make_stubborn(make_model(config), 50256)
    assert generate(model, [[1, 2]], max_new_tokens=3) == [[]]
    assert generate(model, [[1, 2]], max_new_tokens=3, eos_token_id=None) == [[50256] * 3]


def test_token_zero_is_a_token(make_model):
    """It is as false as the mark of a finished row."""
    model = make_stubborn(make_model(), 0)
    assert generate(model, [[1, 2], [3]], max_new_tokens=3) == [[0, 0, 0], [0, 0, 0]]
    assert generate(model, [[1, 2]], eos_token_id=0) == [[]]


def test_an_answer_is_told_when_it_is_finished(model, end):
    told: list[tuple[int, list[int]]] = []
    answers = generate(
        model,
        PROMPTS,
        batch_size=7,
        eos_token_id=end,
        on_answer=lambda place, answer: told.append((place, list(answer))),
    )
    assert sorted(told) == list(enumerate(answers))
    assert [place for place, _ in told] != sorted(place for place, _ in told)  # as they finish


# --- What is computed ---


def test_nothing_is_computed_twice(model, end, monkeypatch):
    """Common beginnings once, then one token a row, and none for rows that are done."""
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2]]
    tree = {tuple(ids[: stop + 1]) for ids in prompts for stop in range(len(ids))}
    sizes = []
    hidden_states = model.hidden_states

    def record(input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        sizes.append(input_ids.numel())
        return hidden_states(input_ids, **settings)

    monkeypatch.setattr(model, "hidden_states", record)
    answers = generate(model, prompts, eos_token_id=end)
    assert len({len(answer) for answer in answers}) > 1
    assert sizes[0] == len(tree) == 6
    # Each token is fed again, but for one that fills the context; end-of-text is not.
    fed = [min(len(a), CONTEXT - len(p) - 1) for a, p in zip(answers, prompts, strict=True)]
    assert sum(sizes[1:]) == sum(fed)


def test_steps_of_a_batch(model, endless, end):
    """`decode` gives tokens as they come: a row's tokens in order, then None once."""
    answers: list[list[int | None]] = [[] for _ in PROMPTS]
    for step in decode(model, PROMPTS, GenerationConfig(), eos_token_id=end):
        for row, token in step:
            answers[row].append(token)
    assert answers == [[*cut(answer, 256, end), None] for answer in endless]


def test_bf16_autocast(make_model):
    model = make_model().requires_grad_(False)
    prompts = PROMPTS[:6]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = [answer_plainly(model, prompt, 6) for prompt in prompts]
        actual = generate(model, prompts, max_new_tokens=6, eos_token_id=None)
    assert [len(answer) for answer in actual] == [6] * 6
    # Rounded to 8 bits, two tokens may tie; that all of them would is no accident.
    equal = [ours == theirs for ours, theirs in zip(actual, expected, strict=True)]
    assert sum(equal) >= 4


# --- Sampling ---

SAMPLED = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "eos_token_id": None}


def test_sampled_text_does_not_depend_on_the_batch(model):
    expected = generate(model, PROMPTS, batch_size=1, **SAMPLED)
    for batch_size in (3, 20):
        assert generate(model, PROMPTS, batch_size=batch_size, **SAMPLED) == expected
    assert expected != generate(model, PROMPTS, eos_token_id=None)  # not greedy
    assert expected != generate(model, PROMPTS, seed=124, **SAMPLED)


def test_equal_prompts_are_sampled_apart(model):
    first, second, third = generate(model, [[1, 2, 3]] * 3, **SAMPLED)
    assert first != second != third != first
    assert generate(model, [[1, 2, 3]], **SAMPLED) == [first]  # by its place, not its neighbours


PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
DRAWS = 4000


def frequencies(probabilities: list[float], **settings: Any) -> list[float]:
    """How often each token is drawn from these probabilities."""
    logits = torch.tensor(probabilities).log().expand(DRAWS, -1)
    rngs = [torch.Generator().manual_seed(seed) for seed in range(DRAWS)]
    tokens = sample(logits, GenerationConfig(**settings), rngs)
    assert tokens.shape == (DRAWS,)
    return (torch.bincount(tokens, minlength=len(probabilities)) / DRAWS).tolist()


def assert_close(found: list[float], expected: list[float]) -> None:
    # Four standard deviations of a share of 4,000 draws are 0.032 at most.
    assert found == pytest.approx(expected, abs=4 * math.sqrt(0.25 / DRAWS))
    assert [share == 0 for share in found] == [share == 0 for share in expected]


def powers(exponent: float) -> list[float]:
    weights = [probability**exponent for probability in PROBABILITIES]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 2.0}, powers(0.5)),
        ({"temperature": 0.5}, powers(2.0)),
        ({"temperature": 1.0, "top_k": 1}, [1.0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_k": 9}, PROBABILITIES),
        ({"temperature": 1.0, "top_p": 0.4}, [1.0, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.51}, [0.625, 0.375, 0, 0]),  # the token that reaches p
        ({"temperature": 1.0, "top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, PROBABILITIES),
        ({"temperature": 1.0, "top_p": 1e-9}, [1.0, 0, 0, 0]),
        # Among the two likeliest the first has 0.625, which alone reaches 0.6.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [1.0, 0, 0, 0]),
        # The temperature comes first: at 2 the likeliest has 0.377 and does not reach 0.4.
        ({"temperature": 2.0, "top_p": 0.4}, [0.5**0.5, 0.3**0.5, 0, 0]),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.9}, [1.0, 0, 0, 0]),
        ({"temperature": 1e-6}, [1.0, 0, 0, 0]),
        # Beyond float32, whose smallest number is 1e-45 and largest 3e38.
        ({"temperature": 1e-5}, [1.0, 0, 0, 0]),
        ({"temperature": 1e-40}, [1.0, 0, 0, 0]),
        ({"temperature": 1e-46}, [1.0, 0, 0, 0]),
        ({"temperature": 1e300}, [0.25] * 4),
        ({"temperature": 1.0, "top_p": 1e-46}, [1.0, 0, 0, 0]),
        ({"temperature": 1e300, "top_k": 2, "top_p": 5e-324}, [1.0, 0, 0, 0]),
    ],
    ids=str,
)
def test_the_distribution_that_is_drawn_from(settings, expected):
    expected = [share / sum(expected) for share in expected]
    assert_close(frequencies(PROBABILITIES, **settings), expected)


def test_the_order_of_the_vocabulary_does_not_matter():
    """Top-p sorts and must put probabilities back where they belong."""
    found = frequencies([0.05, 0.5, 0.15, 0.3], temperature=1.0, top_p=0.81)
    assert_close(found, [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95])


def test_greedy_takes_the_likeliest_of_each_row():
    logits = torch.tensor([[0.1, 3.0, -1.0], [5.0, 4.9, 4.8]])
    assert sample(logits, GenerationConfig(), []).tolist() == [1, 0]


def test_every_temperature_of_every_order_draws_a_token():
    """Logits as large as a model's, a temperature of each power of ten that a float has."""
    logits = torch.tensor([[-60.0, 80.0, 79.0, 3.0]])
    for power in range(-324, 309):
        settings = GenerationConfig(temperature=float(f"1e{power}"), top_p=0.9, top_k=3)
        (token,) = sample(logits, settings, [torch.Generator().manual_seed(0)]).tolist()
        assert token in (1, 2, 3)


def test_a_seed_of_none_is_drawn_anew(model):
    settings: dict[str, Any] = {**SAMPLED, "seed": None}
    assert len({tuple(generate(model, [[1, 2, 3]], **settings)[0]) for _ in range(3)}) == 3


def test_rows_are_read_as_they_are(make_model):
    """A prompt's last token is computed, whatever it is, and nothing behind it."""
    seen = []
    model = make_model().requires_grad_(False)
    hidden_states = model.hidden_states

    def record(input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append(input_ids.tolist())
        return hidden_states(input_ids, **settings)

    model.hidden_states = record
    read_rows(model, [[1, 2, 60], [1, 2], [60]])
    assert seen == [[1, 2, 60, 60]]


# --- What is left as it was ---


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_global_generator_is_left_alone(model, settings):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    answers = generate(model, PROMPTS[:3], **settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)  # nor does it decide
    assert generate(model, PROMPTS[:3], **settings) == answers
    torch.multinomial(torch.ones(3), 1)
    assert not torch.equal(torch.random.get_rng_state(), state)  # control: a draw without its own


def test_the_mode_is_put_back(make_model, tiny_config):
    model = make_model(dataclasses.replace(tiny_config, drop_rate=0.5))
    expected = generate(model, PROMPTS[:3])
    assert not model.training
    model.train()
    assert generate(model, PROMPTS[:3]) == expected  # without dropout
    assert all(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError):
        generate(model, PROMPTS[:3], on_answer=lambda *answer: 1 / 0)
    assert model.training
    steps = decode(model, PROMPTS[:3], GenerationConfig(), eos_token_id=None)
    next(steps)
    assert not model.training
    steps.close()  # an answer that is broken off
    assert model.training


def test_a_part_in_evaluation_mode_stays_in_it(make_model):
    model = make_model().train()
    model.trf_blocks[0].eval()
    generate(model, [[1]], max_new_tokens=1)
    assert model.training
    assert not model.trf_blocks[0].training


def test_no_gradients_are_recorded(make_model, monkeypatch):
    model, seen = make_model(), []
    assert all(parameter.requires_grad for parameter in model.parameters())
    draw = generation.sample
    monkeypatch.setattr(
        generation, "sample", lambda logits, *rest: seen.append(logits) or draw(logits, *rest)
    )
    generate(model, [[1, 2]], max_new_tokens=3, eos_token_id=None)
    assert [logits.requires_grad for logits in seen] == [False] * 3
    logits = model(torch.tensor([[1, 2]]))  # control: the model is still fit for training
    assert logits.requires_grad


# --- Refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not allowed; it must be >= 1"),
        ({"batch_size": 0}, "batch_size: 0 is not allowed; it must be >= 1"),
        ({"top_k": 0}, "top_k: 0 is not allowed; it must be >= 1"),
        ({"temperature": -0.5}, "temperature: -0.5 must be >= 0"),
        ({"temperature": float("nan")}, "temperature: nan must be >= 0"),
        ({"temperature": float("inf")}, "temperature: inf must be >= 0"),
        ({"top_p": 0.0}, "top_p: 0.0 is outside (0, 1]"),
        ({"top_p": 1.5}, "top_p: 1.5 is outside (0, 1]"),
        ({"top_p": float("nan")}, "top_p: nan is outside (0, 1]"),
    ],
    ids=str,
)
def test_settings_out_of_range(tiny_model, settings, message):
    with pytest.raises(InputError) as error:
        GenerationConfig(**settings)
    assert str(error.value) == f"generation.{message}"
    with pytest.raises(InputError):
        generate(tiny_model, [[1]], **settings)


EMPTY = "is empty; it must hold at least one token"
FULL = "has 32 tokens, which leaves no room for an answer in the model's context of 32"


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize(
    ("prompt", "message"), [([], EMPTY), ([1] * 32, FULL)], ids=["empty", "full"]
)
def test_a_bad_prompt_is_named_before_any_is_answered(tiny_model, prompt, message, bad):
    prompts = [[1, 2], [3], [4, 5, 6]]
    prompts[bad] = prompt
    told: list[Any] = []
    with pytest.raises(InputError) as error:
        generate(
            tiny_model,
            prompts,
            batch_size=1,
            max_new_tokens=1,
            on_answer=lambda *answer: told.append(answer),
        )
    assert str(error.value) == f"prompt {bad} {message}"
    assert told == []
