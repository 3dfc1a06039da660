"""`runs/<name>/version_N`: who owns a version, and the metrics that are written into it.

A resumed run goes on in its folder: what it had logged beyond its checkpoint is taken back first,
so that curves and samples read like those of a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_sft import files
from lightning_sft.errors import InputError

COLUMNS = [
    "step",
    "epoch",
    "train_loss",
    "lr",
    "tokens_per_second",
    "tokens_seen",
    "train_eval_loss",
    "val_eval_loss",
    "val_loss",
    "val_perplexity",
]


def folder_of(trainer: Trainer) -> Path | None:
    """The folder that a run's loggers write into; None without them, or in a trial run.

    `trainer.log_dir` would not do: it is a collective call, and waits forever when one rank asks.
    """
    if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return Path(str(trainer.loggers[0].log_dir))


def is_first_process() -> bool:
    """Whether this is rank 0, known from the environment before any trainer exists."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def version_numbers(parent: Path) -> list[int]:
    """The numbers of all `version_N` in a folder, in order."""
    names = (re.fullmatch(r"version_([0-9]+)", path.name) for path in parent.glob("version_*"))
    return sorted(int(match[1]) for match in names if match)


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

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()
        if self.folder is not None and self._made and not self.begun:
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in self._missing:
                with contextlib.suppress(OSError):  # other runs are in it
                    parent.rmdir()


def rewind(folder: Path, step: int) -> bool:
    """Take back what a run logged after `step` optimizer steps, before it goes on from there.

    Returns:
        Whether the row of the last step that counts is in `metrics.csv`: a kill between its
        checkpoint and its row leaves it out.
    """
    has_last_step = True
    metrics, samples = folder / "metrics.csv", folder / "samples.jsonl"
    if metrics.exists():
        # All rows are numbered from 0, by the step that came before them.
        rows = _read_rows(metrics)
        kept = [row for row in rows if int(row["step"]) < step]
        has_last_step = any(row["train_loss"] and int(row["step"]) == step - 1 for row in kept)
        with files.atomic_write(metrics) as file:
            file.write(_format_rows([COLUMNS, *(_values(row) for row in kept)]))
    if samples.exists():
        records = [record for record in files.read_jsonl(samples) if record["step"] <= step]
        with files.atomic_write(samples) as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return has_last_step


class MetricsFile(Logger):
    """`metrics.csv`: a row for each time something is logged, empty where nothing was.

    Lightning's CSVLogger deletes an older file when it reopens a folder; this one goes on in it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"

    @property
    def name(self) -> str:
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        return self.path.parent.name

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: float(value) for name, value in metrics.items()} | {"step": step or 0}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        rows = [_values(row)] if self.path.exists() else [COLUMNS, _values(row)]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_format_rows(rows))


class EventsLogger(TensorBoardLogger):
    """TensorBoard events straight in the run folder.

    Args:
        step: Of the checkpoint that a run goes on from; TensorBoard hides what lay behind it.
    """

    def __init__(self, folder: Path, step: int | None = None) -> None:
        purge: dict[str, Any] = {} if step is None else {"purge_step": step + 1}
        super().__init__(
            save_dir=folder.parent.parent,
            name=folder.parent.name,
            version=int(folder.name.removeprefix("version_")),
            **purge,
        )

    def save(self) -> None:
        """Flush; without the `hparams.yaml` that would repeat `config.yaml`."""
        self.experiment.flush()


def _values(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(column, "") for column in COLUMNS]


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Whole rows only: a kill may have torn the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [row for row in csv.DictReader(whole) if None not in row.values() and row["step"]]


def _format_rows(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
