"""The tests' own machinery: who may start processes, and what a forked one is like."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.fork_server import IS_POSSIBLE, ForkedPopen
from support.runs import run_apart, spawn, wait_for, write_config


@pytest.mark.unit
@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"]),
        lambda: os.system("true"),
        lambda: os.fork(),
        lambda: multiprocessing.get_context("spawn").Process(target=int).start(),
        lambda: spawn("--help", cwd=Path.cwd()),
    ],
)
def test_a_unit_test_starts_no_process(start: Callable[[], Any]) -> None:
    with pytest.raises(pytest.fail.Exception, match="mark it `process`"):
        start()


def test_a_process_is_found_by_what_a_test_calls(request: pytest.FixtureRequest) -> None:
    """The others of this file are marked so; this one calls nothing."""
    assert request.node.get_closest_marker("unit") is not None
    marked = {
        item.originalname: item for item in request.session.items if item.path == Path(__file__)
    }
    for name, item in marked.items():
        assert (item.get_closest_marker("process") is not None) == name.startswith("test_a_forked")


@pytest.mark.skipif(not IS_POSSIBLE, reason="only Linux lets a process adopt what it did not fork")
def test_a_forked_process_says_what_a_new_one_does(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('started with', open('here').read())")
    (tmp_path / "here").write_text("its own folder")
    outcomes = [
        run_apart("inspect", "--data.path", "here", cwd=tmp_path, forked=forked,
                  PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        for forked in (True, False)
    ]  # fmt: skip
    assert outcomes[0] == outcomes[1]
    code, out, err = outcomes[0]
    assert code == 2
    assert out == "started with its own folder\n"
    assert err.startswith("error: here")


@pytest.mark.skipif(not IS_POSSIBLE, reason="only Linux lets a process adopt what it did not fork")
def test_a_forked_process_is_a_child_and_can_be_killed(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_epochs=50)
    process = spawn("fit", "--config", config, cwd=tmp_path)
    assert isinstance(process, ForkedPopen)
    parent = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
    assert int(parent) == os.getpid()
    wait_for(process, "(Step 000000)")
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
