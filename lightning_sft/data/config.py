"""The `data` section of a config: its defaults, its checks, and reading what it names.

The DataModule and the commands that must not import torch both take their settings from here, so
that what `inspect` shows is what `fit` trains on.

    >>> DataConfig("instruction-data.json", mask_prompt=True).read().splits.train[0]

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args, get_type_hints

from lightning_sft.common.errors import InputError
from lightning_sft.data.entries import (
    BOOK_DATA_URL,
    Entry,
    Splits,
    read_entry_file,
    split_entries,
)
from lightning_sft.data.prompts import PromptStyle, get_style

NAMED = 8  # places that a message lists before it says how many more there are


class DataSet(NamedTuple):
    """What was read: the splits, and for each file the places of entries that were left out."""

    splits: Splits
    skipped: dict[str, list[int]]


@dataclass(frozen=True)
class DataConfig:
    """The settings of instruction data.

    Args:
        path: JSON or JSONL file, URL, or the name of a file that the package ships. The chapter's
            data by default.
        batch_size: Rows a micro-batch on one device.
        val_path: Validation entries from a file of their own; `path` is then not cut for them.
        test_path: Likewise for test entries.
        field_names: The file's names where they differ, e.g. `{input: context}`.
        fractions: Shares of train, test and validation, in file order, of `path`.
        empty_output: Whether an entry without an answer is refused (error) or left out (skip).
        prompt_style: `alpaca`, `phi3`, `chatml`, `llama3`, `qwen3`, or a mapping with instruction,
            input and header.
        header_in_prompt: Whether the response header is given (true) or generated (false).
        mask_prompt: Loss on the answer alone (exercise 7.2).
        max_length: Most tokens of a row.
        overlong: What happens to longer rows.
        drop_last: Leave out a last training batch that is not full, as the chapter does.
        padding_free: Lay rows end to end instead of padding them.
        share_prefix: Also compute what rows of a batch have in common once; implies
            `padding_free`. Not with dropout, where rows need states of their own.
        group_by_length: Rows of like length share a batch; changes the order.
        num_workers: Processes that batch ahead.
        predict_split: What `predict` answers.
    """

    path: str = BOOK_DATA_URL
    batch_size: int = 8
    val_path: str | None = None
    test_path: str | None = None
    field_names: dict[str, str] | None = None
    fractions: tuple[float, float, float] = (0.85, 0.10, 0.05)
    empty_output: Literal["error", "skip"] = "error"
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
        # From Python anything may come, which the command line's types would have refused.
        if not isinstance(self.path, str) or not self.path:
            raise InputError(f"data.path: {self.path!r} is not allowed; give a file or URL")
        for field in fields(self):
            if getattr(self, field.name) is None and field.default is not None:
                raise InputError(f"data.{field.name}: must not be null")
        for name, least in (("batch_size", 1), ("max_length", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"data.{name}: {value} is not allowed; it must be >= {least}")
        types = get_type_hints(type(self))
        for name in ("empty_output", "overlong", "predict_split"):
            value, allowed = getattr(self, name), get_args(types[name])
            if value not in allowed:
                raise InputError(f"data.{name}: unknown {value!r}; allowed: {', '.join(allowed)}")
        self.style()  # an unknown style, or a template without its place for the text

    def style(self) -> PromptStyle:
        """How an entry is laid out as text."""
        return get_style(self.prompt_style, self.header_in_prompt)

    def files(self) -> list[str]:
        """The files and URLs that the splits are read from."""
        return [path for path in (self.path, self.val_path, self.test_path) if path is not None]

    def read(self, *, require_output: bool = True) -> DataSet:
        """Read the splits; one with a file of its own leaves its share of `path` to training.

        Entries without an output are left out before `path` is cut, so that training and
        answering see the same splits.

        Args:
            require_output: Refuse empty outputs as `empty_output` says. Answering does not.

        Raises:
            InputError: A file or record is wrong, or a split stays empty; names it.
            ServiceError: A URL could not be fetched.
        """
        # `predict` may answer questions that nobody knows the answer to.
        keep = self.empty_output == "error" and not require_output
        skipped: dict[str, list[int]] = {}

        def read_file(path: str | None) -> list[Entry]:
            if path is None:
                return []
            entries, skipped[path] = read_entry_file(
                path,
                field_names=self.field_names,
                empty_output="keep" if keep else self.empty_output,
            )
            return entries

        entries = read_file(self.path)
        val, test = read_file(self.val_path), read_file(self.test_path)
        if val and test:
            return DataSet(Splits(entries, test=test, val=val), skipped)
        # A split that has a file of its own needs no share, and may be too small for one.
        own = [name for name, part in (("val", val), ("test", test)) if part]
        parts = split_entries(entries, self.fractions, may_be_empty=own)
        train = parts.train + (parts.val if val else []) + (parts.test if test else [])
        return DataSet(Splits(train, test=test or parts.test, val=val or parts.val), skipped)


def listed(places: list[int]) -> str:
    """The first few places, and how many more there are."""
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(map(str, places[:NAMED])) + more


def describe_skipped(skipped: Mapping[str, list[int]]) -> list[str]:
    """One line for each file that entries were left out of, with their places in it."""
    return [
        f"{path}: {len(places)} entries with an empty output are left out: {listed(places)}"
        for path, places in skipped.items()
        if places
    ]
