"""A new data file: the old records, cut by the printed config into the wanted splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_sft.common.errors import ServiceError
from lightning_sft.data import new_splits
from lightning_sft.data.config import DataConfig
from lightning_sft.data.entries import Splits
from lightning_sft.data.new_splits import write_splits


def make_records(count: int, name: str = "Do") -> list[dict[str, Any]]:
    return [
        {"instruction": f"{name} {n}", "output": f"Done {n}.", "chosen": n, "tags": ["é", n]}
        for n in range(count)
    ]


def write_json(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def read_back(config_lines: str) -> Splits:
    return DataConfig(**yaml.safe_load(config_lines)["data"]).read().splits


def outputs(splits: Splits) -> list[list[str]]:
    return [[entry.output for entry in part] for part in splits]


@pytest.mark.parametrize("name", ["new.json", "new.jsonl"])
def test_records_keep_all_that_they_hold(tmp_path: Path, name: str) -> None:
    records = make_records(20)
    config = DataConfig(write_json(tmp_path / "old.json", records))
    split_of = np.repeat([0, 1, 2], [17, 2, 1])
    split_of[[3, 4]] = -1
    split_of[5] = 1  # it comes before the old test entries
    written = write_splits(tmp_path / name, config, config.read(), split_of)
    text = written.path.read_text("utf-8")
    assert "é" in text
    found = json.loads(text) if name == "new.json" else [*map(json.loads, text.splitlines())]
    wanted = [n for n in range(17) if n not in (3, 4, 5)] + [5, 17, 18, 19]
    assert found == [records[n] for n in wanted]
    assert written.sizes == {"train": 14, "test": 3, "val": 1}
    new = read_back(written.config)
    assert outputs(new) == [
        [f"Done {n}." for n in part] for part in (wanted[:14], wanted[14:17], wanted[17:])
    ]


def test_the_fractions_stay_where_they_still_fit(tmp_path: Path) -> None:
    config = DataConfig(write_json(tmp_path / "old.json", make_records(40)))
    data = config.read()
    same = np.repeat([0, 1, 2], [len(part) for part in data.splits])
    written = write_splits(tmp_path / "new.json", config, data, same)
    assert "fractions:" not in written.config
    assert read_back(written.config) == data.splits


@pytest.mark.parametrize("count", [3, 7, 100, 1100, 99_991])
def test_printed_fractions_give_the_sizes(count: int) -> None:
    """Every way to cut a few, and some to cut many."""
    entries: Any = [None] * count
    cuts = range(1, count - 1) if count < 10 else (1, 2, count // 3, count // 2)
    for train in cuts:
        for test in {1, (count - train) // 2, count - train - 1}:
            if not 0 < test < count - train:
                continue
            sizes = {"train": train, "test": test, "val": count - train - test}
            lines = new_splits._describe_config(Path("a.json"), DataConfig("b"), entries, sizes)
            settings = yaml.safe_load("\n".join(lines))
            fractions = settings.get("fractions", DataConfig("b").fractions)
            parts = new_splits.split_entries(entries, fractions)
            assert {k: len(v) for k, v in parts._asdict().items()} == sizes


def test_splits_of_their_own_files_go_into_one(tmp_path: Path) -> None:
    config = DataConfig(
        write_json(tmp_path / "train.json", make_records(6)),
        test_path=write_json(tmp_path / "test.json", make_records(3, "Try")),
        val_path=write_json(tmp_path / "val.json", make_records(2, "Ask")),
    )
    data = config.read()
    split_of = np.repeat([0, 1, 2], [6, 3, 2])
    split_of[0] = -1
    written = write_splits(tmp_path / "new.json", config, data, split_of)
    assert read_back(written.config) == data.splits._replace(train=data.splits.train[1:])
    assert "val_path: null" in written.config


def test_equal_entries_keep_their_own_records(tmp_path: Path) -> None:
    records = make_records(20)
    records[18] = records[2] | {"chosen": "another"}
    config = DataConfig(write_json(tmp_path / "old.json", records))
    split_of = np.repeat([0, 1, 2], [17, 2, 1])
    written = write_splits(tmp_path / "new.json", config, config.read(), split_of)
    assert json.loads(written.path.read_text()) == records


def test_entries_left_out_as_blank_stay_out(tmp_path: Path) -> None:
    records = make_records(20)
    records[4]["output"] = " "
    config = DataConfig(write_json(tmp_path / "old.json", records), empty_output="skip")
    data = config.read()
    split_of = np.repeat([0, 1, 2], [len(part) for part in data.splits])
    written = write_splits(tmp_path / "new.json", config, data, split_of)
    assert json.loads(written.path.read_text()) == records[:4] + records[5:]


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(write_json(tmp_path / "old.json", make_records(20)))
    data = config.read()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", refuse)
    with pytest.raises(ServiceError, match=r"new\.json: cannot be written \(No space left"):
        write_splits(tmp_path / "new.json", config, data, np.repeat([0, 1, 2], [17, 2, 1]))
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
