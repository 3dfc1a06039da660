"""The LightningDataModule: files → splits → rows → loaders.

    >>> data = InstructionDataModule("instruction-data.json", batch_size=8, mask_prompt=True)
    >>> next(iter(data.train_dataloader()))["input_ids"].shape
    torch.Size([8, 61])

Source: sections 7.2 to 7.5 of "Build a Large Language Model (From Scratch)"; listing 7.6 makes the
same three loaders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt

from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import BatchMaker, collate_prompts
from lightning_sft.data.config import DataConfig, DataSet, describe_skipped
from lightning_sft.data.conversation import Example
from lightning_sft.data.conversation_rows import tokenize_questions
from lightning_sft.data.counting import (
    SplitCounts,
    describe_training,
)
from lightning_sft.data.entries import Splits, local_path
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.loader import (
    Batch,
    EvalLoader,
    TrainLoader,
    accumulation_plan,
    check_workers,
)
from lightning_sft.data.mixture import describe_mixture
from lightning_sft.data.order import BatchOrder, Stretch, epoch_order
from lightning_sft.data.ordering import make_order, plan_mixture
from lightning_sft.data.pair_batching import PairBatchMaker
from lightning_sft.data.pair_rows import PairRows
from lightning_sft.data.pair_splits import describe_pairs, make_pair_rows
from lightning_sft.data.preferences import Pair
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.rows import TokenRows
from lightning_sft.data.split_rows import take_rows, tokenize_split
from lightning_sft.data.template import bind_style
from lightning_sft.data.token_budget import TokenBudgetOrder
from lightning_sft.data.tokenizer import Tokenizer, gpt2_tokenizer


class InstructionDataModule(L.LightningDataModule):
    """Instruction data, split, tokenized and batched.

    Args:
        path: JSON, JSONL, CSV, TSV or Parquet file, a folder of `save_to_disk`, a URL, a data set
            of the hub (`hf://owner/name:split`), or the name of a file that the package ships. The
            chapter's data by default.
        batch_size: Rows a micro-batch on one device.
        seed: Orders the epochs.
        predict_batch_size: Prompts answered side by side.
        settings: All others of `DataConfig`, by name.
    """

    def __init__(
        self,
        path: str = DataConfig.path,
        batch_size: int = DataConfig.batch_size,
        seed: int = 123,
        *,
        predict_batch_size: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__()
        if predict_batch_size < 1:
            raise InputError(
                f"data.predict_batch_size: {predict_batch_size} is not allowed; it must be >= 1"
            )
        # The command line finds the names, types and help of `settings` by reading this line.
        self.config = DataConfig(path=path, batch_size=batch_size, **settings)
        # Lightning's BatchSizeFinder sets this one.
        self.batch_size = self.config.batch_size
        self.seed, self.predict_batch_size = seed, predict_batch_size
        self._style: PromptStyle = self.config.style()
        # Another model family's is taken from the trainer's module, or set here by hand before
        # the first loader is made.
        self.tokenizer: Tokenizer = gpt2_tokenizer()
        self.answered: frozenset[int] = frozenset()  # entries that `predict` need not answer again
        self._data: DataSet | None = None
        self._opens_fit = False
        # Splits are tokenized when first asked for: `test` in a run that only trains, never.
        self._rows: dict[str, TokenRows] = {}
        self._counts: dict[str, SplitCounts] = {}
        self._pairs: dict[str, PairRows] = {}

    @property
    def has_pairs(self) -> bool:
        """Whether these are preferences: as the trainer's module says, else as `format` does."""
        module = self.trainer.lightning_module if self.trainer else None
        if module is None or not hasattr(module, "objective"):
            return self.config.format == "preference"
        return module.objective is not None

    @property
    def style(self) -> PromptStyle:
        """How entries are laid out; a model's own template is its tokenizer's."""
        return bind_style(self._style, self.tokenizer)

    @property
    def make_batch(self) -> BatchMaker:
        """Rows → batch, for training and validation."""
        return BatchMaker(
            self.config.max_length,
            self.config.mask_prompt,
            self.config.padding_free,
            self.config.share_prefix,
            self.tokenizer.eos_token_id,
        )

    def state_dict(self) -> dict[str, Any]:
        """What the order and content of the batches depend on, for a checkpoint to compare."""
        # Where this epoch stands is in the loader's own state; here is what must not change.
        trainer = self.trainer
        return {
            "data": self.units("train").fingerprint(),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "mask_prompt": self.config.mask_prompt,
            "max_length": self.config.max_length,
            "drop_last": self.config.drop_last,
            "group_by_length": self.config.group_by_length,
            "max_tokens": self.config.max_tokens,
            "mixture": [list(stretch) for stretch in self._stretches()],
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
        for path in self.config.files():
            local_path(path)

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the entries. `fit` also tokenizes, and says what it will train on.

        Raises:
            InputError: The data is wrong, or teaches no answers, or there are far more workers
                than processors.
        """
        if stage is not None:
            check_workers(self.config.num_workers)  # before anything is read
        self._adopt_tokenizer()
        if self._data is None:
            if self.has_pairs:
                self._data = self.config.read_pairs()
            else:
                self._data = self.config.read(require_output=stage != "predict")
            self._say(*self._data.notes, *describe_skipped(self._data.skipped))
        if stage is not None:
            self._opens_fit = stage == "fit"
        if stage == "fit" and self.has_pairs:
            pairs = self.pairs("train"), self.pairs("val")
            self._say(*describe_pairs(*pairs, len(self.split("test")), self.config))
        elif stage == "fit":
            counts = self.count("train"), self.count("val")
            self._say(*describe_training(*counts, len(self.split("test")), self.config))
            if self.config.mixture:
                lengths = self._clipped_lengths()
                self._say(*describe_mixture(self.config.sources(), self._stretches(), lengths))

    def _adopt_tokenizer(self) -> None:
        """The one that came with the model's weights, unless rows are made or one was set."""
        module = self.trainer.lightning_module if self.trainer else None
        theirs = getattr(module, "tokenizer", None)
        is_untouched = not self._rows and self.tokenizer is gpt2_tokenizer()
        if is_untouched and isinstance(theirs, HFTokenizer):
            self.tokenizer = theirs

    @property
    def entries(self) -> Splits:
        """The entries of the three splits; reads the data if no one has yet."""
        self.setup()
        assert self._data is not None
        return self._data.splits

    def split(self, name: str) -> Sequence[Example]:
        """The entries of `train`, `val` or `test`."""
        return getattr(self.entries, name)

    def rows(self, split: str) -> TokenRows:
        """The tokenized rows of `train`, `val` or `test` that take part in training.

        Raises:
            InputError: A row breaks the length policy, or most rows lost their answer to it.
        """
        if split not in self._rows:
            where, config = f"{split} split", self.config
            settings = config, self.style, self.tokenizer, where
            rows = tokenize_split(self.split(split), *settings)
            self._rows[split], self._counts[split] = take_rows(rows, *settings)
            too_long = len(self._counts[split].overlong)
            if too_long and not self._opens_fit:  # there the opening lines say so
                cut = f"cut to {config.max_length} tokens"
                what = "left out" if config.overlong == "drop" else cut
                self._say(f"{where}: {too_long} of {len(rows)} entries are {what}")
        return self._rows[split]

    def pairs(self, split: str) -> PairRows:
        """The tokenized pairs of a split that take part in preference tuning.

        Raises:
            InputError: A pair breaks the policy for lengths or for equal answers.
        """
        if split not in self._pairs:
            self.setup()
            assert self._data is not None
            assert self._data.pairs is not None
            pairs = self._data.pairs[split]
            made, notes = make_pair_rows(pairs, self.style, self.tokenizer, self.config, split)
            self._pairs[split] = made
            self._say(*notes)
        return self._pairs[split]

    def pair(self, split: str, index: int) -> Pair:
        """The pair in a place of a split, also one that training leaves out."""
        self.setup()
        assert self._data is not None
        assert self._data.pairs is not None
        return self._data.pairs[split][index]

    def pair_batch(self, split: str, index: int) -> Batch | None:
        """That pair as a batch; None where training leaves it out."""
        rows = self.pairs(split)
        places = np.flatnonzero(rows.indices == index)
        return self._batch_maker(split)([rows[int(places[0])]]) if len(places) else None

    def units(self, split: str) -> TokenRows | PairRows:
        """What an epoch takes one by one: rows, or pairs of them."""
        return self.pairs(split) if self.has_pairs else self.rows(split)

    def count(self, split: str) -> SplitCounts:
        """What an epoch of a split holds."""
        self.rows(split)
        return self._counts[split]

    def train_dataloader(self) -> TrainLoader:
        """Batches in the seeded order of the trainer's epoch, this rank's share of them."""
        rows, config = self.units("train"), self.config
        if isinstance(rows, PairRows):  # each pair counts alike in a step's mean
            num_targets: npt.NDArray[np.number] = np.ones(len(rows), np.int64)
        else:
            num_targets = rows.sum_weights(config.max_length, config.mask_prompt)
        loader = TrainLoader(
            rows,
            self._batch_maker("train"),
            num_targets=num_targets,
            num_tokens=self._clipped_lengths(),
            order=self.order(),
            num_workers=config.num_workers,
            **self._device_settings(),
        )
        return loader.follow(self.trainer) if self.trainer else loader

    def order(self, size: int | None = None, world_size: int = 1) -> BatchOrder | TokenBudgetOrder:
        """The order of training, with micro-batches of another size if one is given.

        Args:
            size: Rows of a micro-batch on one device, or tokens where `max_tokens` is set.
        """
        if self.config.max_tokens is None:
            config = dataclasses.replace(self.config, batch_size=size or self.batch_size)
        else:
            config = dataclasses.replace(self.config, max_tokens=size or self.config.max_tokens)
        return make_order(self.units("train"), config, self.seed, world_size, self._stretches())

    def _stretches(self) -> tuple[Stretch, ...]:
        """How often an epoch takes the rows of each file of a mixture."""
        rows = self.units("train")
        assert self._data is not None
        if isinstance(rows, PairRows):
            return ()
        return plan_mixture(rows, self.config, self._data.counts)

    def _clipped_lengths(self) -> npt.NDArray[np.int64]:
        """(rows,) tokens of each training row, or pair of rows, as it is computed."""
        rows = self.units("train")
        if isinstance(rows, PairRows):
            return rows.clipped_lengths(self.config.max_length)
        return rows.lengths.clip(max=self.config.max_length)

    def val_dataloader(self) -> EvalLoader:
        """The validation split in file order, every row once."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """The test split in file order, every row once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        """Prompts of the split to answer, those of like length together."""
        rows = tokenize_questions(self.split(self.config.predict_split), self.style, self.tokenizer)
        # A loader must not be empty: where all is answered, one entry is answered again.
        wanted = [int(i) for i in rows.indices if int(i) not in self.answered] or [0]
        # Rows of like length finish together; the response writer restores the file's order.
        by_length = sorted(wanted, key=lambda place: int(rows.prompt_lengths[place]))
        rows = rows.take(np.array(by_length))
        settings = self._device_settings() | {"pin_memory": False}  # lists, no tensors
        return EvalLoader(rows, collate_prompts, batch_size=self.predict_batch_size, **settings)

    def first_batches(self, split: str, count: int) -> list[Batch]:
        """The first batches of a split, of epoch 0 for training, on any number of devices alike.

        The chapter's loss curve is measured on these (`eval_iter=5` of listing 7.8).
        """
        rows, size = self.units(split), self.batch_size
        make: Callable[[list[Any]], Batch] = self._batch_maker(split)
        order = epoch_order(len(rows), self.seed, 0) if split == "train" else list(range(len(rows)))
        places = [order[k : k + size] for k in range(0, min(len(order), count * size), size)]
        return [make([rows[place] for place in part]) for part in places]

    def in_order(self, split: str, batch_size: int) -> Iterator[Batch]:
        """All of a split, in file order and on this process alone."""
        rows, make = self.units(split), self._batch_maker(split)
        for k in range(0, len(rows), batch_size):
            yield make([rows[place] for place in range(k, min(k + batch_size, len(rows)))])

    def _batch_maker(self, split: str) -> Callable[[list[Any]], Batch]:
        return PairBatchMaker(self.make_batch, split) if self.has_pairs else self.make_batch

    def _eval_loader(self, split: str) -> EvalLoader:
        return EvalLoader(
            self.units(split),
            self._batch_maker(split),
            batch_size=self.batch_size,
            num_workers=self.config.num_workers,
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

    def _say(self, *lines: str) -> None:
        """Print, on one of the processes of a run."""
        if lines and (self.trainer is None or self.trainer.is_global_zero):
            print("\n".join(lines))


def _accumulation(trainer: L.Trainer) -> int | dict[int, int]:
    """A number, or the schedule that sets it anew in some epochs."""
    plan = accumulation_plan(trainer)
    return plan if len(plan) > 1 else plan[0]
