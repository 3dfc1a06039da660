"""The `data` section of a config, for the DataModule and for commands that must not import torch.

This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import BOOK_DATA_URL, Entry, Splits, read_entries, split_entries


@dataclass(frozen=True)
class DataConfig:
    """The `data` section of a config, as `InstructionDataModule` takes it; see there."""

    path: str = BOOK_DATA_URL
    batch_size: int = 8
    val_path: str | None = None
    test_path: str | None = None
    field_names: dict[str, str] | None = None
    fractions: tuple[float, float, float] = (0.85, 0.10, 0.05)
    prompt_style: str | dict[str, str] = "alpaca"
    header_in_prompt: bool = True
    mask_prompt: bool = False
    max_length: int = 1024
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    drop_last: bool = True
    padding_free: bool = False
    share_prefix: bool = False
    group_by_length: bool = False
    num_workers: int = 0
    predict_split: Literal["train", "val", "test"] = "test"

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None and field.default is not None:
                raise InputError(f"data.{field.name}: must not be null")
        for name in ("batch_size", "max_length"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise InputError(f"data.{name}: {value} is not allowed; it must be >= 1")

    def read_splits(self) -> Splits:
        """The entries of the three splits; a split with a file of its own gives its share back."""

        def read(path: str) -> list[Entry]:
            return read_entries(path, field_names=self.field_names)

        entries = read(self.path)
        if self.val_path and self.test_path:
            return Splits(entries, test=read(self.test_path), val=read(self.val_path))
        parts = split_entries(entries, self.fractions)
        if self.val_path:
            return Splits(parts.train + parts.val, test=parts.test, val=read(self.val_path))
        if self.test_path:
            return Splits(parts.train + parts.test, test=read(self.test_path), val=parts.val)
        return parts
