"""What a run writes of itself while it trains: `metrics.csv` and TensorBoard events.

A resumed run goes on in its folder: what it had logged beyond its checkpoint is taken back first,
so that curves and samples read like those of a run that was never stopped.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_sft.common import files

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
    lines = files.read_text(path).splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [row for row in csv.DictReader(whole) if None not in row.values() and row["step"]]


def _format_rows(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
