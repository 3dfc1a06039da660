"""Durable files: whole or not there, also on a full disk and after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import stat
import sys
from pathlib import Path

import pytest

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, ServiceError


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_cache_dir_prefers_its_own_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path / "own"))
    assert files.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LIGHTNING_SFT_CACHE")
    assert files.cache_dir() == tmp_path / "xdg" / "lightning_sft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == Path.home() / ".cache" / "lightning_sft"


def test_atomic_write_replaces_only_at_the_end(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with files.atomic_write(path) as file:
        file.write("é")
        assert not path.exists()
    assert path.read_bytes() == "é".encode()
    with files.atomic_write(path, "wb") as file:
        file.write(b"two")
        assert path.read_bytes() == "é".encode()
    assert path.read_bytes() == b"two"
    assert names_in(path.parent) == {"a.txt"}


def test_atomic_write_leaves_nothing_of_a_failed_block(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), files.atomic_write(path) as file:
        file.write("half" + str(file.write("a")) + None)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"a.txt"}


def test_atomic_write_respects_the_umask(tmp_path):
    with files.atomic_write(tmp_path / "a") as file:
        file.write("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("path", ["file/below-a-file.txt", "/proc/nowhere/a.txt"])
def test_an_unwritable_place_is_one_line(tmp_path, path):
    (tmp_path / "file").write_text("")
    for write in (lambda p: files.write_json(p, 1), lambda p: files.append_line(p, "{}")):
        with pytest.raises(ServiceError, match="cannot be written") as error:
            write(tmp_path / path)
        assert "\n" not in str(error.value)


def _fill_disk(path: Path, write: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        if write == "atomic":
            files.write_json(path, "x" * 5000)
        elif write == "torch":
            torch = pytest.importorskip("torch")
            with files.atomic_write(path, "wb") as file:
                torch.save({"a": torch.zeros(5000)}, file)
        else:
            files.append_line(path, json.dumps({"a": "x" * 5000}))
    except ServiceError as error:
        sys.exit(3 if "cannot be written (File too large)" in str(error) else 1)


@pytest.mark.parametrize("write", ["atomic", "torch", "append"])
def test_a_full_disk_keeps_what_was_there(tmp_path, write):
    path = tmp_path / "a.jsonl"
    files.append_line(path, '{"n": 0}')
    child = multiprocessing.get_context("fork").Process(target=_fill_disk, args=(path, write))
    child.start()
    child.join(20)
    assert child.exitcode == 3
    assert names_in(tmp_path) == {"a.jsonl"}
    assert files.read_jsonl(path) == [{"n": 0}]
    files.append_line(path, '{"n": 1}')  # goes on behind the torn line
    assert files.read_jsonl(path) == [{"n": 0}, {"n": 1}]


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    """No power cut can be tried here; what can be is the order of the calls that survive one."""
    calls: list[str] = []
    replace = Path.replace

    def fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def rename(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    files.write_json(tmp_path / "a.json", 1)
    assert calls == ["file", "rename", "folder"]
    calls.clear()
    files.append_line(tmp_path / "a.jsonl", "{}")
    files.append_line(tmp_path / "a.jsonl", "{}")
    assert calls == ["file", "folder", "file"]


def test_write_json_is_indented_and_plain(tmp_path):
    files.write_json(tmp_path / "a.json", [{"text": "Zürich"}])
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '[\n    {\n        "text": "Zürich"\n    }\n]'
    )


@pytest.mark.parametrize("torn", range(1, len('{"n": 12}')))
def test_append_line_cuts_off_what_a_kill_left(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n' + b'{"n": 12}'[:torn])
    assert files.read_jsonl(path) == [{"n": 0}]
    files.append_line(path, '{"n": 1}')
    assert path.read_bytes() == b'{"n": 0}\n{"n": 1}\n'


def test_append_line_keeps_a_whole_line_without_an_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}')  # as some editors save it
    assert files.read_jsonl(path) == [{"n": 0}, {"n": 1}]
    files.append_line(path, '{"n": 2}')
    assert [record["n"] for record in files.read_jsonl(path)] == [0, 1, 2]


@pytest.mark.parametrize("bad", ["{", "[1]", "12", "\x00"])
def test_read_jsonl_refuses_a_bad_line_in_the_middle(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\n' + bad + '\n{"n": 2}\n')
    with pytest.raises(InputError, match="line 2 is not a JSON object"):
        files.read_jsonl(path)
    with pytest.raises(InputError, match="cannot be read"):
        files.read_jsonl(tmp_path / "missing.jsonl")


def test_install_hints_work_where_the_project_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(files.__file__).parents[2]
    assert files.install_command("serve") == f"pip install -e '{root}[serve]'"
    monkeypatch.setattr(files, "__file__", str(tmp_path / "lightning_sft/common/files.py"))
    assert files.install_command("serve") == "pip install 'lightning-sft[serve]'"
