"""A fit that dies at chosen steps, and is gone on with until it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.training.checkpoint import Checkpoints
from lightning_sft.training.module import SFTModule
from support.runs import run


class PulledPlugError(BaseException):
    """Stands for a kill: no handler of the code under test may survive it."""


def stop_before(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the process die as it begins each of these optimizer steps, once each."""
    left = set(steps)
    original = SFTModule.training_step

    def training_step(self: SFTModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step in left:
            left.remove(self.global_step)
            raise PulledPlugError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "training_step", training_step)


def fit(config: Path, *arguments: str) -> None:
    assert run("fit", "--config", config, *arguments) == 0


def fit_until_done(config: Path, max_tries: int = 6) -> int:
    """Start, and after each kill resume with `--ckpt_path last`; how many starts it took."""
    for start in range(max_tries):
        try:
            fit(config, *(["--ckpt_path", "last"] if start else []))
        except PulledPlugError:
            continue
        return start + 1
    raise AssertionError("never finished")


@contextmanager
def killed_behind(name: str, step: int) -> Iterator[None]:
    """Die once, as a hook of that name begins (`save`: as it ends) with `step` steps done."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "save":
            save = Checkpoints.save

            def save_and_die(self: Checkpoints, trainer: Any) -> Any:
                path = save(self, trainer)
                if trainer.global_step == step:
                    raise PulledPlugError
                return path

            patch.setattr(Checkpoints, "save", save_and_die)
        else:

            def die(self: Checkpoints, trainer: Any, *args: Any) -> None:
                if trainer.global_step == step:
                    raise PulledPlugError

            patch.setattr(Checkpoints, name, die, raising=False)
        with pytest.raises(PulledPlugError):
            yield
