"""The order of batches: the chapter's, the same for any number of ranks, resumable anywhere."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import BatchMaker
from lightning_sft.data.loader import EvalLoader, TrainLoader
from lightning_sft.data.order import deal, epoch_order
from lightning_sft.data.rows import Row, TokenRows


def make_rows(count: int) -> list[Row]:
    """Row `i` holds 1 + i % 7 tokens, all of them `i`."""
    return [Row([number] * (1 + number % 7), 1, number) for number in range(count)]


def collate(rows: list[Row]) -> dict[str, Any]:
    return {"index": [row.index for row in rows], "first": [row.ids[0] for row in rows]}


def make_loader(count: int = 23, **settings: Any) -> TrainLoader:
    rows = make_rows(count)
    lengths = np.array([len(row.ids) for row in rows])
    given = {"batch_size": 4, "seed": 123, "num_targets": 100 * lengths, "num_tokens": lengths}
    return TrainLoader(rows, collate, **(given | settings))


def indices(batches: Any) -> list[list[int]]:
    return [batch["index"] for batch in batches]


def flat(parts: Any) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


# --- Order ---


@pytest.mark.parametrize("num_rows", [1, 2, 935, 4_097, 30_001])
@pytest.mark.parametrize("seed", [0, 123, 2**32 - 1])
def test_the_order_is_torchs(num_rows, seed):
    """Sizes on both sides of where exchanges are made many at once."""
    torch.manual_seed(seed)
    theirs = DataLoader(
        range(num_rows),  # type: ignore[arg-type]
        batch_size=num_rows,
        shuffle=True,
        collate_fn=list,
    )
    for epoch in range(3):
        assert [epoch_order(num_rows, seed, epoch)] == list(theirs)


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("seed", [0, 123])
def test_the_order_is_that_of_a_shuffling_dataloader(seed, num_workers):
    torch.manual_seed(seed)
    theirs = DataLoader(range(50), shuffle=True, num_workers=num_workers)  # type: ignore[arg-type]
    for epoch in range(3):
        assert epoch_order(50, seed, epoch) == [int(batch) for batch in theirs]


def test_the_chapters_loader(book_entries):
    """Section 7.5: shuffled, batches of 8, last one dropped; the whole first epoch."""
    torch.manual_seed(123)
    theirs = DataLoader(range(935), batch_size=8, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    ours = make_loader(len(book_entries) * 85 // 100, batch_size=8)
    assert indices(ours) == [batch.tolist() for batch in theirs]


def test_the_order_depends_on_seed_and_epoch_alone():
    first = epoch_order(30, 5, 1)
    torch.manual_seed(99)
    torch.rand(7)
    assert epoch_order(30, 5, 1) == first
    assert sorted(first) == list(range(30))
    others = [epoch_order(30, 5, 0), epoch_order(30, 5, 2), epoch_order(30, 6, 1)]
    assert first not in others


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batching_leaves_the_global_generator_alone(num_workers):
    loaders = [
        make_loader(num_workers=num_workers),
        EvalLoader(make_rows(9), collate, batch_size=2, num_workers=num_workers),
    ]
    state = torch.random.get_rng_state()
    for loader in loaders:
        list(loader)
        assert torch.equal(torch.random.get_rng_state(), state)
    next(iter(DataLoader(range(3))))  # type: ignore[arg-type]
    assert not torch.equal(torch.random.get_rng_state(), state)  # control: torch's own draws


def test_every_epoch_has_an_order_of_its_own():
    epoch = 0
    loader = make_loader(current_epoch=lambda: epoch)
    seen = []
    for epoch in range(3):  # the loader asks for it
        order = epoch_order(23, 123, epoch)
        assert flat(indices(loader)) == order[:20]
        seen.append(order)
    assert len(set(map(tuple, seen))) == 3


# --- Ranks ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_slices_of_the_ranks_make_up_the_order(world_size):
    count, batch_size = 25, 4
    ranks = [
        indices(make_loader(count, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    together = [flat(parts) for parts in zip(*ranks, strict=True)]
    order, size = epoch_order(count, 123, 0), batch_size * world_size
    assert together == [order[k : k + size] for k in range(0, count - size + 1, size)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # order[4:] on two ranks of batch size 2: what is missing is filled by repeats (-1)
        (5, [[4], [-1]]),
        (6, [[4], [5]]),
        (7, [[4, 5], [6, -1]]),
        (8, [[4, 5], [6, 7]]),
    ],
)
def test_a_ragged_end_is_filled_with_repeats(count, expected):
    order = epoch_order(count, 123, 0)
    settings = {"batch_size": 2, "world_size": 2, "drop_last": False}
    loaders = [make_loader(count, rank=rank, **settings) for rank in range(2)]
    assert {len(loader) for loader in loaders} == {2}
    for loader, places in zip(loaders, expected, strict=True):
        batches = list(loader)
        assert len(batches) == 2
        wanted = [-1 if place < 0 else order[place] for place in places]
        assert batches[-1]["index"] == wanted
        repeated = [batches[-1]["first"][k] for k, place in enumerate(places) if place < 0]
        assert repeated == [order[-1]] * len(repeated)  # the last row's own tokens
        assert batches[-1]["num_tokens"] == sum(1 + n % 7 for n in order[4:])


def test_deal():
    assert deal([7, 3, 5], 1) == [[7, 3, 5]]
    assert deal([7, 3, 5, 0], 2) == [[7, 3], [5, 0]]
    assert deal([7, 3, 0], 2) == [[7, 3], [0, -1]]
    assert deal([4], 3) == [[4], [-5], [-5]]
    assert deal([1, 2, 3, 4], 3) == [[1, 2], [3, 4], [-5, -5]]


# --- Sizes ---


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"),
    [
        (23, True, [4] * 5),
        (23, False, [4] * 5 + [3]),
        (24, True, [4] * 6),
        (24, False, [4] * 6),
        (3, False, [3]),
    ],
)
def test_drop_last(count, drop_last, sizes):
    loader = make_loader(count, drop_last=drop_last)
    assert [len(part) for part in indices(loader)] == sizes
    assert len(loader) == len(sizes)


def test_a_batch_of_more_than_there_is():
    with pytest.raises(InputError) as error:
        make_loader(7, batch_size=4, world_size=2)
    assert str(error.value) == (
        "data.batch_size: 4 on 2 device(s) needs at least 8 training entries, there are 7; give a "
        "smaller batch_size or set data.drop_last to false"
    )
    make_loader(8, batch_size=4, world_size=2)
    make_loader(7, batch_size=4, world_size=2, drop_last=False)


# --- What a step is divided by ---


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_step_targets(world_size, accumulate, drop_last):
    """Counted here batch by batch and rank by rank, over windows of `accumulate` micro-batches."""
    settings = {"world_size": world_size, "accumulate": accumulate, "drop_last": drop_last}
    ranks = [list(make_loader(27, batch_size=2, rank=r, **settings)) for r in range(world_size)]
    counts = [
        sum(1 + index % 7 for batch in parts for index in batch["index"] if index >= 0)
        for parts in zip(*ranks, strict=True)
    ]
    for batches in ranks:
        assert [batch["num_tokens"] for batch in batches] == counts
        for place, batch in enumerate(batches):
            begin = place - place % accumulate
            # The last window of an epoch may be shorter.
            assert batch["step_targets"] == 100 * sum(counts[begin : begin + accumulate])


def test_step_targets_of_an_even_example():
    """Rows of one token each, 100 targets a token: literal values."""
    ones = np.ones(10, dtype=np.int64)
    loader = TrainLoader(
        [Row([0], 1, n) for n in range(10)],
        collate,
        num_targets=100 * ones,
        num_tokens=ones,
        batch_size=2,
        seed=0,
        accumulate=2,
    )
    assert [batch["step_targets"] for batch in loader] == [400, 400, 400, 400, 200]
    assert [batch["num_tokens"] for batch in loader] == [2] * 5


# --- Resume ---


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(taken, num_workers):
    settings = {"num_workers": num_workers, "accumulate": 2, "current_epoch": lambda: 1}
    whole = list(make_loader(**settings))
    stopped = make_loader(**settings)
    batches = iter(stopped)
    for _ in range(taken):
        next(batches)
    state = stopped.state_dict()
    # Workers have prefetched more; what counts is what was handed out.
    assert state == ({"epoch": 1, "batches": taken} if taken else {"epoch": 0, "batches": 0})
    del batches
    resumed = make_loader(**settings)
    resumed.load_state_dict(state)
    assert len(resumed) == 5
    assert list(resumed) == whole[taken:]
    assert list(resumed) == whole  # the next pass is whole again


def test_the_state_counts_on_after_a_resume():
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "batches": 2})
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "batches": 3}


def test_a_state_of_another_epoch_is_not_applied():
    """A checkpoint from the end of an epoch: the next one starts at its beginning."""
    loader = make_loader(current_epoch=lambda: 2)
    loader.load_state_dict({"epoch": 1, "batches": 5})
    assert list(loader) == list(make_loader(current_epoch=lambda: 2))


def test_a_finished_epoch_has_nothing_left():
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "batches": 5})
    assert list(loader) == []
    assert loader.state_dict() == {"epoch": 0, "batches": 5}


def test_a_place_is_kept_until_it_is_used():
    """Stopped again before the first batch: the next checkpoint must not start the epoch anew."""
    loader = make_loader()
    loader.load_state_dict({"epoch": 1, "batches": 3})
    assert loader.state_dict() == {"epoch": 1, "batches": 3}


def test_the_state_is_plain():
    assert {type(value) for value in make_loader().state_dict().values()} == {int}


# --- Like lengths together ---


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_grouping_covers_the_same_rows(drop_last, world_size):
    count, settings = 501, {"batch_size": 4, "drop_last": drop_last, "world_size": world_size}
    plain, grouped = (
        [list(make_loader(count, rank=r, group_by_length=g, **settings)) for r in range(world_size)]
        for g in (False, True)
    )
    seen = [
        Counter(i for batches in ranks for part in indices(batches) for i in part if i >= 0)
        for ranks in (plain, grouped)
    ]
    assert seen[0] == seen[1]
    assert max(seen[0].values()) == 1
    sizes = [[len(part) for part in indices(ranks[0])] for ranks in (plain, grouped)]
    assert sizes[0] == sizes[1]  # a short batch stays last


def test_grouping_goes_by_the_lengths_that_it_is_given():
    """Before any cut: what is cut to one length keeps its order, and old runs go on with it."""
    lengths = np.arange(40)[::-1]
    settings = {"group_by_length": True, "num_tokens": np.full(40, 5), "lengths": lengths}
    batches = indices(make_loader(40, **settings))
    assert sorted(map(sorted, batches)) == [list(range(k, k + 4)) for k in range(0, 40, 4)]
    assert all(part == sorted(part, reverse=True) for part in batches)


def test_grouping_groups():
    """Longest minus shortest row of a batch, summed: what padding costs."""

    def spread(group_by_length: bool) -> int:
        batches = make_loader(400, group_by_length=group_by_length)
        lengths = [[1 + index % 7 for index in part] for part in indices(batches)]
        return sum(max(part) - min(part) for part in lengths)

    assert spread(group_by_length=True) * 5 < spread(group_by_length=False)


def test_grouped_batches_come_in_a_seeded_mixed_order():
    """One window of 50 batches, so that sorting gives the same lengths whatever the order."""

    def longest_of_each_batch(seed: int, epoch: int) -> list[int]:
        settings = {"group_by_length": True, "seed": seed, "current_epoch": lambda: epoch}
        return [max(1 + i % 7 for i in part) for part in indices(make_loader(200, **settings))]

    lengths = longest_of_each_batch(1, 0)
    assert lengths == longest_of_each_batch(1, 0)
    for seed, epoch in ((2, 0), (1, 1)):
        other = longest_of_each_batch(seed, epoch)
        assert other != lengths
        assert sorted(other) == sorted(lengths)
    assert lengths != sorted(lengths)


# --- Evaluation ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 7, 8, 12])
def test_every_row_is_evaluated_once_and_ranks_stay_in_step(count, world_size):
    rows = make_rows(count)
    ranks = [
        EvalLoader(rows, collate, batch_size=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [list(loader) for loader in ranks]
    assert {len(part) for part in batches} == {-(-count // (2 * world_size))}
    assert {len(loader) for loader in ranks} == {len(batches[0])}
    together = [flat(indices(parts)) for parts in zip(*batches, strict=True)]
    assert [index for index in flat(together) if index >= 0] == list(range(count))
    for parts in zip(*batches, strict=True):
        assert len({len(batch["index"]) for batch in parts}) == 1


def test_repeats_add_nothing_to_the_loss():
    rows = TokenRows.from_rows(make_rows(5))
    maker = BatchMaker(max_length=9, mask_prompt=False, padding_free=False, share_prefix=False)
    batches = [
        batch
        for rank in range(2)
        for batch in EvalLoader(rows, maker, batch_size=2, rank=rank, world_size=2)
    ]
    assert sum(len(batch["index"]) for batch in batches) == 6  # one repeat
    supervised = sum(int((batch["targets"] != -100).sum()) for batch in batches)
    assert supervised == rows.count_targets(9, mask_prompt=False).sum() == 1 + 2 + 3 + 4 + 5


def test_an_evaluation_loader_repeats_itself():
    loader = EvalLoader(make_rows(5), collate, batch_size=2)
    assert list(loader) == list(loader)
