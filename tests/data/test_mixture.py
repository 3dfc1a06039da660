"""Several files in one split: how often each row comes, and that seed and epoch decide it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_sft import InstructionDataModule
from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig
from lightning_sft.data.mixture import Source, plan_stretches, read_sources
from lightning_sft.data.order import BatchOrder, Stretch, mix_rows


def write(folder: Path, name: str, count: int, size: int = 5) -> str:
    path = folder / f"{name}.json"
    entries = [{"instruction": f"{name} {n}", "output": "x " * size} for n in range(count)]
    path.write_text(json.dumps(entries))
    return str(path)


def test_rows_come_as_often_as_their_weight_says():
    stretches = [Stretch(0, 10, 1.0), Stretch(10, 14, 2.5), Stretch(14, 24, 0.5)]
    epochs = [mix_rows(stretches, 123, epoch) for epoch in range(4)]
    for rows in epochs:
        counts = Counter(rows)
        assert len(rows) == 10 + 10 + 5
        assert all(counts[row] == 1 for row in range(10))
        assert all(counts[row] in (2, 3) for row in range(10, 14))
        assert all(counts[row] in (0, 1) for row in range(14, 24))
    # After two epochs all of a stretch have come equally often.
    both = Counter(epochs[0] + epochs[1])
    assert [both[row] for row in range(24)] == [2] * 10 + [5] * 4 + [1] * 10
    assert epochs[0] != epochs[2]


def test_an_order_is_a_function_of_seed_and_epoch():
    stretches = (Stretch(0, 10, 1.0), Stretch(10, 14, 2.5))

    def make(seed: int = 123, world_size: int = 1) -> BatchOrder:
        return BatchOrder(np.ones(14), 4, seed, world_size, stretches=stretches)

    assert len(make()) == 5
    assert make().plan(1) == make().plan(1)
    assert make().plan(0) != make().plan(1)
    assert make().plan(0) != make(7).plan(0)
    two = [row for batch in make(world_size=2).plan(0) for part in batch for row in part]
    one = [row for batch in make().plan(0) for part in batch for row in part]
    assert two == one[: len(two)]
    # Without a mixture it is what it always was.
    assert BatchOrder(np.ones(14), 4, 123, stretches=()).plan(0) == BatchOrder(
        np.ones(14), 4, 123
    ).plan(0)


def test_shares_are_of_tokens():
    lengths = np.array([10] * 30 + [40] * 30)
    sources = [Source("a", share=0.6), Source("b", share=0.4)]
    stretches = plan_stretches(sources, [30, 30], np.arange(60), lengths)
    tokens = [lengths[s.begin] * s.num_taken for s in stretches]
    assert sum(tokens) == pytest.approx(lengths.sum(), rel=0.02)
    assert tokens[0] / sum(tokens) == pytest.approx(0.6, rel=0.02)


def test_conversations_of_several_rows_stay_with_their_file():
    indices = np.array([0, 0, 1, 3, 3, 3])  # entry 2 was dropped, 3 is the second file's
    stretches = plan_stretches([Source("a"), Source("b")], [3, 1], indices, np.ones(6))
    assert [s[:2] for s in stretches] == [(0, 3), (3, 6)]


def test_a_mixture_through_the_data_module(tmp_path, capsys):
    mixture = [
        {"path": write(tmp_path, "a", 40), "weight": 1.0},
        {"path": write(tmp_path, "b", 20, 9), "weight": 2},
    ]
    data = InstructionDataModule(mixture=mixture, batch_size=4, drop_last=False)
    data.prepare_data()
    data.setup("fit")
    assert [len(data.split(name)) for name in ("train", "test", "val")] == [34 + 17, 4 + 2, 2 + 1]
    taken = [int(n) for batch in data.train_dataloader() for n in batch["index"]]
    assert len(taken) == 34 + 2 * 17
    assert Counter(Counter(taken).values()) == {1: 34, 2: 17}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mixture")]
    assert [line.split(",")[0] for line in lines] == [
        f"mixture: 34 rows an epoch of the 34 in {mixture[0]['path']}",
        f"mixture: 34 rows an epoch of the 17 in {mixture[1]['path']}",
    ]
    state = data.state_dict()
    assert state["mixture"] == [[0, 34, 1.0], [34, 51, 2]]
    mixture[1]["weight"] = 3
    other = InstructionDataModule(mixture=mixture, batch_size=4, drop_last=False)
    with pytest.raises(
        InputError, match=r"cannot resume with other batches: mixture was \[\[0, 34"
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([], "data.mixture: is empty; give a list of files, each with a weight"),
        ([{"weight": 1}],
         "data.mixture[0]: 'path' is missing; allowed: path, weight, share, format, field_names"),
        ([{"path": "a", "wieght": 1}],
         "data.mixture[0]: unknown key 'wieght'; allowed: path, weight, share, format, "
         "field_names"),
        ([{"path": "a", "weight": 0}],
         "data.mixture[0].weight: 0 is not above 0 and at most 10,000"),
        ([{"path": "a", "weight": "heavy"}],
         "data.mixture[0].weight: 'heavy' is not above 0 and at most 10,000"),
        ([{"path": 5}], "data.mixture[0].path: 5 is not allowed; give a file or URL"),
        ([{"path": "a", "format": "x"}],
         "data.mixture[0].format: unknown 'x'; allowed: auto, instruction, messages, sharegpt, "
         "prompt_completion, preference"),
        ([{"path": "a", "share": 1.5}], "data.mixture[0].share: 1.5 is not between 0 and 1"),
        ([{"path": "a", "share": 0.5}, {"path": "b"}],
         "data.mixture: give every file a weight, or every file a share"),
        ([{"path": "a", "share": 0.5}, {"path": "b", "share": 0.4}],
         "data.mixture: the shares sum to 0.9, not to 1"),
    ],
)  # fmt: skip
def test_what_is_refused(mixture: list[dict[str, Any]], message: str):
    with pytest.raises(InputError) as error:
        read_sources(mixture)
    assert str(error.value) == message


def test_a_missing_file_is_named(tmp_path):
    missing = str(tmp_path / "missing.json")
    config = DataConfig(mixture=[{"path": write(tmp_path, "a", 40)}, {"path": missing}])
    with pytest.raises(InputError, match=f"{missing}: no such file"):
        config.read()


def test_a_file_of_which_nothing_is_taken(tmp_path):
    paths = [write(tmp_path, "a", 40), write(tmp_path, "b", 40)]
    mixture = [{"path": paths[0]}, {"path": paths[1], "weight": 0.001}]
    data = InstructionDataModule(mixture=mixture)
    with pytest.raises(
        InputError, match=f"an epoch takes no row of {paths[1]}; it has 34 training"
    ):
        data.train_dataloader()
