"""Answers of `predict` → `instruction-data-with-response.json`, the chapter's file to the byte.

Every rank appends its answers to a part file as they are finished. When all are, rank 0 demands
each entry exactly once, writes the file in the order of the data and removes the parts. A run that
was stopped goes on from its parts, if checkpoint, settings and entries are still the same.

Source: section 7.7 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from tqdm import tqdm

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.data.conversation import Example, as_entry
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.runs.responses import RESPONSES_NAME, Response, write_responses
from lightning_sft.training.module import SFTModule


class ResponseWriter(L.Callback):
    """Writes what `SFTModule.predict_step` answers.

    Args:
        folder: Where the file and its parts go; rank 0's counts.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._job = ""
        self._bar: tqdm[Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the loader is made: find what an earlier run answered already."""
        if stage != "predict":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, InstructionDataModule) or not isinstance(pl_module, SFTModule):
            raise InputError("ResponseWriter needs an SFTModule and an InstructionDataModule")
        self._entries = data.split(data.config.predict_split)
        self._folder = trainer.strategy.broadcast(self._folder)
        self._job = _identify(pl_module, self._entries, trainer.ckpt_path)
        answered = self._read_parts()
        # All have read before anyone deletes or adds.
        trainer.strategy.barrier("responses read")
        if not answered and trainer.is_global_zero:
            for part in self._parts():
                part.unlink()
        trainer.strategy.barrier("responses ready")
        data.answered = frozenset(answered)
        if answered and trainer.is_global_zero:
            print(f"going on: {len(answered)} of {len(self._entries)} answers are there already")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, SFTModule)
        assert isinstance(trainer.datamodule, InstructionDataModule)  # type: ignore[attr-defined]
        missing = len(self._entries) - len(trainer.datamodule.answered)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            self._bar = tqdm(
                total=-(-missing // trainer.world_size), unit="entry", desc="Answering"
            )
        pl_module.on_answer = self._count

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        part = self._folder / f"responses.part-{trainer.global_rank}.jsonl"
        for index, response in zip(outputs["index"], outputs["responses"], strict=True):
            record = {"job": self._job, "index": index, "response": response}
            files.append_line(part, json.dumps(record, ensure_ascii=False))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()
        trainer.strategy.barrier("responses written")
        if not trainer.is_global_zero:
            return
        answered = self._read_parts()
        missing = sorted(set(range(len(self._entries))) - set(answered))
        if missing:
            raise ServiceError(
                f"{self._folder}: {len(missing)} answers are missing, first of entry {missing[0]}; "
                "run the same command again to go on"
            )
        # A conversation is written as the one question that it amounts to.
        responses = [
            Response(as_entry(entry), answered[i]) for i, entry in enumerate(self._entries)
        ]
        write_responses(self.path, responses)
        for part in self._parts():
            part.unlink()
        print(f"\n{len(responses)} answers written to {self.path}")

    @property
    def path(self) -> Path:
        """The chapter's file, once all answers are there."""
        return self._folder / RESPONSES_NAME

    def _count(self, place: int, ids: list[int]) -> None:
        if self._bar is not None:
            self._bar.update()

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("responses.part-*.jsonl"))

    def _read_parts(self) -> dict[int, str]:
        """Answers of this very job; the parts of another one do not count."""
        answered: dict[int, str] = {}
        for part in self._parts():
            for record in files.read_jsonl(part):
                if record["job"] != self._job:
                    return {}
                answered[record["index"]] = record["response"]
        return answered


def _identify(module: SFTModule, entries: Sequence[Example], ckpt_path: Any) -> str:
    """A digest of all that an answer depends on."""
    digest = hashlib.sha256()
    settings = dataclasses.asdict(module.generation)
    settings.pop("batch_size")  # answers do not depend on it
    digest.update(repr((dataclasses.asdict(module.style), settings, module.weights)).encode())
    for source in (ckpt_path, module.weights):
        if source is not None and Path(source).is_file():
            facts = Path(source).stat()
            digest.update(repr((str(source), facts.st_size, facts.st_mtime_ns)).encode())
    for entry in entries:
        digest.update(repr(entry).encode())
    return digest.hexdigest()[:32]
