"""Prompts that go on from finished rows: the same tokens, and only what is new is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sft.decoding import kept_rows
from lightning_sft.decoding.batch import RunningBatch
from lightning_sft.decoding.generation import GenerationConfig, decode, generate
from lightning_sft.decoding.kept_rows import KeptRow, KeptRows
from lightning_sft.models.gpt2 import GPTConfig
from support.tiny_run import CONFIG, make_tiny

GPT2 = GPTConfig(vocab_size=61, context_length=256, emb_dim=24, n_heads=3, n_layers=2)
LENGTH = 12  # tokens an answer


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, make_model) -> Any:
    """In float64, so that no two logits are as good as equal."""
    if request.param == "gpt2":
        return make_model(GPT2, dtype=torch.float64).requires_grad_(False)
    return make_tiny(CONFIG).to(torch.float64).eval().requires_grad_(False)


@pytest.fixture
def read(model, monkeypatch) -> list[int]:
    """How many tokens each forward pass was given."""
    counts: list[int] = []
    right = model.hidden_states

    def count(input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        counts.append(input_ids.numel())
        return right(input_ids, **settings)

    monkeypatch.setattr(model, "hidden_states", count)
    return counts


def question(turn: int) -> list[int]:
    return [(5 * turn + 7 * k + k * k) % 59 for k in range(24)]


def row(ids: list[int], size: int = 1) -> KeptRow:
    return KeptRow(ids, torch.zeros(1, 1, len(ids), size), torch.zeros(1, 1, len(ids), size))


def answer(model: Any, prompt: list[int], kept: KeptRows | None, **settings: Any) -> list[int]:
    config = GenerationConfig(max_new_tokens=LENGTH, **settings)
    steps = decode(model, [prompt], config, eos_token_id=None, kept=kept)
    return [token for step in steps for _, token in step if token is not None]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "drawn"])
def test_five_turns_are_those_of_one_uncached_pass(model, read, sampled):
    kept, said, first_pass = KeptRows(10**9), [], []
    for turn in range(5):
        said = said + question(turn)
        read.clear()
        found = answer(model, said, kept, **sampled)
        first_pass.append(read[0])
        settings: dict[str, Any] = {"max_new_tokens": LENGTH, "eos_token_id": None} | sampled
        assert found == generate(model, [said], **settings)[0]
        said += found
    # The question, and the token that the answer before ended with, which was never fed.
    assert first_pass == [24, 25, 25, 25, 25]
    assert len(kept.rows) == 1  # each turn took the place of the one before


def test_an_answer_that_comes_back_otherwise_is_read_from_there(model, read):
    kept = KeptRows(10**9)
    said = question(0) * 3
    found = answer(model, said, kept)
    other = [*said, *found[:4], (found[4] + 1) % 59, *question(1)]
    read.clear()
    again = answer(model, other, kept)
    assert read[0] == 25
    assert again == generate(model, [other], max_new_tokens=LENGTH, eos_token_id=None)[0]
    assert len(kept.rows) == 2
    answer(model, said, kept)  # the same question again
    assert read[-LENGTH] == 1


def test_some_of_those_who_join_go_on_from_a_row(model):
    kept = KeptRows(10**9)
    old = question(0) * 3
    answer(model, old, kept)
    prompts = [[*old, 5], question(2), [*old, *question(3)], [1], [*old[:-1], 7, 8]]
    batch, plain = RunningBatch(model, kept=kept), RunningBatch(model)
    for one in (batch, plain):
        one.join([[3, 4]])
        one.join(prompts)
    torch.testing.assert_close(batch.logits, plain.logits)
    for _ in range(3):
        tokens = plain.logits.argmax(-1)
        batch.feed(tokens)
        plain.feed(tokens)
        torch.testing.assert_close(batch.logits, plain.logits)


def test_no_longer_than_there_is_room_and_the_last_used_stay():
    kept = KeptRows(3 * row([0] * 40).num_bytes)
    rows = [row([place] * 40) for place in range(3)]
    for one in rows:
        kept.add(one)
    assert kept.find([0] * 50) == (rows[0], 40)
    kept.add(row([9] * 41))  # the two that were of use longest ago
    assert [one.ids[0] for one in kept.rows] == [0, 9]
    kept.add(row([4] * 200))  # larger than all there is
    assert [one.ids[0] for one in kept.rows] == [0, 9]
    kept.clear()
    assert kept.find([0] * 50) is None
    nothing = KeptRows(0)
    nothing.add(rows[0])
    assert nothing.rows == []


def test_the_longest_beginning_counts():
    kept = KeptRows(10**9)
    kept.add(row([1] * 40 + [2] * 10))
    kept.add(row([1] * 45))
    kept.add(row([1] * 40 + [3] * 10))
    assert kept.count([1] * 40 + [2] * 4 + [5]) == 44
    assert kept.count([1] * 50) == 45
    assert kept.count([1] * 45) == 44  # something must be left to read
    assert kept.count([1] * (kept_rows.WORTH_KEEPING - 1) + [2]) == 0
    assert kept.count([1] * kept_rows.WORTH_KEEPING + [2]) == kept_rows.WORTH_KEEPING
    kept.add(row([1] * 60))  # goes on from the second alone
    assert sorted(len(one.ids) for one in kept.rows) == [50, 50, 60]


def test_other_weights_forget_what_was_read(make_model):
    model, kept = make_model(GPT2), KeptRows(10**9)
    kept.check(model)
    kept.add(row([1] * 40))
    kept.check(model)
    assert kept.rows
    with torch.no_grad():
        model.tok_emb.weight.mul_(2)
    kept.check(model)
    assert not kept.rows
