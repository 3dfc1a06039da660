"""Faults that a run must survive: a full disk, a kill, a signal in the middle of answering."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_sft.commands.verify_resume import compare_runs
from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.common.files import read_jsonl
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.runs.responses import RESPONSES_NAME
from lightning_sft.training.checkpoint import DurableCheckpointIO
from support.runs import load, newest_checkpoint, run, run_apart, spawn, write_config, write_data


def wait_until(condition, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Poll until `condition()`; the process must live until then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- A full disk ---


def test_a_disk_that_fills_up_while_saving(tmp_path: Path) -> None:
    """Exit code 3, the checkpoints before it whole, nothing half-written; and it goes on."""
    config = write_config(tmp_path, checkpoints={"every_n_steps": 3, "keep_last": 9})
    folder = tmp_path / "runs/tiny/version_0/checkpoints"
    process = spawn("fit", "--config", config, cwd=tmp_path)
    wait_until(lambda: any(folder.glob("step-*.ckpt")), process)
    # From here on no file may grow beyond a megabyte; a checkpoint has forty.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "cannot be written (File too large)" in err
    assert not list(folder.glob(".*.tmp"))
    for path in folder.glob("step-*.ckpt"):
        read_checkpoint(path)
    assert run("fit", "--config", config, "--ckpt_path", "last") == 0
    assert run("fit", "--config", config, "--run.name", "whole") == 0
    assert compare_runs(tmp_path / "runs/tiny/version_0", tmp_path / "runs/whole/version_0") == []


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o555)
    command = [sys.executable, "-m", "lightning_sft", "fit", "--config", str(config)]
    if os.geteuid() == 0:  # who may write anywhere, unless that right is given away
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv (util-linux) to be refused anything")
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Permission denied" in done.stderr
    assert "Step 000000" not in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []


# --- Kills ---


def test_a_kill_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The name appears with the last byte; a temporary folder elsewhere plays no part in it."""
    config = write_config(tmp_path, checkpoints={"every_n_steps": 1, "keep_last": 99})
    folder = tmp_path / "runs/tiny/version_0/checkpoints"
    elsewhere = {"TMPDIR": "/dev/shm"} if Path("/dev/shm").is_dir() else {}
    for kills in range(3):
        resume = ["--ckpt_path=last"] if kills else []
        process = spawn("fit", "--config", config, *resume, cwd=tmp_path, **elsewhere)

        def is_writing(saved: int = kills) -> bool:
            begun = any(path.stat().st_size for path in folder.glob(".step-*.tmp"))
            return begun and len(list(folder.glob("step-*.ckpt"))) > saved

        wait_until(is_writing, process)
        process.kill()
        process.communicate()
        for path in folder.glob("step-*.ckpt"):
            read_checkpoint(path)
    assert run("fit", "--config", config, "--ckpt_path", "last") == 0
    assert run("fit", "--config", config, "--run.name", "whole") == 0
    assert compare_runs(tmp_path / "runs/tiny/version_0", tmp_path / "runs/whole/version_0") == []


@pytest.mark.parametrize("renamed", [True, False], ids=["renamed", "control"])
def test_a_torn_checkpoint_never_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    """The control writes under the final name at once, as torch.save would."""
    if not renamed:
        monkeypatch.setattr(files, "atomic_write", lambda path, mode: path.open(mode))

    class InterruptedDigest:
        """The writing breaks off at the fourth piece."""

        def __init__(self) -> None:
            self.left = 3

        def update(self, data: bytes) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(hashlib, "sha256", InterruptedDigest)
    path = tmp_path / "step-000001.ckpt"
    with pytest.raises(KeyboardInterrupt):
        DurableCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(50_000)}}, path)
    assert path.exists() is not renamed
    if not renamed:
        with pytest.raises(InputError, match="is not a checkpoint"):
            read_checkpoint(path)


def test_two_ranks_resume_to_the_bit(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        model__architecture__drop_rate=0.1,
        data__batch_size=2,
        trainer__devices=2,
        trainer__strategy="ddp",
        trainer__max_epochs=1,
        checkpoints={"every_n_steps": 3},
    )
    assert run_apart("fit", "--config", config, "--run.name=whole", cwd=tmp_path)[0] == 0
    folder = tmp_path / "runs/tiny/version_0/checkpoints"
    process = spawn("fit", "--config", config, cwd=tmp_path)
    wait_until(lambda: any(folder.glob("step-*.ckpt")), process)
    process.kill()
    process.communicate()
    assert not (folder.parent / "gpt2-2M-sft.pth").exists()
    code, _, err = run_apart("fit", "--config", config, "--ckpt_path=last", cwd=tmp_path)
    assert code == 0, err
    assert compare_runs(folder.parent, tmp_path / "runs/whole/version_0") == []


def test_a_rank_does_not_wait_for_one_that_was_killed_while_starting(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    process = spawn("fit", "--config", config, *two, cwd=tmp_path, forked=False)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text().split(), process)
    rank = Path("/proc", children.read_text().split()[0])
    process.kill()  # the child is still importing
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    process.wait()
    deadline = time.monotonic() + 60
    while rank.exists() and " Z " not in (rank / "stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- Prediction ---


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_predict_goes_on_where_it_was_stopped(tmp_path: Path, signum: signal.Signals) -> None:
    config = write_config(tmp_path, trainer__max_epochs=1)
    assert run("fit", "--config", config) == 0
    checkpoint = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    many = write_data(tmp_path / "many.json", 60)
    command = ["predict", "--ckpt_path", checkpoint, "--generation.batch_size=1"]
    command += ["--data.test_path", many, "--data.val_path", many]
    assert run(*command) == 0
    target = tmp_path / "runs/tiny/version_0" / RESPONSES_NAME
    expected = target.read_bytes()
    target.unlink()

    process = spawn(*command, cwd=tmp_path, forked=signum != signal.SIGKILL)
    part = target.parent / "responses.part-0.jsonl"
    wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") >= 3, process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    if signum != signal.SIGKILL:
        assert "the answers so far are kept, the same command goes on" in err
    assert not target.exists()
    done = {record["index"] for record in read_jsonl(part)}
    code, out, err = run_apart(*command, cwd=tmp_path)
    assert code == 0, err
    assert f"going on: {len(done)} of 60 answers are there already" in out
    assert target.read_bytes() == expected
    assert not part.exists()


# --- Caches ---


def test_ranks_share_one_tokenized_cache(tmp_path: Path) -> None:
    """5,000 entries and more are tokenized once; both ranks map the same files."""
    entries = [
        {"instruction": f"Name the number {n}.", "input": "", "output": str(n)} for n in range(5600)
    ]
    (tmp_path / "large.json").write_text(json.dumps(entries))
    config = write_config(
        tmp_path,
        data__path=str(tmp_path / "large.json"),
        data__fractions=[0.98, 0.01, 0.01],
        data__batch_size=2,
        trainer__max_epochs=1,
        trainer__limit_train_batches=2,
        trainer__limit_val_batches=1,
    )
    cache = tmp_path / "cache"
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    code, _, err = run_apart(
        "fit", "--config", config, *two, cwd=tmp_path, LIGHTNING_SFT_CACHE=str(cache)
    )
    assert code == 0, err
    folders = [path for path in (cache / "tokens").iterdir() if path.is_dir()]
    assert len(folders) == 1
    written = {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    code, _, err = run_apart(
        "fit", "--config", config, *two, cwd=tmp_path, LIGHTNING_SFT_CACHE=str(cache)
    )
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in folders[0].iterdir()} == written
    assert load(newest_checkpoint(tmp_path / "runs/tiny/version_0"))["global_step"] == 2
