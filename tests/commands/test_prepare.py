"""`prepare` as a person meets it: what it says, what it writes, and what it will not touch."""

from __future__ import annotations

import datetime
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from alpaca_scale import make_entries
from lightning_sft.data.config import DataConfig
from support.runs import run

EVIL = '</script><script>pwned()</script><img src="http://evil/x" onerror="pwned()">'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 entries, no two alike, but for two that test has from train and one that train repeats."""
    records = [make_record(n) for n in range(40)]
    records[5] = records[2] | {"output": "Another."}
    records[35] = records[7] | {"instruction": records[7]["instruction"] + "!"}
    records[36] = records[8] | {"instruction": records[8]["instruction"].upper()}
    records[1]["instruction"] = EVIL
    records[1]["output"] = EVIL
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def make_record(n: int) -> dict[str, Any]:
    words = [f"{(n * 7919 + k * 104729) % 99991:x}" for k in range(12)]  # no two texts alike
    return {"instruction": f"Explain {' '.join(words)}", "output": f"Answer {n}.", "source": n}


def prepare(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    assert run("prepare", *arguments) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def summary(folder: Path = Path()) -> dict[str, Any]:
    return json.loads((folder / "data-quality.json").read_text())


def test_the_chapters_data(book_data_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(capsys, "--data.path", book_data_path)
    assert "935 training, 110 test and 55 validation entries" in out
    assert "repeats: 25 entries" in out
    assert "near-twins at 0.9: 6 of 110 test and 7 of 55 validation entries have one in tr" in out
    assert "1,099 Latin" in out or "1,100 Latin" in out
    found = summary()
    assert found["near_twins"]["test"]["train"] == 6
    assert found["near_twins"]["val"]["train"] == 7
    assert found["repeats"] == {"train": 19, "test": 1, "val": 0, "all": 25}
    assert len(found["evaluated"]) == 165
    twins = [record for record in found["evaluated"] if record["twin"] is not None]
    assert len(twins) == 13
    for record in twins:
        assert 0.9 <= record["similarity"] <= 1
        assert record["twin"] < 935
    assert sorted(path.name for path in Path().iterdir()) == [
        "data-quality.html",
        "data-quality.json",
    ]
    page = Path("data-quality.html").read_text()
    assert page.count("<script") == 2
    assert "Test entries with a near-twin in training" in page


def test_regrouped_chapters_data_has_no_leak(
    book_data_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = book_data_path.read_bytes()
    options = ["--data.path", book_data_path, "--policy", "regroup", "--output", "new.json"]
    out = prepare(capsys, *options)
    assert "wrote new.json: train 935, test 110, val 55; 0 left out" in out
    assert "fractions" not in out
    old, new = (json.loads(path.read_text()) for path in (book_data_path, Path("new.json")))
    assert sorted(map(json.dumps, old)) == sorted(map(json.dumps, new))
    again = prepare(capsys, "--data.path", "new.json", "--page", "again.html")
    assert "near-twins at 0.9: 0 of 110 test and 0 of 55 validation entries" in again
    assert json.loads(Path("again.json").read_text())["near_twins"]["val"]["test"] == 0
    assert book_data_path.read_bytes() == before


@pytest.mark.parametrize(
    ("policy", "missing"),
    [("drop_duplicates", {5}), ("drop_leaks", {7, 8}), ("drop_leaks, drop_duplicates", {5, 7, 8})],
)
def test_what_a_policy_leaves_out(
    data: Path, policy: str, missing: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    options = ["--data.path", data, "--policy", policy, "--output", "new.jsonl"]
    out = prepare(capsys, *options)
    assert f"; {len(missing)} left out" in out
    kept = [json.loads(line) for line in Path("new.jsonl").read_text().splitlines()]
    assert kept == [r for n, r in enumerate(json.loads(before)) if n not in missing]
    config = yaml.safe_load(out[out.index("data:\n") : out.index("\n\nPage")])
    sizes = [len(part) for part in DataConfig(**config["data"]).read().splits]
    assert sizes == [34 - len(missing), 4, 2]
    assert summary()["output"] == {
        "path": "new.jsonl", "train": 34 - len(missing), "test": 4, "val": 2
    }  # fmt: skip
    assert data.read_bytes() == before


def test_the_page_shows_texts_and_obeys_none(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(capsys, "--data.path", data)
    page = Path("data-quality.html").read_text()
    assert page.count("<script") == 2  # the data and the page's own
    assert 'onerror="' not in page
    assert "pwned()&lt;/script&gt;" in page or "pwned()" not in page
    record = json.loads(data.read_text())[36]
    assert record["instruction"] in page  # the leak
    assert "training 8" in page


def test_a_run_gets_its_own(
    data: Path, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs/tiny/version_0"
    folder.mkdir(parents=True)
    config = {"data": {"path": str(data), "batch_size": 4}, "trainer": {"max_epochs": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    out = prepare(capsys, "--threshold", "0.8", folder)  # wherever it stands
    assert f"Page: {folder / 'data-quality.html'}" in out
    assert summary(folder)["threshold"] == 0.8
    assert not list(here.iterdir())


# --- other formats ---


def make_talk(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of two answers; what was asked last is the record's question."""
    return [
        {"role": "user", "content": f"First of {record['source']}?"},
        {"role": "assistant", "content": "Ask on.", "train": False},
        {"role": "user", "content": record["instruction"]},
        {"role": "assistant", "content": record["output"]},
    ]


