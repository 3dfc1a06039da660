"""The LightningDataModule: files → splits → rows → loaders.

Source: sections 7.2 to 7.5 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import (
    BatchMaker,
    collate_prompts,
)
from lightning_sft.data.entries import (
    BOOK_DATA_URL,
    Entry,
    Splits,
    local_path,
    read_entries,
    split_entries,
)
from lightning_sft.data.loader import Batch, EvalLoader, TrainLoader, accumulation_plan
from lightning_sft.data.order import epoch_order
from lightning_sft.data.prompts import PromptStyle, get_style
from lightning_sft.data.rows import (
    OVERLONG_POLICIES,
    TokenRows,
    fit_to_length,
    tokenize_entries,
)
from lightning_sft.data.tokenizer import Tokenizer, gpt2_tokenizer


class InstructionDataModule(L.LightningDataModule):
    """Instruction data, split, tokenized and batched.

    Args:
        path: JSON or JSONL file, URL, or the name of a file that the package ships. The chapter's
            data by default.
        val_path: Validation entries from a file of their own; `path` is then not cut for them.
        test_path: Likewise for test entries.
        field_names: The file's names where they differ, e.g. `{input: context}`.
        fractions: Shares of train, test and validation, in file order, of `path`.
        prompt_style: `alpaca`, `phi3`, `chatml`, or a mapping with instruction, input and header.
        header_in_prompt: Whether the response header is given (true) or generated (false).
        mask_prompt: Loss on the answer alone (exercise 7.2).
        max_length: Most tokens of a row.
        overlong: What happens to longer rows.
        batch_size: Rows a micro-batch on one device.
        drop_last: Leave out a last training batch that is not full, as the chapter does.
        padding_free: Lay rows end to end instead of padding them.
        share_prefix: Also compute what rows of a batch have in common once; implies
            `padding_free`. Not with dropout, where rows need states of their own.
        group_by_length: Rows of like length share a batch; changes the order.
        num_workers: Processes that batch ahead.
        seed: Orders the epochs.
        predict_split: What `predict` answers.
        predict_batch_size: Prompts answered side by side.
    """

    def __init__(
        self,
        path: str = BOOK_DATA_URL,
        batch_size: int = 8,
        seed: int = 123,
        *,
        val_path: str | None = None,
        test_path: str | None = None,
        field_names: dict[str, str] | None = None,
        fractions: tuple[float, float, float] = (0.85, 0.10, 0.05),
        prompt_style: str | dict[str, str] = "alpaca",
        header_in_prompt: bool = True,
        mask_prompt: bool = False,
        max_length: int = 1024,
        overlong: Literal["truncate", "drop", "error"] = "truncate",
        drop_last: bool = True,
        padding_free: bool = False,
        share_prefix: bool = False,
        group_by_length: bool = False,
        num_workers: int = 0,
        predict_split: Literal["train", "val", "test"] = "test",
        predict_batch_size: int = 32,
    ) -> None:
        super().__init__()
        if not isinstance(path, str) or not path:
            raise InputError(f"data.path: {path!r} is not allowed; give a file or URL")
        sizes = {"batch_size": batch_size, "predict_batch_size": predict_batch_size}
        for name, value in (sizes | {"max_length": max_length}).items():
            if value < 1:
                raise InputError(f"data.{name}: {value} is not allowed; it must be >= 1")
        if overlong not in OVERLONG_POLICIES:
            raise InputError(
                f"data.overlong: unknown {overlong!r}; allowed: {', '.join(OVERLONG_POLICIES)}"
            )
        if num_workers < 0:
            raise InputError(f"data.num_workers: {num_workers} is not allowed; it must be >= 0")
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.field_names, self.fractions = field_names, fractions
        self.style: PromptStyle = get_style(prompt_style, header_in_prompt)
        self.tokenizer: Tokenizer = gpt2_tokenizer()
        self.mask_prompt, self.max_length, self.overlong = mask_prompt, max_length, overlong
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.group_by_length, self.num_workers = group_by_length, num_workers
        self.predict_split, self.predict_batch_size = predict_split, predict_batch_size
        self.make_batch = BatchMaker(max_length, mask_prompt, padding_free, share_prefix)
        self.entries: Splits | None = None
        self.answered: frozenset[int] = frozenset()  # entries that `predict` need not answer again
        self._rows: dict[str, TokenRows] = {}

    def state_dict(self) -> dict[str, Any]:
        """What the order and content of the batches depend on, for a checkpoint to compare."""
        trainer = self.trainer
        return {
            "data": self.rows("train").fingerprint(),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "mask_prompt": self.mask_prompt,
            "max_length": self.max_length,
            "drop_last": self.drop_last,
            "group_by_length": self.group_by_length,
            "devices": trainer.world_size if trainer else 1,
            "accumulate_grad_batches": _accumulation(trainer) if trainer else 1,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on training where the rest of the run would see other batches.

        Raises:
            InputError: Names every setting that differs.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        now = self.state_dict()
        differing = [
            f"{name} was {state_dict[name]}, is {now[name]}"
            for name in now
            if name in state_dict and state_dict[name] != now[name]
        ]
        if differing:
            raise InputError(
                f"ckpt_path: cannot resume with other batches: {'; '.join(differing)} (to start "
                "anew from its weights, give the checkpoint as model.weights)"
            )

    def prepare_data(self) -> None:
        """Download what is a URL; one process a node does it for all. Assigns nothing."""
        for path in (self.path, self.val_path, self.test_path):
            if path is not None:
                local_path(path)

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the entries; tokenizing waits for the first loader that needs a split."""
        if self.entries is None:
            self.entries = self._read_splits(require_output=stage != "predict")

    def rows(self, split: str) -> TokenRows:
        """The tokenized rows of `train`, `val` or `test` that take part in training.

        Raises:
            InputError: A row breaks the length policy.
        """
        if split not in self._rows:
            rows = tokenize_entries(self.split(split), self.style, self.tokenizer)
            self._rows[split] = kept = fit_to_length(
                rows,
                max_length=self.max_length,
                overlong=self.overlong,
                mask_prompt=self.mask_prompt,
                where=f"{split} split",
            )
            too_long = int((rows.lengths > self.max_length).sum())
            if too_long and (self.trainer is None or self.trainer.is_global_zero):
                what = "left out" if len(kept) < len(rows) else f"cut to {self.max_length} tokens"
                print(f"{split} split: {too_long} of {len(rows)} entries are {what}")
        return self._rows[split]

    def split(self, name: str) -> list[Entry]:
        """The entries of `train`, `val` or `test`; reads the data if no one has yet."""
        self.setup()
        assert self.entries is not None
        return getattr(self.entries, name)

    def train_dataloader(self) -> TrainLoader:
        rows = self.rows("train")
        loader = TrainLoader(
            rows,
            self.make_batch,
            num_targets=rows.count_targets(self.max_length, self.mask_prompt),
            num_tokens=rows.lengths.clip(max=self.max_length),
            batch_size=self.batch_size,
            seed=self.seed,
            drop_last=self.drop_last,
            group_by_length=self.group_by_length,
            num_workers=self.num_workers,
            **self._device_settings(),
        )
        return loader.follow(self.trainer) if self.trainer else loader

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        """Prompts of the split to answer, those of like length together."""
        rows = tokenize_entries(self.split(self.predict_split), self.style, self.tokenizer)
        wanted = [int(i) for i in rows.indices if int(i) not in self.answered] or [0]
        by_length = sorted(wanted, key=lambda place: int(rows.prompt_lengths[place]))
        rows = TokenRows.from_rows([rows[place] for place in by_length])
        settings = self._device_settings() | {"pin_memory": False}  # lists, no tensors
        return EvalLoader(rows, collate_prompts, batch_size=self.predict_batch_size, **settings)

    def first_batches(self, split: str, count: int) -> list[Batch]:
        """The first batches of a split, of epoch 0 for training, on any number of devices alike."""
        rows = self.rows(split)
        order = epoch_order(len(rows), self.seed, 0) if split == "train" else list(range(len(rows)))
        size = self.batch_size
        places = [order[k : k + size] for k in range(0, min(len(order), count * size), size)]
        return [self.make_batch([rows[place] for place in part]) for part in places]

    def _eval_loader(self, split: str) -> EvalLoader:
        return EvalLoader(
            self.rows(split),
            self.make_batch,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            **self._device_settings(),
        )

    def _device_settings(self) -> dict[str, Any]:
        """The running trainer's rank and world size, and whether its device wants pinned memory."""
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1, "pin_memory": False}
        on_cuda = trainer.strategy.root_device.type == "cuda"
        return {
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "pin_memory": on_cuda,
        }

    def _read_splits(self, require_output: bool) -> Splits:
        def read(path: str) -> list[Entry]:
            return read_entries(path, field_names=self.field_names, require_output=require_output)

        entries = read(self.path)
        val = read(self.val_path) if self.val_path else None
        test = read(self.test_path) if self.test_path else None
        if val is not None and test is not None:
            return Splits(train=entries, test=test, val=val)
        own = [name for name, found in (("val", val), ("test", test)) if found is not None]
        parts = split_entries(entries, self.fractions, may_be_empty=own)
        if val is None and test is None:
            return parts
        # One split has a file of its own: its share of `path` goes to training.
        if val is not None:
            return Splits(train=parts.train + parts.val, test=parts.test, val=val)
        return Splits(train=parts.train + parts.test, test=test or [], val=parts.val)


def _accumulation(trainer: L.Trainer) -> int | dict[int, int]:
    """A number, or the schedule that sets it anew in some epochs."""
    plan = accumulation_plan(trainer)
    return plan if len(plan) > 1 else plan[0]
