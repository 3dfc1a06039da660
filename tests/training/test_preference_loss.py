"""The formulas of preference losses against plain ones, and rows' log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_sft import DPO
from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import IGNORE_INDEX, BatchMaker
from lightning_sft.data.pair_batching import PairBatchMaker
from lightning_sft.data.pair_rows import PairRow
from lightning_sft.data.rows import Row
from lightning_sft.models.lora import LoRAConfig, adapters_off, add_lora
from lightning_sft.training import loss as loss_module
from lightning_sft.training.log_probs import row_log_probs
from lightning_sft.training.pair_sums import sum_pairs
from lightning_sft.training.preference_loss import PREFERENCE_METRICS, preference_losses
from lightning_sft.training.reference import Reference

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
LAYOUTS = {"padded": (False, False), "packed": (True, False), "shared": (True, True)}

POLICY = [[-12.5, -30.25], [-80.0, -3.0], [-0.001, -55.5], [-41.0, -41.0]]
REFERENCE = [[-14.0, -28.0], [-79.0, -4.5], [-0.5, -50.0], [-41.0, -41.0]]
TOKENS = [[5, 11], [40, 2], [1, 9], [7, 7]]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def plain_loss(settings: dict[str, Any], pair: int) -> float:
    """A pair's loss in Python's own numbers, straight from the papers."""
    beta, kind = settings.get("beta", 0.1), settings.get("loss", "sigmoid")
    means = settings.get("average") or kind in ("ipo", "simpo", "orpo")
    n = TOKENS[pair] if means else [1, 1]
    c, r = (POLICY[pair][k] / n[k] for k in (0, 1))
    cr, rr = (REFERENCE[pair][k] / n[k] for k in (0, 1))
    h, smooth = (c - r) - (cr - rr), settings.get("label_smoothing", 0.0)
    if kind == "hinge":
        loss = max(0.0, 1 - beta * h)
    elif kind == "ipo":
        loss = (h - 1 / (2 * beta)) ** 2
    elif kind == "orpo":
        odds = [math.log(math.exp(p) / (1 - math.exp(p))) for p in (c, r)]
        loss = -c - beta * log_sigmoid(odds[0] - odds[1])
    else:
        x = beta * (c - r) - settings.get("gamma", 0.5) if kind == "simpo" else beta * h
        loss = -(1 - smooth) * log_sigmoid(x) - smooth * log_sigmoid(-x)
    return loss - settings.get("sft_weight", 0.0) * POLICY[pair][0] / TOKENS[pair][0]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.7, "label_smoothing": 0.2},
    {"average": True},
    {"loss": "hinge"},
    {"loss": "ipo"},
    {"loss": "simpo", "beta": 2.0, "gamma": 1.1},
    {"loss": "orpo", "beta": 0.3},
    {"sft_weight": 0.25},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_formulas(settings):
    objective = DPO(**settings)
    reference = torch.tensor(REFERENCE, dtype=torch.float64) if objective.needs_reference else None
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    losses, metrics = objective(policy, reference, torch.tensor(TOKENS))
    expected = [plain_loss(settings, pair) for pair in range(len(POLICY))]
    assert losses.tolist() == pytest.approx(expected, abs=1e-10, rel=1e-10)
    assert torch.isfinite(torch.autograd.grad(losses.sum(), policy)[0]).all()
    assert metrics.shape == (4, len(PREFERENCE_METRICS))
    assert not metrics.requires_grad


def test_rewards():
    """Of sums times beta; the book's are differences of means, without beta."""
    policy, reference = (torch.tensor(x, dtype=torch.float64) for x in (POLICY, REFERENCE))
    tokens = torch.tensor(TOKENS)
    sums = [0.15, -0.225, 0.375, 1.0, -12.5, -30.25]
    means = [0.3, -2.25 / 11, 0.3 + 2.25 / 11, 1.0, -2.5, -2.75]
    for average, expected in ((False, sums), (True, means)):
        _, metrics = preference_losses(
            policy, reference, tokens, loss="sigmoid", beta=0.1, average=average
        )
        assert metrics[0].tolist() == pytest.approx(expected)
    assert metrics[3, 3] == 0.0  # a tie is not right


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "model.objective.beta: 0.0 is not allowed; it must be positive and finite"),
        ({"beta": math.nan}, "beta: nan is not allowed"),
        ({"loss": "dpo"}, "loss: unknown 'dpo'; allowed: sigmoid, ipo, hinge, simpo, orpo"),
        ({"label_smoothing": 0.5}, r"label_smoothing: 0.5 is outside \[0, 0.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing: ipo has none; leave it at 0"),
        ({"sft_weight": -1.0}, "sft_weight: -1.0 is not allowed; it must be >= 0"),
        ({"loss": "orpo", "average": True}, "average: orpo always takes means; leave it out"),
        ({"loss": "simpo", "reference_weights": "x"}, "reference_weights: simpo has no reference"),
        ({"reference": "none"}, "reference: unknown 'none'; allowed: model, precomputed"),
    ],
)  # fmt: skip
def test_what_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        DPO(**settings).check()


# --- a model's log-probabilities ---

PAIRS = [
    PairRow(Row([5, 6, 7, 8, 9], 3, 0), Row([5, 6, 7, 8, 2, 3], 3, 0), 0),
    PairRow(Row([5, 6, 11], 2, 1), Row([5, 6, 12, 13], 2, 1), 1),
    PairRow(Row([20, 21, 22, 23], 1, 2), Row([20, 24], 1, 2), 2),
]


