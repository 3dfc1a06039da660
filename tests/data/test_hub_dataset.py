"""Data sets of the hub: which files an address means, and that they are fetched once and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_sft import Entry
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.data.config import DataConfig
from lightning_sft.data.entries import read_entries, read_entry_file
from lightning_sft.data.hub_dataset import choose_files, parse_address
from support.hub import Reply
from support.model_hub import COMMIT, ModelHub, damage

pyarrow = pytest.importorskip("pyarrow")
NAME = "owner/talks"
SHARDS = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)] + [
    "data/test-00000-of-00001.parquet"
]


def parquet(*texts: str) -> bytes:
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    records = [{"instruction": text, "output": text.upper()} for text in texts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelHub]:
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path / "ours"))
    with ModelHub(monkeypatch, tmp_path / "theirs") as hub:
        yield hub


def add(hub: ModelHub, content: dict[str, bytes], revision: str = "main") -> None:
    hub.add(f"datasets/{NAME}", content, revision=revision)
    info: dict[str, Any] = {"id": NAME, "sha": COMMIT}
    info["siblings"] = [{"rfilename": name} for name in content]
    quoted = revision.replace("/", "%2F")
    address = f"/api/datasets/{NAME}/revision/{quoted}"
    hub.server.default[address] = Reply(200, json.dumps(info).encode())


def entries(*texts: str) -> list[Entry]:
    return [Entry(text, "", text.upper()) for text in texts]


def test_a_split_is_fetched_once(hub: ModelHub) -> None:
    bodies = [parquet("a", "b"), parquet("c"), parquet("d")]
    add(hub, dict(zip(SHARDS, bodies, strict=True)))
    assert read_entries(f"hf://{NAME}") == entries("a", "b", "c")
    assert read_entries(f"hf://{NAME}:test") == entries("d")
    hub.forget()
    assert read_entries(f"hf://{NAME}") == entries("a", "b", "c")
    assert hub.requests == []


def test_messages_name_the_address(hub: ModelHub) -> None:
    add(hub, {SHARDS[0]: parquet("a", " ")})
    lines: list[str] = []
    address = f"hf://{NAME}"
    with pytest.raises(InputError, match=f"^{address}: entry 1: 'instruction' is blank"):
        read_entry_file(address, format="auto", say=lines.append)
    assert lines == [
        f"{address}: a folder of tables, 2 records in the format instruction (recognised by its "
        "fields)"
    ]


def test_a_damaged_file_is_fetched_again(hub: ModelHub, capsys: pytest.CaptureFixture[str]) -> None:
    add(hub, {SHARDS[0]: parquet("a"), SHARDS[1]: parquet("c")})
    read_entries(f"hf://{NAME}")
    damage(next(hub.cache.rglob("train-00000*.parquet")))
    hub.forget()
    assert read_entries(f"hf://{NAME}") == entries("a", "c")
    assert "is damaged and fetched again" in capsys.readouterr().err
    assert hub.asked_for() >= {"train-00000-of-00002.parquet"}
    assert "train-00001-of-00002.parquet" not in hub.asked_for()


def test_what_the_hub_made_of_it(hub: ModelHub) -> None:
    add(hub, {"talks.jsonl": b"{}"})
    add(hub, {"default/train/0000.parquet": parquet("a")}, revision="refs/convert/parquet")
    assert read_entries(f"hf://{NAME}") == entries("a")


def test_a_validation_split_of_its_own(hub: ModelHub) -> None:
    add(hub, dict(zip(SHARDS, [parquet("a"), parquet("b"), parquet("c")], strict=True)))
    config = DataConfig(f"hf://{NAME}", val_path=f"hf://{NAME}:test", test_path=f"hf://{NAME}:test")
    splits = config.read().splits
    assert (splits.train, splits.val) == (entries("a", "b"), entries("c"))


ALL = [
    "all/train-00000-of-00001-a1b2.parquet", "code/train-00000-of-00001.parquet",
    "code/test_sft-00000-of-00001.parquet",
]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "address", "chosen"),
    [
        (SHARDS, "", SHARDS[:2]),
        (SHARDS, ":test", SHARDS[2:]),
        (ALL, "/all", ALL[:1]),
        (ALL, "/code:test_sft", ALL[2:]),
        (ALL, "@v1/code", ALL[1:2]),
        (["only.parquet"], "", ["only.parquet"]),
        (["default/x/0000.parquet", "default/x/0001.parquet"], "",
         ["default/x/0000.parquet", "default/x/0001.parquet"]),
        (ALL, "", "which configuration? add one of /all, /code"),
        (ALL, "/math", "which configuration? add one of /all, /code"),
        (ALL[1:], ":dev", "which split? add one of :test_sft, :train"),
        (["a.parquet", "b.parquet"], "", "which split? add one of :a, :b"),
    ],
)  # fmt: skip
def test_which_files_are_meant(paths: list[str], address: str, chosen: list[str] | str) -> None:
    parsed = parse_address(f"hf://{NAME}{address}")
    if isinstance(chosen, list):
        assert choose_files(paths, parsed) == chosen
        return
    with pytest.raises(InputError) as error:
        choose_files(paths, parsed)
    assert str(error.value).endswith(chosen)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://owner", "hf://../x", "hf://a/b/c/d", "hf://a/b:", "hf://a b/c"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match="is no address on the hub; it is hf://owner/name, with"):
        parse_address(address)


def test_failures_are_one_line(hub: ModelHub) -> None:
    with pytest.raises(InputError, match="'datasets/owner/talks' is neither a file or folder here"):
        read_entries(f"hf://{NAME}")
    add(hub, {"readme.md": b""})
    hub.server.default[f"/api/datasets/{NAME}/revision/refs%2Fconvert%2Fparquet"] = Reply(
        404, b"", {"X-Error-Code": "RevisionNotFound"}
    )
    with pytest.raises(InputError, match=f"hf://{NAME}: has no Parquet files"):
        read_entries(f"hf://{NAME}")
    hub.set("HF_HUB_OFFLINE", True)
    with pytest.raises(ServiceError, match="no request; give its files as paths of"):
        read_entries(f"hf://{NAME}")
