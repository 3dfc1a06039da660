"""Micro-batches of a number of tokens: full, alike for all ranks, the same number each epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.common.errors import InputError
from lightning_sft.data.order import row_places
from lightning_sft.data.token_budget import TokenBudgetOrder

LENGTHS = np.random.default_rng(0).integers(5, 90, 400)


def make(lengths=LENGTHS, max_tokens=400, **settings) -> TokenBudgetOrder:
    return TokenBudgetOrder(np.asarray(lengths), max_tokens, 123, **settings)


def cost(order: TokenBudgetOrder, share: list[int]) -> int:
    lengths = order.lengths[row_places(share)]
    return int(lengths.max() * len(lengths) if order.padded else lengths.sum())


@pytest.mark.parametrize("padded", [True, False])
@given(
    lengths=st.lists(st.integers(1, 30), min_size=3, max_size=60),
    world_size=st.integers(1, 3),
    largest_first=st.booleans(),
)
def test_every_row_once_and_never_more_tokens(padded, lengths, world_size, largest_first):
    order = make(lengths, 40, padded=padded, world_size=world_size, largest_first=largest_first)
    for epoch in range(3):
        plan = order.plan(epoch)
        assert len(plan) == len(order)
        shares = list(itertools.chain.from_iterable(plan))
        rows = sorted(row for share in shares for row in share if row >= 0)
        assert rows == list(range(len(lengths)))
        assert all(len(batch) == world_size for batch in plan)
        assert max(cost(order, share) for share in shares) <= 40


@pytest.mark.parametrize("padded", [True, False])
def test_batches_are_nearly_full(padded):
    order = make(padded=padded)
    computed = sum(cost(order, share) for batch in order.plan(0) for share in batch)
    assert computed / (len(order) * order.max_tokens) > 0.9
    assert computed <= 1.1 * LENGTHS.sum()


def test_an_order_is_a_function_of_seed_and_epoch():
    order = make(padded=False)
    assert order.plan(1) == make(padded=False).plan(1)
    assert order.plan(0) != order.plan(1)
    other = TokenBudgetOrder(LENGTHS, 400, 7, padded=False)
    assert order.plan(0) != other.plan(0)
    # The same sizes each epoch, and other rows together.
    sizes = [sorted(cost(order, b[0]) for b in order.plan(epoch)) for epoch in range(2)]
    assert sizes[0] == sizes[1]
    together = [{frozenset(share) for [share] in order.plan(epoch)} for epoch in range(2)]
    assert len(together[0] & together[1]) < len(order) / 4


def test_ranks_work_alike():
    for padded in (True, False):
        order = make(padded=padded, world_size=4)
        costs = [[cost(order, share) for share in batch] for batch in order.plan(0)]
        # What a step waits for is its slowest rank.
        assert sum(map(sum, costs)) > 0.95 * 4 * sum(map(max, costs))


def test_the_largest_comes_first_on_request():
    for epoch in range(3):
        order = make(padded=False, largest_first=True)
        costs = [cost(order, share) for [share] in order.plan(epoch)]
        assert costs[0] == max(costs)
    plain = [cost(order, share) for [share] in make(padded=False).plan(0)]
    assert sorted(plain) == sorted(costs)
    assert plain[0] != max(plain)  # control


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"data\.max_tokens: 40 is less than the 89 tokens of the"):
        make(max_tokens=40)
    with pytest.raises(InputError, match="3 devices need as many training rows, there are 2"):
        make([5, 5], world_size=3)
