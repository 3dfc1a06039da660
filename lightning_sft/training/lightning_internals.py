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
from typing import Any

import jsonargparse
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

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
