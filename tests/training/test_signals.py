"""Signals, through real processes: exit codes, what is saved, and the line that tells what next."""

from __future__ import annotations

import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from lightning_sft.commands.verify_resume import equal
from support.runs import (
    load,
    newest_checkpoint,
    run,
    run_apart,
    spawn,
    wait_for,
    write_config,
    write_data,
)


def slow_config(folder: Path) -> Path:
    """A run that is still going when the signal comes: 20 steps with a look at the loss each."""
    return write_config(
        folder,
        data__path=str(write_data(folder / "data.json", 25)),
        trainer__max_epochs=1,
        data__batch_size=1,
        data__fractions=[0.8, 0.1, 0.1],
        loss_curve__every_n_steps=1,
        model__architecture__n_layers=3,
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_printed_command_finishes_the_run(
    tmp_path: Path, signum: signal.Signals
) -> None:
    config = slow_config(tmp_path)
    process = spawn("fit", "--config", config, cwd=tmp_path, forked=signum != signal.SIGTERM)
    wait_for(process, "(Step 000004)")
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    message = err.strip().splitlines()[-1]
    step = int(re.search(r"stopped after step (\d+)", message)[1])  # type: ignore[index]
    assert 5 <= step < 20
    command = shlex.split(message.split("go on with: ")[1])
    assert command[:3] == ["python", "-m", "lightning_sft"]
    assert load(Path(command[-1]))["global_step"] == step

    assert run_apart(*command[3:], cwd=tmp_path)[0] == 0
    assert run("fit", "--config", config, "--run.name", "whole") == 0
    states = [
        load(newest_checkpoint(tmp_path / f"runs/{name}/version_0"))["state_dict"]
        for name in ("tiny", "whole")
    ]
    assert equal(*states)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    process = spawn("fit", "--config", slow_config(tmp_path), cwd=tmp_path)
    wait_for(process, "(Step 000004)")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    wait_for(process, "finishing this step")
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begun < 20


def test_two_writers_are_refused(tmp_path: Path) -> None:
    config = slow_config(tmp_path)
    saving = ["--checkpoints.every_n_steps=2", "--checkpoints.keep_last=50"]
    process = spawn("fit", "--config", config, *saving, cwd=tmp_path)
    wait_for(process, "(Step 000006)")
    process.send_signal(signal.SIGSTOP)  # it holds the lock, however long the other one takes
    try:
        code, _, err = run_apart("fit", "--config", config, "--ckpt_path", "last", cwd=tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert code == 2
    assert "another process is writing into this run" in err
    # The lock went with its holder.
    assert run_apart("fit", "--config", config, "--ckpt_path", "last", cwd=tmp_path)[0] == 0
