"""The prefix tree of a batch beside the plainest way to build one: a dictionary of its nodes."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.batching import lay_out, pack
from lightning_sft.data.prefix_tree import count_tree, find_shared, side_by_side
from lightning_sft.data.rows import Row

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=7).filter(any)


def walk(rows: list[list[int]], share_prefix: bool) -> dict[str, torch.Tensor]:
    """Token by token: a node is a token behind its parent, numbered as it is first met."""
    width = max(map(len, rows))
    node_of: dict[tuple[int, int], int] = {}
    ids, positions, scatter = [], [], []
    gather = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, row in enumerate(rows):
        parent = -1 if share_prefix else -1 - place
        for position, token in enumerate(row):
            node = node_of.setdefault((parent, token), len(ids))
            if node == len(ids):
                ids.append(token)
                positions.append(position)
                scatter.append(place * width + position)
            gather[place, position] = parent = node
    flat = {"input_ids": ids, "positions": positions, "scatter": scatter}
    return {name: torch.tensor(values) for name, values in flat.items()} | {"gather": gather}


@given(rows=ROWS, share_prefix=st.booleans())
def test_the_layout_is_the_one_of_a_walk_token_by_token(rows, share_prefix):
    found, expected = lay_out(rows, share_prefix=share_prefix), walk(rows, share_prefix)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name  # the order of the N tokens as well
    assert count_tree(rows) == len(walk(rows, True)["input_ids"])


def test_what_a_row_shares_is_that_of_the_best_row_above_it():
    matrix, lengths = side_by_side([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3], [1, 2, 9, 9], [5]])
    shared, donors = find_shared(matrix)
    assert np.minimum(shared, lengths).tolist() == [0, 2, 3, 3, 0]
    assert donors[1:4] == [0, 0, 1]


def test_rows_without_tokens():
    assert count_tree([[], []]) == 0
    assert lay_out([[], []], share_prefix=True)["gather"].shape == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "length"), [(64, 60), (64, 4096)])
def test_packing_takes_less_than_a_microsecond_a_token(count, length):
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, 50_000, length).astype(np.int32), 4, k) for k in range(count)]
    seconds = []
    for _ in range(10):
        begun = time.process_time()
        pack(rows, share_prefix=True)
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 1e-6 * count * length
