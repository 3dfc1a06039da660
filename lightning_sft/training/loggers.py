"""A run's folder, and what it writes of itself there: `metrics.csv` and TensorBoard events.

A resumed run goes on in its folder: what it had logged beyond its checkpoint is taken back first,
so that curves and samples read like those of a run that was never stopped.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lightning_sft.common import files
from lightning_sft.training.preference_loss import PREFERENCE_METRICS

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
# Of preference tuning, which has no perplexity.
PREFERENCE_COLUMNS = [
    *COLUMNS[:-1],
    *PREFERENCE_METRICS,
    *(f"val_{name}" for name in PREFERENCE_METRICS),
    *(f"{split}_eval_reward_margin" for split in ("train", "val")),
]


class RunFolder(Callback):
    """Says which folder a run's files go into: checkpoints, samples, curve, weights, metrics.

    Loggers have no say in it: a user's own come beside, and write where they were told to.

    Args:
        path: `runs/<name>/version_N`, or any folder for a `Trainer` that Python code makes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)


def folder_of(trainer: Trainer) -> Path | None:
    """The folder that a run's files go into; None in a trial run, and where nothing names one.

    A `Trainer` without a `RunFolder` among its callbacks means the folder of its first logger that
    has one. `trainer.log_dir` would not do: it is a collective call, and waits forever when one
    rank asks.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunFolder):
            return callback.path
    folder = next((logger.log_dir for logger in trainer.loggers if logger.log_dir), None)
    if folder is None:
        _warn_once(
            "no checkpoints, samples, curve or weights are written: the Trainer has no logger with "
            "a folder; give it one, or the callback lightning_sft.RunFolder('runs/mine')"
        )
    return None if folder is None else Path(str(folder))


@functools.cache
def _warn_once(message: str) -> None:
    rank_zero_warn(message)


def rewind(folder: Path, step: int) -> bool:
    """Take back what a run logged after `step` optimizer steps, before it goes on from there.

    Returns:
        Whether the row of the last step that counts is in `metrics.csv`: a kill between its
        checkpoint and its row leaves it out.
    """
    has_last_step = False  # also of a file that is not there yet
    metrics, samples = folder / "metrics.csv", folder / "samples.jsonl"
    if metrics.exists():
        # All rows are numbered from 0, by the step that came before them.
        rows, columns = _read_rows(metrics), read_columns(metrics)
        kept = [row for row in rows if int(row["step"]) < step]
        has_last_step = any(row["train_loss"] and int(row["step"]) == step - 1 for row in kept)
        with files.atomic_write(metrics) as file:
            file.write(_format_rows([columns, *(_values(row, columns) for row in kept)]))
    if samples.exists():
        records = [record for record in files.read_jsonl(samples) if record["step"] <= step]
        with files.atomic_write(samples) as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return has_last_step


class MetricsFile(Logger):
    """`metrics.csv`: a row for each time something is logged, empty where nothing was.

    Lightning's CSVLogger deletes an older file when it reopens a folder; this one goes on in it.

    Args:
        columns: What a new file has; one that is there keeps its own.
    """

    def __init__(self, folder: Path, columns: Sequence[str] = COLUMNS) -> None:
        super().__init__()
        self.path, self.columns = folder / "metrics.csv", list(columns)

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
        has_begun = self.path.exists()
        columns = read_columns(self.path) if has_begun else self.columns
        rows = [] if has_begun else [columns]
        rows.append(_values(row, columns))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_format_rows(rows))


class EventsLogger(TensorBoardLogger):
    """TensorBoard events straight in the run folder.

    Args:
        step: Of the checkpoint that a run goes on from; TensorBoard hides what lay behind it. As
            in `metrics.csv` the first step has number 0, so that this is the number of the next.
            A new run needs a 0: TensorBoard takes the first beginning it sees for no restart.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        super().__init__(
            save_dir=folder.parent.parent,
            name=folder.parent.name,
            version=int(folder.name.removeprefix("version_")),
            purge_step=step,
        )

    def save(self) -> None:
        """Flush; without the `hparams.yaml` that would repeat `config.yaml`."""
        self.experiment.flush()


def read_columns(path: Path) -> list[str]:
    """The header of a metrics file; the usual one where a kill has torn it."""
    with files.open_regular(path) as file:
        line = file.readline().decode("utf-8")
    return next(csv.reader([line]), COLUMNS) if line.endswith("\n") else COLUMNS


def _values(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    return [row.get(column, "") for column in columns]


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Whole rows only: a kill may have torn the last one."""
    lines = files.read_text(path).splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [row for row in csv.DictReader(whole) if None not in row.values() and row["step"]]


def _format_rows(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