def write_csv(path: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(records).to_csv(path, index=False)
    return [record | {"source": str(record["source"])} for record in records]


def write_talks(path: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    talks = [{"messages": make_talk(r), "source": r["source"]} for r in records]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return talks


def write_parquet(path: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    day = datetime.date(2026, 2, 3)
    rows = [{"conversations": make_sharegpt(r), "day": day} for r in records]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    return [row | {"day": "2026-02-03"} for row in rows]


def make_sharegpt(record: dict[str, Any]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in make_talk(record)]


WRITERS = {"data.csv": write_csv, "talks.jsonl": write_talks, "talks.parquet": write_parquet}


@pytest.mark.parametrize("name", WRITERS)
def test_records_of_any_format_are_written_as_they_were(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [make_record(n) for n in range(40)]
    records[5]["instruction"] = records[2]["instruction"]
    records[35]["instruction"] = records[7]["instruction"] + "!"
    if name != "data.csv":  # all that stands before the last answer is compared
        records[5]["source"], records[35]["source"] = 2, 7
    path = tmp_path / name
    wanted = WRITERS[name](path, records)
    before = path.read_bytes()
    both = ["--policy", "drop_duplicates,drop_leaks"]
    out = prepare(capsys, "--data.path", path, *both, "--output", "new.json")
    assert f"{path}: " in out
    assert "40 records in the format " in out
    assert "near-twins at 0.9: 1 of 4 test and 0 of 2 validation entries" in out
    assert "wrote new.json: train 32, test 4, val 2; 2 left out" in out
    found = json.loads(Path("new.json").read_text())
    assert found == [record for n, record in enumerate(wanted) if n not in (5, 7)]
    assert path.read_bytes() == before
    config = yaml.safe_load(out[out.index("data:\n") : out.index("\n\nPage")])
    again, old = DataConfig(**config["data"]).read().splits, DataConfig(str(path)).read().splits
    assert (again.test, again.val) == (old.test, old.val)
    assert len(again.train) == 32


def test_what_one_file_cannot_hold_is_refused(
    tmp_path: Path, data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_talks(tmp_path / "talks.jsonl", [make_record(n) for n in range(50, 60)])
    write = ["--policy", "drop_leaks", "--output", "new.json"]
    own = ["--data.path", data, "--data.test_path", tmp_path / "talks.jsonl"]
    message = "one file cannot hold records of several formats"
    assert message in prepare(capsys, *own, *write, code=2)
    mixture = ["--data.mixture", json.dumps([{"path": str(data)}])]
    assert "data.mixture: one file is written, which" in prepare(capsys, *mixture, *write, code=2)
    assert not list(here.iterdir())
    assert "near-twins at 0.9" in prepare(capsys, *mixture)  # it is looked at as a whole


def test_a_column_that_json_has_no_place_for(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [make_record(n) | {"image": b"\x89PNG"} for n in range(40)]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "images.parquet")
    options = ["--data.path", tmp_path / "images.parquet", "--policy", "regroup"]
    err = prepare(capsys, *options, "--output", "new.json", code=2)
    assert "new.json: a record holds bytes, which JSON has no place for" in err
    assert not list(here.iterdir())


# --- what is refused, with nothing written ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "regroup"], "name it with --output NEW.json"),
        (["--output", "new.json"], "the policy `report` writes no data; --policy drop_dup"),
        (["--policy", "drop", "--output", "new.json"], "policy: unknown 'drop'; allowed: report, "),
        (["--policy", "regroup,drop_leaks", "--output", "a.json"], "report and regroup stand alon"),
        (["--policy", "regroup", "--output", "new.csv"], "new.csv must end in .json or .jsonl"),
        (["--threshold", "0.2"], "threshold: 0.2 is not from 0.5 to 1"),
        (["--threshold", "high"], "threshold"),
        (["--page", "page.txt"], "page.txt must end in .html"),
        (["--polcy", "regroup"], "did you mean 'policy'?"),
        (["nowhere"], "nowhere: no run folder"),
        (["--policy", "regroup", "--output", "a.json", "--page", "a.html"], "is the --output"),
    ],
)
def test_nonsense(
    data: Path, here: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    err = prepare(capsys, "--data.path", data, *options, code=2)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not list(here.iterdir())
    assert data.read_bytes() == before


def test_a_data_file_by_place_is_explained(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--data.path {data}" in prepare(capsys, data, code=2)


@pytest.mark.parametrize("kind", ["same", "symlink", "hardlink", "dangling", "other"])
def test_no_file_is_written_over(
    data: Path, here: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = data if kind == "same" else here / "new.json"
    if kind == "symlink":
        output.symlink_to(data)
    elif kind == "hardlink":
        os.link(data, output)
    elif kind == "dangling":
        output.symlink_to(here / "nothing.json")
    elif kind == "other":
        output.write_text("[]")
    before = {path: path.read_bytes() for path in (data, output) if path.exists()}
    options = ["--data.path", data, "--policy", "regroup", "--output", output]
    err = prepare(capsys, *options, code=2)
    is_data = kind in ("same", "symlink", "hardlink")
    assert ("is the data itself" if is_data else "is already there") in err
    assert {path: path.read_bytes() for path in before} == before
    assert not (here / "data-quality.json").exists()
    assert output.is_symlink() is (kind in ("symlink", "dangling"))


def test_the_page_takes_no_others_place(
    data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    page = data.with_suffix(".html")  # data.json would go beside it
    assert "is the data itself" in prepare(capsys, "--data.path", data, "--page", page, code=2)
    (here / "notes.json").write_text("{}")
    err = prepare(capsys, "--data.path", data, "--page", "notes.html", code=2)
    assert "not a file that `prepare` wrote" in err
    assert (here / "notes.json").read_text() == "{}"
    assert data.read_bytes() == before
    prepare(capsys, "--data.path", data)
    prepare(capsys, "--data.path", data)  # its own it may


def test_a_policy_that_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "same.json"
    path.write_text(json.dumps([{"instruction": "Say hi.", "output": "Hi."}] * 20))
    options = ["--data.path", path, "--policy", "drop_leaks", "--output", "new.json"]
    err = prepare(capsys, *options, code=2)
    assert "leaves the train split empty" in err
    assert not Path("new.json").exists()


def test_blank_answers_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [make_record(n) for n in range(40)]
    records[3]["output"] = ""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    assert "blank answers: 1, 3\n" in prepare(capsys, "--data.path", path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the peak")
def test_100_000_entries_fit_into_two_gigabytes(tmp_path: Path, here: Path) -> None:
    """In a process of its own, for its peak of memory. The aim for its time is two minutes."""
    path = tmp_path / "many.json"
    path.write_text(json.dumps(make_entries(100_000, random.Random(1))))
    program = (
        "import sys; from lightning_sft.__main__ import main;"
        "assert main(['prepare', '--data.path', sys.argv[1]]) == 0;"
        "peak = open('/proc/self/status').read().split('VmHWM:')[1]; print(peak.split()[0])"
    )
    command = [sys.executable, "-c", program, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout
    assert int(out.split()[-1]) < 2_000_000  # KiB
