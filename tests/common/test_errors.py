"""How a command ends: the line, the exit code, and what is kept of an error nobody foresaw."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_sft import __main__ as program
from lightning_sft.common import errors
from lightning_sft.common.errors import StoppedError
from lightning_sft.training.module import SFTModule
from support.runs import run, write_config

KEY = "sk-" + "a1" * 12


def end_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_command(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(program, "run_command", run_command)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StoppedError(signal.SIGINT, "stopped after step 3; go on"), 130, "stopped after step 3"),
        (StoppedError(signal.SIGTERM, "stopped"), 143, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "f"), 3, "error: No space left on device (f)"),
        (MemoryError(), 3, "error: not enough memory (MemoryError)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB"),
            3,
            "error: not enough memory (DefaultCPUAllocator",
        ),
    ],
    ids=["ctrl-c", "terminated", "interrupted", "disk", "memory", "torch's memory"],
)
def test_an_end_that_is_known(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    end_with(error, monkeypatch)
    assert run("fit") == code
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line)


def test_no_such_user(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["report", "~nosuchuser/run"], ["fit", "--ckpt_path=~nosuchuser/a.ckpt"]):
        assert run(*arguments) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert "user" in told


def test_what_nobody_foresaw_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    end_with(LookupError(f"two\nlines and {KEY}"), monkeypatch)
    assert run("chat", f"--key={KEY}") == 70
    (told,) = capsys.readouterr().err.splitlines()
    (path,) = tmp_path.glob("crash-*.txt")
    assert told.startswith("error: unexpected LookupError: two lines and ***; all of it is in ")
    assert str(path) in told
    text = path.read_text()
    assert "Traceback" in text
    assert "command: chat" in text
    assert KEY not in text
    with pytest.raises(LookupError):
        run("chat", "--debug")


def test_it_is_kept_in_the_folder_of_a_run_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training_step(self: SFTModule, batch: Any, batch_idx: int) -> Any:
        raise LookupError("in the middle")

    monkeypatch.setattr(SFTModule, "training_step", training_step)
    config = write_config(tmp_path, loss_curve__every_n_steps=0, samples__indices=[])
    assert run("fit", "--config", config) == 70
    (path,) = (tmp_path / "runs/tiny/version_0").glob("crash-*.txt")
    assert str(path) in capsys.readouterr().err.splitlines()[-1]
    assert "training_step" in path.read_text()