def make_batch(layout: str, pairs: list[PairRow] = PAIRS) -> dict[str, Any]:
    return PairBatchMaker(BatchMaker(64, True, *LAYOUTS[layout], 60), "train")(pairs)


def plain_log_probs(model: torch.nn.Module, pairs: list[PairRow] = PAIRS) -> torch.Tensor:
    """(2P,) of whole logits, row by row."""
    sums = []
    for pair in pairs:
        for row in (pair.chosen, pair.rejected):
            ids = torch.tensor([*row.ids, 60])
            logits = model(ids[None, :-1])[0].log_softmax(-1)
            found = logits[torch.arange(len(ids) - 1), ids[1:]]
            sums.append(found[row.prompt_length - 1 :].sum())
    return torch.stack(sums)


def gradients(model: torch.nn.Module, value: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("chunk", [2, 512])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_and_their_gradients(layout, chunk, adapted, make_model, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_SIZE", chunk)
    model = make_model(dtype=torch.float64)
    if adapted:
        add_lora(model, LoRAConfig(rank=2))
        with torch.no_grad():
            model.out_head.lora_b.normal_(generator=torch.Generator().manual_seed(1))
    sums, counts = row_log_probs(model, make_batch(layout))
    expected = plain_log_probs(model)
    torch.testing.assert_close(sums, expected, **EXACT)
    assert counts.tolist() == [3, 4, 2, 3, 4, 2]
    weights = torch.tensor([0.3, -1.2, 0.0, 2.0, -0.4, 1.0], dtype=torch.float64)
    ours, theirs = (gradients(model, (x.sin() * weights).sum()) for x in (sums, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "simpo", "orpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batchs_loss_and_gradients(layout, loss, make_model):
    model, frozen = make_model(dtype=torch.float64), make_model(seed=3, dtype=torch.float64)
    objective = DPO(loss=loss)
    reference = Reference(frozen, {}) if objective.needs_reference else None
    found = sum_pairs(model, objective, reference, make_batch(layout))
    policy = plain_log_probs(model).view(-1, 2)
    theirs = plain_log_probs(frozen).view(-1, 2).detach() if reference else None
    expected = objective(policy, theirs, torch.tensor([[3, 4], [2, 3], [4, 2]])).losses.sum()
    torch.testing.assert_close(found.loss, expected, **EXACT)
    for one, other in zip(gradients(model, found.loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_repeats_count_nothing(loss, make_model):
    """A pair repeated to even out ranks, also where a rank has no other."""
    model = make_model(dtype=torch.float64)
    reference, objective = Reference(make_model(seed=3, dtype=torch.float64), {}), DPO(loss=loss)
    alone = sum_pairs(model, objective, reference, make_batch("shared"))
    repeated = [*PAIRS, PAIRS[0]._replace(index=-1)]
    with_repeat = sum_pairs(model, objective, reference, make_batch("shared", repeated))
    assert int(with_repeat.num_pairs) == 3
    torch.testing.assert_close(with_repeat.loss, alone.loss, **EXACT)
    nothing = sum_pairs(model, objective, reference, make_batch("padded", repeated[3:]))
    assert (nothing.loss.item(), int(nothing.num_pairs)) == (0.0, 0)
    assert all((grad == 0).all() for grad in gradients(model, nothing.loss))


def test_a_pairs_prompt_is_computed_once():
    shared, packed = make_batch("shared"), make_batch("packed")
    assert len(packed["input_ids"]) == 24  # every token of six rows
    # 5 6 7 8 9 | 2 3 behind 5 6 7 8 | 11 | 12 13 behind 5 6 | 20 21 22 23 | 24 behind 20
    assert len(shared["input_ids"]) == 5 + 2 + 1 + 2 + 4 + 1
    assert (shared["targets"] != IGNORE_INDEX).sum() == 18


def test_adapters_off_is_the_model_before_them_to_the_bit(make_model):
    plain, adapted = make_model(), add_lora(make_model(), LoRAConfig(rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    batch = make_batch("shared")
    copied, switched = Reference(plain, {}), Reference(None, {"sha256": ""})
    expected = copied.log_probs(adapted, batch)
    assert torch.equal(switched.log_probs(adapted, batch), expected)
    assert not torch.equal(row_log_probs(adapted, batch)[0], expected)
    with adapters_off(adapted):
        assert torch.equal(adapted(torch.tensor([[1, 2]])), plain(torch.tensor([[1, 2]])))
    # Computed ahead they come out of another batch, and so differ in the last bits.
    switched.tables["train"] = expected.view(-1, 2)
    again = switched.log_probs(adapted, make_batch("padded", PAIRS[1:2]))
    torch.testing.assert_close(again, expected[2:4], rtol=0, atol=0)


def test_log_odds_near_certainty_keep_their_gradient():
    """log(1 - eˣ) of means near 0 and far below, against float64's own."""
    scores = torch.tensor([[-1e-9, -80.0], [-0.69, -0.70]], dtype=torch.float64, requires_grad=True)
    losses, _ = preference_losses(scores, None, torch.ones(2, 2), loss="orpo", beta=1.0)
    odds = scores - torch.log(-torch.expm1(scores))
    expected = -scores[:, 0] - F.logsigmoid(odds[:, 0] - odds[:, 1])
    torch.testing.assert_close(losses, expected, **EXACT)
    ours, theirs = (torch.autograd.grad(x.sum(), scores)[0] for x in (losses, expected))
    torch.testing.assert_close(ours, theirs, **EXACT)
