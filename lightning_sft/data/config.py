"""The `data` section of a config: its defaults, its checks, and reading what it names.

The DataModule and the commands that must not import torch both take their settings from here, so
that what `inspect` shows is what `fit` trains on.

    >>> DataConfig("instruction-data.json", mask_prompt=True).read().splits.train[0]

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Example
from lightning_sft.data.entries import (
    BOOK_DATA_URL,
    Splits,
    read_entry_file,
    split_entries,
)
from lightning_sft.data.formats import Format
from lightning_sft.data.jsonl_lines import join_entries
from lightning_sft.data.mixture import Source, read_sources
from lightning_sft.data.preferences import Pair, read_pairs
from lightning_sft.data.prompts import PromptStyle, get_style
from lightning_sft.data.segments import Masking

NAMED = 8  # places that a message lists before it says how many more there are


class DataSet(NamedTuple):
    """What was read.

    splits: The three splits; of preferences, the questions with the chosen answers.
    skipped: For each file the places of entries that were left out.
    notes: A line for each file that is no JSON of plain entries: what it was taken for.
    counts: Of a mixture, how many training entries come from each file.
    pairs: Of preferences, the pairs of each split.
    """

    splits: Splits
    skipped: dict[str, list[int]]
    notes: list[str]
    counts: list[int]
    pairs: dict[str, list[Pair]] | None = None


@dataclass(frozen=True)
class DataConfig:
    """The settings of instruction data.

    Args:
        path: JSON, JSONL, CSV, TSV or Parquet file, a folder of `save_to_disk`, a URL, a data set
            of the hub (`hf://owner/name:split`), or the name of a file that the package ships. The
            chapter's data by default.
        batch_size: Rows a micro-batch on one device.
        val_path: Validation entries from a file of their own; `path` is then not cut for them.
        test_path: Likewise for test entries.
        field_names: The file's names where they differ, e.g. `{input: context}`.
        format: What a record is: instruction, messages, sharegpt, prompt_completion or preference;
            auto looks at the first one.
        mixture: Instead of `path` several files, each with the fields of a `Source`: path, weight
            or share, format, field_names.
        fractions: Shares of train, test and validation, in file order, of `path`.
        empty_output: Whether an entry without an answer is refused (error) or left out (skip).
        equal_answers: Whether a pair of preferences whose answers are equal is left out of training
            (skip), refused (error) or trained on for nothing, as in the book (keep).
        prompt_style: `alpaca`, `phi3`, `chatml`, `llama3`, `qwen3`, `template` (the model's own),
            or a mapping with instruction, input and header.
        header_in_prompt: Whether the response header is given (true) or generated (false).
        mask_prompt: Loss on the answers alone (exercise 7.2).
        train_on: With `mask_prompt`: all answers of a conversation, its last one, or what these
            roles say. A message's own `train` and `weight` go before it.
        max_length: Most tokens of a row.
        overlong: What happens to longer rows.
        drop_last: Leave out a last training batch that is not full, as the chapter does.
        padding_free: Lay rows end to end instead of padding them.
        share_prefix: Also compute what rows of a batch have in common once; implies
            `padding_free`. Not with dropout, where rows need states of their own.
        group_by_length: Rows of like length share a batch; changes the order.
        max_tokens: Instead of `batch_size`, most tokens that a training micro-batch computes on one
            device, padding included where there is some; `drop_last` then leaves out nothing.
        largest_first: With `max_tokens`, each epoch begins with its largest micro-batch.
        num_workers: Processes that batch ahead.
        predict_split: What `predict` answers.
    """

    path: str = BOOK_DATA_URL
    batch_size: int = 8
    val_path: str | None = None
    test_path: str | None = None
    field_names: dict[str, str] | None = None
    format: Format = "auto"
    mixture: list[dict[str, Any]] | None = None
    fractions: tuple[float, float, float] = (0.85, 0.10, 0.05)
    empty_output: Literal["error", "skip"] = "error"
    equal_answers: Literal["skip", "error", "keep"] = "skip"
    prompt_style: str | dict[str, str] = "alpaca"
    header_in_prompt: bool = True
    mask_prompt: bool = False
    train_on: str | list[str] = "all"
    max_length: int = 1024
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    drop_last: bool = True
    padding_free: bool = False
    share_prefix: bool = False
    group_by_length: bool = False
    max_tokens: int | None = None
    largest_first: bool = False
    num_workers: int = 0
    predict_split: Literal["train", "val", "test"] = "test"

    def __post_init__(self) -> None:
        # From Python anything may come, which the command line's types would have refused.
        if not isinstance(self.path, str) or not self.path:
            raise InputError(f"data.path: {self.path!r} is not allowed; give a file or URL")
        for field in fields(self):
            if getattr(self, field.name) is None and field.default is not None:
                raise InputError(f"data.{field.name}: must not be null")
        for name, least in (
            ("batch_size", 1), ("max_length", 1), ("num_workers", 0), ("max_tokens", 1)
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"data.{name}: {value} is not allowed; it must be >= {least}")
        types = get_type_hints(type(self))
        for name in ("empty_output", "equal_answers", "format", "overlong", "predict_split"):
            value, allowed = getattr(self, name), get_args(types[name])
            if value not in allowed:
                raise InputError(f"data.{name}: unknown {value!r}; allowed: {', '.join(allowed)}")
        self.style()  # an unknown style, or a template without its place for the text
        self.masking()
        self.sources()
        if self.max_tokens is None and self.largest_first:
            raise InputError("data.largest_first: needs data.max_tokens; without it is no effect")
        if self.max_tokens is not None and (self.group_by_length or self.mixture):
            other = "group_by_length" if self.group_by_length else "mixture"
            raise InputError(f"data.max_tokens: not together with data.{other}; leave one out")

    def style(self) -> PromptStyle:
        """How an entry is laid out as text."""
        return get_style(self.prompt_style, self.header_in_prompt)

    def masking(self) -> Masking:
        """Which messages of a conversation carry loss."""
        return Masking(self.mask_prompt, self.train_on)

    def sources(self) -> tuple[Source, ...]:
        """The files that are trained on."""
        if self.mixture is not None:
            return read_sources(self.mixture)
        return (Source(self.path, format=self.format, field_names=self.field_names),)

    def files(self) -> list[str]:
        """The files and URLs that the splits are read from."""
        paths = [source.path for source in self.sources()]
        return paths + [path for path in (self.val_path, self.test_path) if path is not None]

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
        notes: list[str] = []

        def read_file(source: Source | None) -> Sequence[Example]:
            if source is None:
                return []
            entries, skipped[source.path] = read_entry_file(
                source.path,
                field_names=source.field_names,
                empty_output="keep" if keep else self.empty_output,
                format=source.format,
                say=notes.append,
            )
            return entries

        def of_its_own(path: str | None) -> Source | None:
            fields = {"format": self.format, "field_names": self.field_names}
            return None if path is None else Source(path, **fields)  # type: ignore[arg-type]

        files = [read_file(source) for source in self.sources()]
        val, test = read_file(of_its_own(self.val_path)), read_file(of_its_own(self.test_path))
        splits, counts = self.cut(files, val, test)
        return DataSet(splits, skipped, notes, counts)

    def read_pairs(self) -> DataSet:
        """Read preferences, cut as any other data are.

        Raises:
            InputError: A file or record is wrong, holds no preferences, or a split stays empty; or
                a setting does not go with them.
            ServiceError: A URL could not be fetched.
        """
        if self.format not in ("auto", "preference"):
            raise InputError(
                f"data.format: {self.format} holds no chosen and rejected answers, which "
                "model.objective learns from; give preference"
            )
        if not self.mask_prompt:
            raise InputError(
                "data.mask_prompt: false is not allowed with preferences, which compare answers; "
                "set it to true"
            )
        for name in ("mixture", "max_tokens"):
            if getattr(self, name) is not None:
                raise InputError(f"data.{name}: not with preferences; leave it out")

        def read_file(path: str | None) -> list[Any]:
            names, is_told = self.field_names, self.format == "preference"
            return [] if path is None else read_pairs(path, field_names=names, is_told=is_told)

        files = [read_file(self.path)], read_file(self.val_path), read_file(self.test_path)
        cut, counts = self.cut(*files)
        pairs: dict[str, Any] = cut._asdict()
        questions = {name: [pair.examples[0] for pair in part] for name, part in pairs.items()}
        return DataSet(Splits(**questions), {}, [], counts, pairs)

    def cut(
        self, files: Sequence[Sequence[Any]], val: Sequence[Any], test: Sequence[Any]
    ) -> tuple[Splits, list[int]]:
        """The three splits of what was read, and how much training takes of each file.

        Args:
            files: What is in each of `sources()`, in order.
            val, test: What is in the files of these splits; empty where there are none.
        """
        if val and test:
            parts = [Splits(entries, test=[], val=[]) for entries in files]
        else:
            # A split that has a file of its own needs no share, and may be too small for one. Of
            # several files one may be too small, but not all.
            own = [name for name, part in (("val", val), ("test", test)) if part]
            optional = own if len(files) == 1 else ["val", "test"]
            parts = [split_entries(entries, self.fractions, optional) for entries in files]
        trained = [
            join_entries([part.train, part.val if val else [], part.test if test else []])
            for part in parts
        ]
        splits = Splits(
            train=join_entries(trained),
            test=test or join_entries([part.test for part in parts]),
            val=val or join_entries([part.val for part in parts]),
        )
        for name, entries in splits._asdict().items():
            if not entries:
                raise InputError(f"fractions: {list(self.fractions)} leave the {name} split empty")
        return splits, [len(entries) for entries in trained]


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
