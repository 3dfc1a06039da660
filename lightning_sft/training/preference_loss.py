"""The formulas of preference losses: log-probabilities of two answers → a loss for each pair.

With c and r the log-probabilities that the model gives the chosen and the rejected answer, and c',
r' those of a frozen reference, all losses but two look at

    h = (c - r) - (c' - r')

which says how much further the model sets the two answers apart than its reference does.

| loss | of a pair |
|---|---|
| sigmoid | -log σ(βh), with label smoothing ε: -(1 - ε) log σ(βh) - ε log σ(-βh) |
| hinge | max(0, 1 - βh) |
| ipo | (h - 1 / 2β)², of means over tokens |
| simpo | -log σ(β(c - r) - γ), of means over tokens; smoothed as sigmoid; no reference |
| orpo | -c - β log σ(log odds(c) - log odds(r)), of means over tokens; no reference |

log odds(p) is log(eᵖ / (1 - eᵖ)). `sft_weight` adds the mean cross-entropy of the chosen
answer's tokens.

Source: Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290); Zhao et al.
2023, SLiC-HF (2305.10425); Azar et al. 2023, IPO (2310.12036); Meng et al. 2024, SimPO
(2405.14734); Hong et al. 2024, ORPO (2403.07691); for `average`, ch07/04 in the repository of
"Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

PreferenceLoss = Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"]
WITHOUT_REFERENCE = ("simpo", "orpo")
OF_MEANS = ("ipo", "simpo", "orpo")  # whose log-probabilities are always means over tokens

# What is measured of each pair, and logged as a mean over pairs.
PREFERENCE_METRICS = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",
    "logps_chosen",
    "logps_rejected",
)


class PairLosses(NamedTuple):
    """What is known of P pairs.

    losses: (P,), differentiable.
    metrics: (P, 6) without gradient, in the order of `PREFERENCE_METRICS`.
    """

    losses: torch.Tensor
    metrics: torch.Tensor


def preference_losses(
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    num_tokens: torch.Tensor,
    *,
    loss: PreferenceLoss,
    beta: float,
    average: bool = False,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    gamma: float = 0.5,
) -> PairLosses:
    """The loss of each pair, and what is watched of it.

    Args:
        policy: (P, 2) summed log-probabilities of the chosen and the rejected answer.
        reference: (P, 2) those of the reference; None where the loss has none.
        num_tokens: (P, 2) how many tokens they are summed over.
        average: Means over tokens instead of sums, and rewards without beta: the book's form.
    """
    means = policy / num_tokens
    scores = means if average or loss in OF_MEANS else policy  # (P, 2)
    differences = scores
    if reference is not None:
        shift = reference / num_tokens if average or loss in OF_MEANS else reference
        differences = scores - shift.to(scores)
    # What the model has learned to think of an answer, as DPO reads it.
    rewards = differences.detach()
    if not average:
        rewards = rewards * beta
        if loss == "ipo":  # the loss takes means, the reward is the sum's as for the others
            rewards = rewards * num_tokens
    margin = differences[:, 0] - differences[:, 1]
    if loss == "hinge":
        losses = torch.relu(1 - beta * margin)
    elif loss == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif loss == "orpo":
        odds = scores - _log1mexp(scores)
        losses = -scores[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
    else:
        logits = beta * margin - (gamma if loss == "simpo" else 0.0)
        losses = -F.logsigmoid(logits) * (1 - label_smoothing)
        if label_smoothing:
            losses = losses - F.logsigmoid(-logits) * label_smoothing
    if sft_weight:
        losses = losses - sft_weight * means[:, 0]
    apart = rewards[:, 0] - rewards[:, 1]
    metrics = [rewards, apart[:, None], (apart > 0).to(rewards)[:, None], scores.detach()]
    return PairLosses(losses, torch.cat(metrics, 1))


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - eˣ) for x < 0, without cancellation at either end."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    is_near = x > -math.log(2.0)
    # Each branch sees only numbers that it is made for: a NaN in the other's gradient would spread.
    near = torch.where(is_near, x, -1.0)
    far = torch.where(is_near, -1.0, x)
    return torch.where(is_near, (-torch.expm1(near)).log(), (-far.exp()).log1p())
