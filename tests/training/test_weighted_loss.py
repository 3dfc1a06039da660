"""Weights of tokens: exact in every layout and cut of a step; plain rows know nothing of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_sft import Conversation, InstructionDataModule, Message
from lightning_sft.data.batching import IGNORE_INDEX, BatchMaker
from lightning_sft.data.conversation_rows import tokenize_conversation
from lightning_sft.data.prompts import get_style
from lightning_sft.data.rows import Row, TokenRows
from lightning_sft.data.segments import Masking
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.training import loss as loss_module
from lightning_sft.training.loss import sum_cross_entropy
from lightning_sft.training.module import SFTModule, TokenLoss
from support.plain import make_module, make_trainer
from support.talks import write_talks

EXACT = {"atol": 1e-10, "rtol": 1e-10}
LAYOUTS = {"padded": (False, False), "packed": (True, False), "shared": (True, True)}
# Conversations with a common beginning, one an answer further, with weights of all kinds.
FIRST = [Message("system", "S"), Message("user", "Q"), Message("assistant", "An answer.", weight=2)]
TALKS = [
    Conversation(FIRST),
    Conversation([*FIRST, Message("user", "R"), Message("assistant", "B", weight=0.3)]),
    Conversation([*FIRST, Message("user", "R"), Message("assistant", "C", train=False)]),
    Conversation([Message("user", "Q"), Message("assistant", "A")]),
]


@pytest.fixture
def module() -> SFTModule:
    module = make_module()
    module.configure_model()
    return module.double().eval()


def make_rows(style: str = "chatml", masking: Masking | None = None) -> list[Row]:
    tokenizer, masking = gpt2_tokenizer(), masking or Masking(mask_prompt=True)
    return [
        row
        for index, talk in enumerate(TALKS)
        for row in tokenize_conversation(talk, get_style(style), tokenizer, masking, index)
    ]


def plain_loss(module: SFTModule, rows: list[Row]) -> tuple[torch.Tensor, float]:
    """Token by token and row by row, as one would write it down."""
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        ids = torch.tensor([*row.ids, 50256])
        logits = module(ids[None, :-1])[0]
        for start, end, weight in row.loss_spans(mask_prompt=True):
            for place in range(max(start, 1), end):
                total = total + weight * F.cross_entropy(logits[place - 1], ids[place])
                weights += weight
    return total, weights


def gradients(module: SFTModule, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("style", ["chatml", "alpaca"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_plain_sum(layout, style, chunk, module, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_SIZE", chunk)
    rows = make_rows(style)
    expected, weights = plain_loss(module, rows)
    batch = BatchMaker(512, True, *LAYOUTS[layout])(rows)
    loss, count = module.sum_loss(batch)
    assert float(count) == pytest.approx(weights, abs=1e-12)
    torch.testing.assert_close(loss, expected, **EXACT)
    wanted = gradients(module, expected / weights)
    assert_close(gradients(module, loss / count), wanted)
    # A step cut into micro-batches: each part's sum by the weights of all.
    made = TokenRows.from_rows(rows)
    total = made.sum_weights(512, mask_prompt=True).sum()
    assert total == pytest.approx(weights, abs=1e-12)
    maker = BatchMaker(512, True, *LAYOUTS[layout])
    shares = [gradients(module, module.sum_loss(maker([row]))[0] / total) for row in made]
    assert_close([torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)], wanted)


def test_one_row_a_conversation_teaches_what_one_row_a_turn_does(module):
    """Without the end-of-text token, which ends a row and not a turn."""
    closing = get_style("chatml")
    tokenizer, masking = gpt2_tokenizer(), Masking(mask_prompt=True)
    whole, turns = [], []
    for talk in TALKS:
        [row] = tokenize_conversation(talk, closing, tokenizer, masking)
        spans = [span._replace(end=min(span.end, len(row.ids))) for span in row.spans or ()]
        whole.append(row._replace(spans=spans))
        turns += [Row(row.ids[: span.end], span.start, 0, [span]) for span in spans]
    assert len(turns) > len(whole)
    losses = [
        module.sum_loss(BatchMaker(512, True, *layout)(rows))
        for rows in (whole, turns)
        for layout in LAYOUTS.values()
    ]
    found = [gradients(module, loss) for loss, _ in losses]
    for (loss, count), grads in zip(losses, found, strict=True):
        torch.testing.assert_close(count, losses[0][1], **EXACT)
        torch.testing.assert_close(loss, losses[0][0], **EXACT)
        assert_close(grads, found[0])


def test_weights_of_one_change_no_bit(module):
    """In float32: the same numbers come out with weights and without."""
    module.float()
    rows = [Row([5, 6, 7, 8], 2, 0), Row([5, 6, 9], 2, 1)]
    batch = BatchMaker(64, True, False, False)(rows)
    assert "weights" not in batch
    loss, count = module.sum_loss(batch)
    grads = gradients(module, loss / count)
    batch["weights"] = (batch["targets"] != IGNORE_INDEX).float()
    weighted, total = module.sum_loss(batch)
    assert (weighted.item(), total.item()) == (loss.item(), count.item())
    for one, other in zip(grads, gradients(module, weighted / total), strict=True):
        assert torch.equal(one, other)


def test_the_summed_loss_alone():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(17, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, places = torch.randint(17, (40,)), torch.randint(12, (40,))
    weights = torch.rand(40)
    plain = F.cross_entropy((hidden @ head.T)[places], targets, reduction="none")
    expected = (plain * weights.double()).sum()
    actual = sum_cross_entropy(hidden, head, targets, places, weights=weights)
    torch.testing.assert_close(actual, expected, **EXACT)
    assert_close(
        list(torch.autograd.grad(actual, (hidden, head))),
        list(torch.autograd.grad(expected, (hidden, head))),
    )


def test_a_mean_over_the_split_takes_weights():
    metric = TokenLoss()
    metric.update(torch.tensor(3.0), torch.tensor(2))  # a batch without weights
    metric.update(torch.tensor(1.0), torch.tensor(0.5))
    assert float(metric.compute()) == 4.0 / 2.5


# --- whole runs ---


def losses_of(folder: Path, data: dict[str, Any], **trainer: Any) -> list[float]:
    torch.manual_seed(0)
    seen: list[float] = []
    made = InstructionDataModule(
        str(write_talks(folder / "talks.json")),
        mask_prompt=True,
        fractions=(0.8, 0.1, 0.1),
        max_length=512,
        prompt_style="chatml",
        drop_last=False,
        **data,
    )
    module = SFTModule(
        {"emb_dim": 8, "n_heads": 2, "n_layers": 1, "context_length": 512, "drop_rate": 0.0},
        None,
        prompt_style="chatml",
        max_length=512,
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-2),
    )
    log = module._log_step
    module._log_step = lambda loss, batch: (seen.append(float(loss)), log(loss, batch))  # type: ignore[method-assign]
    make_trainer(max_epochs=2, precision="64-true", **trainer).fit(module, datamodule=made)
    return seen


def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path):
    expected = losses_of(tmp_path, {"batch_size": 4})
    for settings, trainer in (
        ({"batch_size": 2}, {"accumulate_grad_batches": 2}),
        ({"batch_size": 4, "padding_free": True}, {}),
        ({"batch_size": 1, "share_prefix": True}, {"accumulate_grad_batches": 4}),
    ):
        actual = losses_of(tmp_path, settings, **trainer)
        assert actual == pytest.approx(expected, abs=1e-10)
