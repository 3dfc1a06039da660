"""Log-likelihoods and texts for benchmarks, against the plainest way to compute them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.decoding.generation import GenerationConfig, generate
from lightning_sft.evaluating import likelihood
from lightning_sft.evaluating.likelihood import Request, generate_until, loglikelihoods
from lightning_sft.models.gpt2 import GPTConfig

WORDS = GPTConfig(context_length=24, emb_dim=16, n_heads=2, n_layers=1)


def score_plainly(model, context, continuation):
    """One request, no batch, no sharing, the whole head."""
    ids = (context + continuation)[-(model.config.context_length + 1) :]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[-len(continuation) :]
    total = sum(float(log_probs[i, token]) for i, token in enumerate(continuation))
    return total, log_probs.argmax(-1).tolist() == continuation


def make_requests(generator, count=30):
    """Groups of four choices that share a context, of all lengths up to beyond the model's."""
    requests = []
    for _ in range(count // 4):
        length = int(torch.randint(1, 50, (1,), generator=generator))
        context = torch.randint(61, (length,), generator=generator).tolist()
        for choice in range(4):
            size = 1 + choice % 3
            requests.append(
                Request(context, torch.randint(61, (size,), generator=generator).tolist())
            )
    return requests


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_one_request_alone(tiny_model, batch_size):
    requests = make_requests(torch.Generator().manual_seed(5))
    requests.append(Request([1], list(range(32))))  # as long as the context
    told = []
    found = loglikelihoods(tiny_model, requests, batch_size, told.append)
    assert sum(told) == len(requests)
    for (total, greedy), request in zip(found, requests, strict=True):
        wanted, is_greedy = score_plainly(tiny_model, *request)
        assert total == pytest.approx(wanted, abs=1e-4)
        assert greedy == is_greedy


def test_greedy_is_told(tiny_model):
    prompt = [3, 1, 4]
    answer = generate(tiny_model, [prompt], max_new_tokens=5, eos_token_id=None)[0]
    other = [*answer[:-1], (answer[-1] + 1) % 61]
    found = loglikelihoods(tiny_model, [Request(prompt, answer), Request(prompt, other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_choices_of_a_question_read_its_context_once(tiny_model, monkeypatch):
    seen = []
    right = type(tiny_model).hidden_states

    def count(self, input_ids, **rest):
        seen.append(input_ids.numel())
        return right(self, input_ids, **rest)

    monkeypatch.setattr(type(tiny_model), "hidden_states", count)
    context = list(range(20))
    loglikelihoods(tiny_model, [Request(context, [40 + n, 50]) for n in range(4)])
    assert seen == [20 + 4]
    loglikelihoods(tiny_model, [Request(context, [40 + n]) for n in range(4)])
    assert seen[1:] == [20]


def test_the_longest_context_comes_first_and_the_mode_comes_back(tiny_model, monkeypatch):
    seen = []
    right = likelihood._rate_batch
    monkeypatch.setattr(
        likelihood,
        "_rate_batch",
        lambda model, r: seen.append(len(r[0].context)) or right(model, r),
    )
    tiny_model.train()
    loglikelihoods(tiny_model, [Request([1] * n, [2]) for n in (3, 30, 7, 12)], batch_size=1)
    assert seen == [30, 12, 7, 3]
    assert tiny_model.training
    assert loglikelihoods(tiny_model, []) == []


def test_what_cannot_be_rated(tiny_model):
    for request, says in (
        (Request([], [1]), "need a token each"),
        (Request([1], []), "need a token each"),
        (Request([1], [2] * 33), "33 tokens does not fit the model's context of 32"),
    ):
        with pytest.raises(InputError, match=says):
            loglikelihoods(tiny_model, [request])


def test_writing_stops_at_the_first_stop(make_model):
    model = make_model(WORDS)
    contexts = [gpt2_tokenizer().encode(text) for text in ("Hello", "One two three", "A")]
    config = GenerationConfig(max_new_tokens=10, batch_size=2)
    whole = generate_until(model, gpt2_tokenizer(), contexts, [], config)
    assert whole == [
        gpt2_tokenizer().decode(ids) for ids in generate(model, contexts, max_new_tokens=10)
    ]
    stops = [whole[0][5:8], whole[1][9:12], "never"]
    assert all(stops)
    told = []
    cut = generate_until(model, gpt2_tokenizer(), contexts, stops, config, told.append)
    assert sum(told) == 3
    for text, full in zip(cut, whole, strict=True):
        places = [full.find(stop) for stop in stops if stop in full]
        assert text == full[: min(places, default=len(full))]
    assert cut[0] == whole[0][: min(whole[0].find(s) for s in stops if s in whole[0])]


def test_writing_ends_when_all_rows_have_stopped(make_model, monkeypatch):
    model = make_model(WORDS)
    steps = []
    right = likelihood.decode

    def count(*arguments, **rest):
        for step in right(*arguments, **rest):
            steps.append(step)
            yield step

    monkeypatch.setattr(likelihood, "decode", count)
    context = gpt2_tokenizer().encode("Hello")
    config = GenerationConfig(max_new_tokens=12)
    (whole,) = generate_until(model, gpt2_tokenizer(), [context], [], config)
    assert len(steps) == 12
    steps.clear()
    assert generate_until(model, gpt2_tokenizer(), [context], [whole[:3]], config) == [""]
    assert len(steps) < 5


def test_a_long_context_loses_its_beginning(make_model):
    model = make_model(WORDS)
    context = gpt2_tokenizer().encode("a b c d e f g h i j k l m n o p q r s t u v w x y z")
    config = GenerationConfig(max_new_tokens=10)
    assert len(context) > 24
    kept = context[-14:]
    assert generate_until(model, gpt2_tokenizer(), [context], [], config) == generate_until(
        model, gpt2_tokenizer(), [kept], [], config
    )
    with pytest.raises(InputError, match="24 new tokens leave no room for a prompt"):
        generate_until(
            model, gpt2_tokenizer(), [context], [], dataclasses.replace(config, max_new_tokens=24)
        )
