"""`runs/<name>/version_N`: which there are, whose a file is, and who may write into one.

This module does not import torch, but for asking which rank this process is.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import filelock

from lightning_sft.common import files
from lightning_sft.common.errors import InputError


def is_first_process() -> bool:
    """Whether this is rank 0, known from the environment before any trainer exists."""
    # Imported here: whoever only looks for runs needs no torch.
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", None) in (None, 0)


def version_numbers(parent: Path) -> list[int]:
    """The numbers of all `version_N` in a folder, in order."""
    names = (re.fullmatch(r"version_([0-9]+)", path.name) for path in parent.glob("version_*"))
    return sorted(int(match[1]) for match in names if match)


def newest_run(parent: Path) -> Path | None:
    """The newest `version_N` in a folder."""
    numbers = version_numbers(parent)
    return parent / f"version_{numbers[-1]}" if numbers else None


def run_of(path: Path) -> Path | None:
    """The run folder that a checkpoint or a weights file is in."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    # No file: a name of the hub, or a folder of somebody else's.
    return folder if path.is_file() and (folder / "config.yaml").is_file() else None


def saved_checkpoints(run: Path) -> list[Path]:
    """The checkpoints that a run saved, by step; a copy under another name is none of them."""
    # Names are padded to six digits, which a long run outgrows.
    saved = run.glob("checkpoints/step-*.ckpt")
    names = (re.fullmatch(r"step-([0-9]{6,})\.ckpt", path.name) for path in saved)
    steps = sorted((int(match[1]), match[0]) for match in names if match)
    return [run / "checkpoints" / name for _, name in steps]


def checkpoint_in(path: str | Path, option: str = "ckpt_path") -> Path:
    """The file that is meant where a checkpoint may be given: for a run folder, its newest one.

    A run folder without checkpoints stands for its final weights. Anything else comes back as it
    is: a file, a folder of weights, or a name such as gpt2-medium or owner/name.

    Args:
        option: What a complaint calls the path.

    Raises:
        InputError: A run folder with nothing in it, the folder of several runs, or no such file.
    """
    path = files.expand_user(path, option)
    if path.suffix in (".ckpt", ".pth", ".pt", ".safetensors") and not path.exists():
        raise InputError(f"{option}: {path} is not a file (no such file)")
    if not path.is_dir():
        return path
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        found = [*sorted(path.glob("*-sft.pth")), *saved_checkpoints(path)]
        if not found:
            raise InputError(f"{option}: the run {path} has saved no checkpoint and no weights yet")
        return found[-1]
    if newest := newest_run(path):
        raise InputError(f"{option}: {path} holds runs; name one, such as {newest}")
    return path


def next_version(parent: Path) -> Path:
    """Take the next free `version_N`. Making the folder is the claim, so two runs never share.

    Only the first process makes it; the others' answer may lag behind and is not to be used.
    """
    number = max(version_numbers(parent), default=-1) + 1
    while is_first_process():
        try:
            (parent / f"version_{number}").mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    return parent / f"version_{number}"


class RunClaim:
    """The one writer of a run folder, from before the first file to the end of the process.

    A folder made for a run that never began (bad data, missing weights) is taken away again.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.begun = False
        self._made = False
        self._missing: list[Path] = []  # parents that were not there before
        self._lock: filelock.BaseFileLock | None = None

    def make(self, parent: Path) -> Path:
        """A folder for a new run."""
        self._missing = [path for path in (parent, parent.parent) if not path.exists()]
        self.folder, self._made = next_version(parent), is_first_process()
        return self._hold(self.folder)

    def reopen(self, folder: Path) -> Path:
        """The folder of a run that goes on.

        Raises:
            InputError: Another process is writing into it.
        """
        self.folder = folder
        return self._hold(folder)

    def _hold(self, folder: Path) -> Path:
        if is_first_process():
            self._lock = filelock.FileLock(folder / ".lock")
            try:
                self._lock.acquire(blocking=False)
            except filelock.Timeout:
                raise InputError(f"{folder}: another process is writing into this run") from None
        return folder

    def __enter__(self) -> RunClaim:
        return self

    def __exit__(self, kind: object = None, error: object = None, trace: object = None) -> None:
        if isinstance(error, Exception) and self.begun:
            error.run_folder = self.folder  # type: ignore[attr-defined] # where a report of it goes
        if self._lock is not None:
            self._lock.release()
        if self.folder is not None and self._made and not self.begun:
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in self._missing:
                with contextlib.suppress(OSError):  # other runs are in it
                    parent.rmdir()
