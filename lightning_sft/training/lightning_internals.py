"""The private parts of Lightning that this package needs, each behind a small named function.

Every use of an underscored name of another library is in this file, with the version it was read
in and the reason for it. `tests/training/test_lightning_internals_*.py` fail when the library
changes under it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jsonargparse
import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage

# --- The command line: lightning 2.6.6, `lightning/pytorch/cli.py`; jsonargparse 4.53 ---


class OpenCLI(LightningCLI):
    """LightningCLI, with what it keeps to itself under public names."""

    def setting(self, name: str) -> Any:
        """An option as it was parsed: a plain value or a namespace."""
        return self._get(self.config, name)

    def built(self, name: str) -> Any:
        """An option with its classes made."""
        return self._get(self.config_init, name)

    def option_parser(self) -> LightningArgumentParser:
        """The parser of the running subcommand; the only one where there are no subcommands."""
        parsers = getattr(self, "_subcommand_parsers", None)
        return parsers[sys.argv[1]] if parsers else self.parser

    def set_seed(self) -> None:
        """Seed the random state of this process."""
        super()._set_seed()

    def resolve_checkpoint(self) -> None:
        """Find out which file `ckpt_path` means.

        LightningCLI would here let the checkpoint's hyperparameters overrule the command line.
        """

    def _set_seed(self) -> None:
        self.set_seed()

    def _parse_ckpt_path(self) -> None:
        self.resolve_checkpoint()


@contextlib.contextmanager
def command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Make `sys.argv` hold these arguments for a while.

    LightningCLI reads them from there, and so do the processes that Lightning starts as ranks;
    given as a list they would make it warn, and the ranks would run something else.
    """
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


_allowed_once: set[str] = set()


def restrict_imports(allowed: Sequence[str]) -> None:
    """Let a `class_path` name nothing but these modules and what is in them.

    A config is something that people download; importing a module already runs it. jsonargparse
    adds to what was allowed before, so that is taken back by name.

    Raises:
        ValueError: A module may never be allowed, such as jsonargparse's own.
    """
    jsonargparse.set_parsing_settings(
        config_read_mode_fsspec_enabled=False,
        import_path_denylist=["*", *sorted(_allowed_once.difference(allowed))],
        import_path_allowlist=list(allowed),
    )
    _allowed_once.update(allowed)


# What Lightning and torch say that a user of this tool can do nothing about.
USELESS_LOGS = (
    "💡 Tip:",
    "TPU available",
    "Trainer already configured with model summary callbacks",
)
USELESS_WARNINGS = (
    "does not have many workers",
    "sync_dist=True",  # TokenLoss has summed up
    "isinstance.treespec, LeafSpec",
)


def quieten() -> None:
    """Drop what a user of this tool can do nothing about; calling it twice changes nothing."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _is_useful not in log.filters:
        log.addFilter(_is_useful)
    for text in USELESS_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(USELESS_LOGS)


# How gloo and NCCL say that a process they talk to has died.
LOST_PEER = "Connection (closed|reset) by peer|Connection refused|NCCL error|Broken pipe|timed out"


def lost_peer(error: RuntimeError) -> str | None:
    """What a collective operation said when another rank was gone; None for another error."""
    if not torch.distributed.is_initialized() or not re.search(LOST_PEER, str(error)):
        return None
    return " ".join(str(error).split())[-150:]


# Settings that Lightning refuses only in the middle of its start, with a plain ValueError.
MISUSE = re.compile(r"`val_check_interval` \(|must be less than or equal to the number of")


def is_misuse(error: ValueError) -> bool:
    """Whether an error is Lightning's complaint about a Trainer option."""
    return bool(MISUSE.search(str(error)))


# --- Loops, progress and checkpoints: lightning 2.6.6, `lightning/pytorch/loops/` ---


def set_logged_step(trainer: L.Trainer, step: int) -> None:
    """Set the number that Lightning logs an optimizer step under.

    After a resume it is told by rules of thumb, and can be one too many for the rest of the run
    (`_TrainingEpochLoop.reset`). Nothing public sets it.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def batches_done(trainer: L.Trainer) -> int:
    """Micro-batches of this epoch that were trained on, the one under way included.

    Hooks around a validation are not told; `trainer.fit_loop` is no documented name.
    """
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether Lightning will validate right behind this micro-batch.

    `val_check_interval`, `check_val_every_n_epoch` and `should_stop` decide together, in a method
    that only the loop itself calls.
    """
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(cast("Any", loop._data_fetcher)))


def stops_now(trainer: L.Trainer) -> bool:
    """Whether `trainer.should_stop` is set and `min_epochs` and `min_steps` allow to follow it."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def given_train_loader(trainer: L.Trainer) -> object:
    """The training loader that `fit` was called with, or the object that makes it.

    It is not public before the loop asks for its length, and by then it must know its ranks.
    """
    return trainer.fit_loop._data_source.instance


def limit_batches(trainer: L.Trainer, length: int) -> int:
    """How many of an epoch's `length` micro-batches `limit_train_batches` and its kin leave.

    `trainer.num_training_batches` says so once the loop has asked for the loader; schedules are
    made before. `trainer.estimated_stepping_batches` would ask early, and a resumed run would lose
    the place at which it goes on (pytorch-lightning #20550).
    """
    return int(_parse_num_batches(RunningStage.TRAINING, length, trainer.limit_train_batches))


def settle_place(loops: dict[str, Any]) -> None:
    """Make a checkpoint's account of its place in training say one of two things.

    Either an epoch has ended, or it stands behind a micro-batch in its middle. Lightning saves from
    inside its hooks, with its counters half-way, and makes up for it by rules that are wrong where

    - `max_steps` is set and an epoch has just ended: it is counted twice, and a run of `max_epochs`
      ends one epoch early (`FitLoop.restarting`, `FitLoop.on_run_start`);
    - `max_steps`, `max_time` or a callback cut an epoch short: it counts as a whole one, and a run
      that goes on leaves the rest of it out (`FitLoop.on_advance_end`).

    Args:
        loops: `checkpoint["loops"]`; changed in place.
    """
    fit = loops["fit_loop"]
    epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    begun = epochs["current"]["started"]
    at_end = epochs["current"]["processed"] == begun
    if at_end and (batches["is_last_batch"] or not batches["current"]["ready"]):
        _set_all(epochs, begun)
        steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for progress in (batches, steps["step"], steps["zero_grad"]):
            progress["current"] = dict.fromkeys(progress["current"], 0)
        batches["is_last_batch"] = False
        return
    for part in epochs.values():
        part["processed"] = part["completed"] = part["started"] - 1
    for name in ("current", "total"):
        batches[name]["completed"] = batches[name]["ready"]


def _set_all(progress: dict[str, Any], count: int) -> None:
    for part in progress.values():
        part.update(dict.fromkeys(part, count))
