"""The reference of a preference loss: what a frozen model thinks of the same answers.

It is had in one of three ways. Of full fine-tuning it is a frozen copy of the weights that training
begins with; of LoRA the model itself with its adapters switched off, which costs no second model;
and in either case its numbers may be computed once, before training, and read from a file in the
run's folder from then on. The file says which weights and which rows its numbers are of.
"""

from __future__ import annotations

import copy
import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.data.loader import Batch
from lightning_sft.decoding.generation import evaluating
from lightning_sft.models.found_config import check_config
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.loading import load_weights, make_model
from lightning_sft.models.lora import adapters_off
from lightning_sft.models.lora_checkpoint import identify_base
from lightning_sft.training.log_probs import row_log_probs
from lightning_sft.training.loggers import folder_of
from lightning_sft.training.objectives import DPO

if TYPE_CHECKING:
    from lightning_sft.training.module import SFTModule

FILE_NAME = "reference-log-probs.npz"
SPLITS = ("train", "val")


class Reference:
    """A frozen model's log-probabilities of the rows of a batch.

    Not a part of the module: no checkpoint, optimizer or strategy is to know of it.

    Args:
        frozen: A model of its own, or None: the trained one's, adapters off.
        base: Of the trained model's frozen weights, as `identify_base` has them.
    """

    def __init__(self, frozen: GPTModel | None, base: dict[str, str]) -> None:
        self.frozen, self.switches = frozen, frozen is None
        self.identity = base if frozen is None else identify_base(frozen)
        # (pairs of the split, 2) numbers of a split, once they are computed.
        self.tables: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def log_probs(self, model: GPTModel, batch: Batch) -> torch.Tensor:
        """Summed log-probabilities (2P,) of a batch's rows.

        Args:
            model: The trained one, which says on which device and in which precision.
        """
        table = self.tables.get(batch.get("split", ""))
        if table is not None:
            where = batch["index"].clamp(min=0)  # repeats have no say in anything
            return table.to(where.device)[where].flatten()
        if self.frozen is None and not self.switches:
            raise InputError(
                "model.objective.reference: the numbers computed ahead are of train and val alone, "
                "and the copy is let go; evaluate the checkpoint in a trainer of its own"
            )
        if self.frozen is None:
            with evaluating(model), adapters_off(model):
                return row_log_probs(model, batch)[0]
        weight = model.tok_emb.weight
        self.frozen.to(device=weight.device, dtype=weight.dtype)  # moves once
        return row_log_probs(self.frozen, batch)[0]

    def precompute(self, module: SFTModule, trainer: L.Trainer) -> None:
        """Fill the tables of training and validation, from the run's file where it has them.

        A frozen copy is then let go.

        Raises:
            InputError: There is no `InstructionDataModule` to compute them of.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, InstructionDataModule):
            raise InputError(
                "model.objective.reference: precomputed needs an InstructionDataModule; give model"
            )
        key = self._key(data, trainer)
        folder = folder_of(trainer)
        path = None if folder is None else folder / FILE_NAME
        tables = _read(path, key)
        # One rank computes for all where there is a file to hand the numbers over.
        if tables is None and (path is None or trainer.is_global_zero):
            tables = {split: self._compute(module, data, split, trainer) for split in SPLITS}
            if path is not None:
                _write(path, key, tables)
        trainer.strategy.barrier("reference")
        tables = tables if tables is not None else _read(path, key)
        if tables is None:
            raise InputError(f"{path}: was written by another rank and cannot be read")
        self.tables = {split: torch.from_numpy(table) for split, table in tables.items()}
        self.frozen = None

    def _compute(
        self, module: SFTModule, data: InstructionDataModule, split: str, trainer: L.Trainer
    ) -> np.ndarray:
        numbers = np.full((len(data.split(split)), 2), np.nan)
        with trainer.precision_plugin.val_step_context():
            for batch in data.in_order(split, data.batch_size):
                index = batch["index"].numpy()
                here = trainer.strategy.batch_to_device(batch, module.device, 0)
                found = self.log_probs(module.network, here).view(-1, 2)
                numbers[index] = found.cpu().double().numpy()
        rank_zero_info(
            f"reference: log-probabilities of {len(data.pairs(split)):,} pairs of {split} computed"
        )
        return numbers

    def _key(self, data: InstructionDataModule, trainer: L.Trainer) -> str:
        """A digest of everything that the numbers depend on."""
        parts: list[Any] = [data.pairs(split).fingerprint() for split in SPLITS]
        parts += [data.config.max_length, data.tokenizer.eos_token_id]
        parts += [sorted(self.identity.items()), str(trainer.precision)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_reference(model: GPTModel, weights: str | None, base: dict[str, str]) -> Reference:
    """The reference of a model whose weights are those that training begins with.

    Args:
        weights: Other weights of the same architecture, if they are to be the reference.
        base: Not empty where the model has adapters.

    Raises:
        InputError: The weights are of another architecture.
    """
    if weights is None:
        frozen = None if base else copy.deepcopy(model)
    else:
        frozen = make_model(model.config)
        try:
            check_config(model.config, weights)
            load_weights(frozen, weights)
        except InputError as error:
            raise InputError(f"model.objective.reference_weights: {error}") from None
    if frozen is not None:
        frozen.requires_grad_(False).eval()
    return Reference(frozen, base)


def check_objective(
    objective: DPO | None, reference: Reference | None, checkpoint: dict[str, Any], goes_on: bool
) -> None:
    """Refuse to go on training for something else, or to compare with another reference.

    Args:
        goes_on: Training does; else the checkpoint is only evaluated, perhaps in another precision.

    Raises:
        InputError: Says what differs.
    """
    trained = checkpoint.get("hyper_parameters", {}).get("objective")
    wanted = objective.as_dict() if objective else None
    if goes_on and trained != wanted:
        raise InputError(
            f"ckpt_path: was trained with model.objective {trained}, the configuration has "
            f"{wanted}; to train anew from its weights, give it as model.weights"
        )
    saved = checkpoint.get("reference")
    if reference is None or saved is None:
        return
    if saved["dtype"] != reference.identity["dtype"] and not goes_on:
        return
    if saved != reference.identity:
        raise InputError(
            f"ckpt_path: its reference has the sha256 {saved['sha256']:.12} ({saved['dtype']}), "
            f"that of the weights now is {reference.identity['sha256']:.12} "
            f"({reference.identity['dtype']}); give the model.weights it began with"
        )


def _read(path: Path | None, key: str) -> dict[str, np.ndarray] | None:
    """The numbers in a run's file; None where it is missing, torn, or of other weights or rows."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content["key"]) == key:
                return {split: content[split] for split in SPLITS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # torn: computed anew
    return None


def _write(path: Path, key: str, tables: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path, "wb") as file:
        np.savez(file, key=np.array(key), **tables)  # type: ignore[arg-type]
