"""Whatever is given as a file, reading it ends: pipes and devices are refused, sizes bounded."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

import lightning_sft
from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from support.runs import run, write_config


@pytest.fixture(params=["pipe", "device", "socket", "folder"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Something with a name that is no regular file."""
    path = tmp_path / "odd"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("read", [files.read_bytes, files.read_text, files.read_json])
def test_what_is_no_regular_file_is_refused_at_once(odd: Path, read) -> None:
    with pytest.raises((InputError, OSError)):
        read(odd)
    with pytest.raises((InputError, OSError)):
        files.sha256_of(odd)
    with pytest.raises((InputError, OSError)):
        files.read_jsonl(odd)


def test_a_pipe_that_somebody_writes_into_is_none_either(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, b"{}")
    with pytest.raises(InputError, match="not a regular file"):
        files.read_json(tmp_path / "pipe")
    os.close(writer)


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(10**12)  # a terabyte that takes no room
    for read in (files.read_bytes, files.read_text, files.read_json):
        with pytest.raises(InputError, match=r"is over [\d,]+ bytes; it has 1,000,000,000,000"):
            read(path)
    with pytest.raises(InputError, match="is over 100 bytes"):
        files.read_bytes("/proc/self/maps", most=100)  # which says that it has none


def test_text_is_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa\r\nb\rc\nü".encode())
    assert files.read_text(path) == "a\nb\nc\nü"
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="byte 2 is not valid UTF-8"):
        files.read_text(path)
    with pytest.raises(FileNotFoundError):
        files.read_text(tmp_path / "missing")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "", "nul"])
def test_json_of_any_depth_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json: not valid JSON") as error:
        files.read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)
    (tmp_path / "a.jsonl").write_text(text + '\n{"n": 1}\n')
    if text:
        with pytest.raises(InputError, match="line 1 is not a JSON object"):
            files.read_jsonl(tmp_path / "a.jsonl")


# Files that this package ships, that the kernel answers with, or that are opened to be written.
ALLOWED = {
    "common/files.py": 6,
    "common/downloads.py": 2,  # the part that is written, and its ETag
    "common/pages.py": 1,
    "commands/verify_resume.py": 2,  # its own child's log
    "data/tokenizer.py": 1,  # GPT-2's vocabulary, whose digest is checked
    "models/prepacked.py": 1,  # the kernel's own figures of memory
    "planning/footprint.py": 1,
    "serving/chat_page.py": 1,
    "training/device_check.py": 1,
    "training/loggers.py": 1,  # metrics.csv, to append
}
OPENERS = {"open", "read_text", "read_bytes"}


def test_every_file_is_opened_by_the_one_function() -> None:
    root = Path(lightning_sft.__file__).parent
    found: dict[str, int] = {}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            owner = called.value if isinstance(called, ast.Attribute) else None
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            of_ours = isinstance(owner, ast.Name) and owner.id in ("files", "archive")
            imported = owner is None and name != "open"
            if name in OPENERS and not of_ours and not imported:
                key = str(path.relative_to(root))
                found[key] = found.get(key, 0) + 1
    over = {key: count for key, count in found.items() if count > ALLOWED.get(key, 0)}
    assert over == {}


# --- The same through the command line ---


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.timeout(60)
def test_commands_wait_for_no_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    assert "not a file" in refused(capsys, "inspect", "--config", pipe)
    config = write_config(tmp_path)
    assert "not a regular file" in refused(
        capsys, "inspect", "--config", config, "--data.path", pipe
    )
    answers = tmp_path / "answers.json"
    entry = {"instruction": "a", "input": "", "output": "b", "model_response": "c"}
    answers.write_text(json.dumps([entry]))
    for prompt in (pipe, "/dev/zero"):
        message = refused(capsys, "score", answers, "--judge.prompt", prompt)
        assert "not a regular file" in message
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.csv", "samples.jsonl", "config.yaml", "versions.json"):
        os.mkfifo(folder / name)
    os.mkfifo(folder / "loss-curve.png")
    assert "metrics.csv is left out" in refused(capsys, "report", folder)
    weights = tmp_path / "model.safetensors"
    os.mkfifo(weights)
    message = refused(capsys, "chat", "--ckpt_path", weights, "--architecture", "gpt2-small")
    assert "not a regular file" in message
