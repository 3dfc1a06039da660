"""What is counted before training, against what training then makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import nn, optim, utils, zeros

from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import collate, pack
from lightning_sft.data.config import DataConfig
from lightning_sft.data.counting import (
    check_answers,
    count_epoch_steps,
    count_run_steps,
    count_split,
    limit_batches,
    measure_batch,
)
from lightning_sft.data.entries import Entry
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.rows import TokenRows, tokenize

# One character is one token: a prompt of `length` + 1, or `length` where the model writes ">".
GIVEN = PromptStyle(instruction="{instruction}", input="+{input}", header=">")
WRITTEN = PromptStyle(
    instruction="{instruction}", input="+{input}", header=">", header_in_prompt=False
)


def make_rows(lengths: list[tuple[int, int]], style: PromptStyle, tokenizer) -> TokenRows:
    """Rows of entries with so many characters of instruction and of output."""
    entries = [Entry("i" * asked, "", "o" * answered) for asked, answered in lengths]
    return TokenRows.from_rows([tokenize(e, style, tokenizer, n) for n, e in enumerate(entries)])


@pytest.mark.parametrize("style", [GIVEN, WRITTEN], ids=["header given", "header written"])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    max_length=st.integers(1, 20),
    mask_prompt=st.booleans(),
    overlong=st.sampled_from(["truncate", "drop"]),
)
def test_counts_are_those_of_the_batches(
    char_tokenizer, style, lengths, max_length, mask_prompt, overlong
):
    rows = make_rows(lengths, style, char_tokenizer)
    config = DataConfig("x", max_length=max_length, mask_prompt=mask_prompt, overlong=overlong)
    counts = count_split(rows, config, style, char_tokenizer)
    used = [row for row in rows if overlong == "truncate" or len(row.ids) <= max_length]
    assert counts.entries == len(lengths)
    assert len(counts.overlong) == sum(len(row.ids) > max_length for row in rows)
    if not used:
        assert (counts.tokens, counts.supervised, len(counts.answerless)) == (0, 0, 0)
        return
    batch = collate(used, max_length=max_length, mask_prompt=mask_prompt)
    assert counts.supervised == (batch["targets"] != -100).sum()
    assert counts.tokens == len(pack(used, max_length=max_length)["input_ids"])
    without_answer = [
        row.index
        for row, targets in zip(used, batch["targets"].tolist(), strict=True)
        if ord("o") not in targets
    ]
    assert counts.answerless.tolist() == without_answer


def test_most_answers_must_be_left(char_tokenizer):
    """Rows of 10 prompt tokens and an answer, cut to 9; and short ones."""
    config = DataConfig("x", max_length=9)

    def check(cut: int, whole: int, config: DataConfig = config) -> None:
        rows = make_rows([(9, 3)] * cut + [(2, 3)] * whole, GIVEN, char_tokenizer)
        check_answers(count_split(rows, config, GIVEN, char_tokenizer), config, "train split")

    check(0, 3)
    check(2, 2)  # half is no majority
    with pytest.raises(InputError) as error:
        check(3, 2)
    assert str(error.value) == (
        "train split: 3 of 5 entries are cut to max_length 9 before their answer begins, so "
        "training would teach no answers; raise data.max_length or set data.overlong to drop"
    )
    check(3, 2, DataConfig("x", max_length=10))  # the first answer token is the last target
    check(3, 2, DataConfig("x", max_length=9, overlong="drop"))


def test_measure_batch():
    ids = [[1, 2, 3], [1, 2], [4]]
    assert measure_batch(ids) == (9, 3, 3)
    assert measure_batch(ids, padding_free=True) == (6, 3, 3)
    assert measure_batch(ids, share_prefix=True) == (4, 3, 3)
    assert measure_batch(ids, padding_free=True, share_prefix=True) == (4, 3, 3)


class Steps(LightningModule):
    """Counts what Lightning itself makes of its settings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("limit", "accumulate", "max_epochs", "max_steps"),
    [
        (None, 1, 2, -1),
        (0.5, 1, 2, -1),
        (0.99, 2, 1, -1),
        (3, 2, 2, -1),
        (99, 3, 1, -1),
        (5, 4, 3, 4),
        (None, 2, None, 9),
        (None, 1, -1, 8),
        (None, 1, 2, 0),
    ],
)
def test_steps_are_those_that_lightning_makes(limit, accumulate, max_epochs, max_steps):
    trainer = Trainer(
        accelerator="cpu",
        limit_train_batches=limit,
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Steps(), utils.data.DataLoader(zeros(7, 1)))
    batches = limit_batches(7, limit)
    assert count_run_steps(batches, accumulate, max_epochs, max_steps) == trainer.global_step
    if max_steps < 0:
        assert trainer.num_training_batches == batches
        assert count_epoch_steps(batches, accumulate) * max_epochs == trainer.global_step


def test_a_run_without_an_end_has_no_number_of_steps():
    assert count_run_steps(7, 1, None) is None
    assert count_run_steps(7, 1, -1, -1) is None


def test_counts_are_whole_numbers(char_tokenizer):
    """numpy's own integers would print as np.int64(3)."""
    counts = count_split(
        make_rows([(2, 2)], GIVEN, char_tokenizer), DataConfig("x"), GIVEN, char_tokenizer
    )
    assert {type(value) for value in counts[:4]} == {int}
    assert all(isinstance(places, np.ndarray) for places in counts[4:7])
