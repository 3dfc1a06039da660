"""scripts/gpu_check.py: that its parts run, fail alone, and say what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpu_check import runner
from gpu_check.notebook import Notebook, SkipError, read_entries
from gpu_check.parts import PARTS, Part
from gpu_check.setting import Setting

QUICK = ["--device", "cpu", "--quick"]


def start_here(name: str, setting: Setting, limit: float) -> str:
    """A part in this process, as `runner.start` does it in another."""
    try:
        runner.run_job(name, setting)
    except Exception as error:
        return f"failed: {error}"
    return "ok"


@pytest.mark.process  # it trains
def test_parts_run_on_a_cpu_and_say_what_they_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import peers

    monkeypatch.delitem(peers.PEERS, "TRL bf16")  # heavy, and it asks the network in a thread
    monkeypatch.setattr(runner, "start", start_here)
    parts = ["device", "layouts", "repeat", "gpt2", "memory", "tests", "sharded-all"]
    assert runner.main(["--out", str(tmp_path), *QUICK, "--only", *parts]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["versions"]["torch"]
    found = {name: part["status"] for name, part in results["parts"].items()}
    assert [found[name] for name in parts[:4]] == ["ok"] * 4
    assert found["memory"] == "skipped: peak memory is counted on a GPU alone"
    assert found["tests"].startswith("skipped: ")
    assert found["sharded-all"] == "skipped: there is one device"
    checks = {entry["name"]: entry for entry in results["parts"]["layouts"]["entries"]}
    assert checks["shared prefix as padded"]["passed"] is True
    entries = results["parts"]["gpt2"]["entries"]
    rounds = [entry for entry in entries if entry["name"] == "ours bf16"]
    assert [entry["round"] for entry in rounds] == [1, 2, 3]
    assert all(entry["tokens_per_second"] > 0 < entry["forecast_gb"] for entry in rounds)
    text = (tmp_path / "results.md").read_text()
    assert "| ours bf16 |" in text
    assert "- skipped: ours bf16 compiled (torch.compile takes longer" in text
    assert "- passed: shared prefix as padded (difference" in text


def note_and_fail(notebook: Notebook) -> None:
    with notebook.attempt("one"):
        raise ValueError("first line\nsecond")
    with notebook.attempt("another"):
        raise SkipError("not here")
    with notebook.attempt("missing"):
        import no_such_package  # noqa: F401
    notebook.check("close", 0.1, 0.2)
    notebook.check("not a number", float("nan"), 0.2)


def test_what_fails_does_not_stop_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Part, notebook: Notebook) -> None:
        if notebook.part == "layouts":
            raise RuntimeError("gone")
        note_and_fail(notebook)

    monkeypatch.setattr(runner, "start", start_here)
    monkeypatch.setattr(Part, "run", run)
    parts = ["layouts", "precision"]
    assert runner.main(["--out", str(tmp_path), *QUICK, "--only", *parts]) == 1
    results = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert results["layouts"]["status"] == "failed: gone"
    assert results["precision"]["status"] == "failed: one, not a number"
    entries = {entry["name"]: entry for entry in results["precision"]["entries"]}
    assert entries["one"]["error"] == "ValueError: first line"
    assert entries["another"]["skipped"] == "not here"
    assert entries["missing"]["skipped"] == "no_such_package is not installed"
    assert "- FAILED: not a number" in (tmp_path / "results.md").read_text()


def test_the_report_is_there_after_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def start(name: str, setting: Setting, limit: float) -> str:
        path = tmp_path / "results.json"
        seen.append(list(json.loads(path.read_text())["parts"]) if path.exists() else [])
        return "ok"

    monkeypatch.setattr(runner, "start", start)
    assert runner.main(["--out", str(tmp_path), *QUICK, "--only", "device", "repeat"]) == 0
    assert seen == [[], [], ["device"]]  # the first one is the machine


def test_time_that_is_up_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "start", lambda *_: "ok")
    arguments = ["--out", str(tmp_path), *QUICK, "--only", "device", "--minutes", "0"]
    assert runner.main(arguments) == 0
    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert results["parts"]["device"]["status"] == "skipped: the time was up"


@pytest.mark.process
def test_a_part_that_hangs_is_ended(tmp_path: Path) -> None:
    # Python alone takes longer to start than this.
    assert runner.start("device", Setting(str(tmp_path), "cpu", True), 0.01) == "cut off after 0 s"


def test_a_cut_off_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    path.write_text('{"name": "whole"}\n{"name": "cu')
    assert read_entries(path) == [{"name": "whole"}]


def test_without_a_gpu_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "start", lambda *_: "ok")
    assert runner.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: gpu_check: torch sees no CUDA device here\n"


def test_a_missing_package_or_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["--out", str(tmp_path), "--data", str(tmp_path / "none.json")]) == 2
    assert "there is no file" in capsys.readouterr().err
    monkeypatch.setattr(runner, "find_missing", lambda: ["tiktoken"])
    assert runner.main(["--out", str(tmp_path)]) == 2
    assert "not installed: tiktoken" in capsys.readouterr().err


def test_every_part_is_there() -> None:
    import importlib

    for part in PARTS.values():
        module, function = part.place.split(".")
        assert callable(getattr(importlib.import_module(f"gpu_check.{module}"), function))
