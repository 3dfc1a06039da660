"""Next tokens of rows that are sampled each in their own way, and of rows that cannot be.

What fails for many rows at once is done again for each alone, so that one row's fault is that
row's: `isolate`. Only what leaves no trace behind may be done again; a row's generator, which does,
is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lightning_sft.decoding.generation import draw, probabilities
from lightning_sft.serving.job import Job
from lightning_sft.serving.openai_reply import TokenLogprobs

Result = TypeVar("Result")
Faults = dict[int, Exception]  # by row


def isolate(
    rows: Sequence[int], compute: Callable[[Sequence[int]], Sequence[Result]]
) -> tuple[dict[int, Result], Faults]:
    """Results of all rows, computed together; where that fails, each alone.

    Args:
        compute: Rows → one result each. It may be called again for the same rows.

    Returns:
        Results and failures by row; every row is in one of them.
    """
    try:
        return dict(zip(rows, compute(rows), strict=True)), {}
    except Exception as error:  # whatever it is, it concerns these rows and nobody else
        if len(rows) == 1:
            return {}, {rows[0]: error}
    results: dict[int, Result] = {}
    faults: Faults = {}
    for row in rows:
        found, failed = isolate([row], compute)
        results |= found
        faults |= failed
    return results, faults


@torch.inference_mode()
def sample_each(logits: torch.Tensor, jobs: Sequence[Job]) -> tuple[dict[int, int], Faults]:
    """Each row's next token from logits (B, V); rows of equal settings are computed together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, job in enumerate(jobs):
        chosen = job.settings
        key = (0.0,) if chosen.is_greedy else (chosen.temperature, chosen.top_k, chosen.top_p)
        groups.setdefault(key, []).append(row)

    tokens: dict[int, int] = {}
    faults: Faults = {}
    for rows in groups.values():
        found, failed = _sample_group(logits, jobs, rows)
        tokens |= found
        faults |= failed
    return tokens, faults


def _sample_group(
    logits: torch.Tensor, jobs: Sequence[Job], rows: list[int]
) -> tuple[dict[int, int], Faults]:
    """Next tokens of rows with equal settings."""
    settings = jobs[rows[0]].settings

    def choose(some: Sequence[int]) -> torch.Tensor:
        return logits if len(some) == len(jobs) else logits[list(some)]  # all need no copy

    if settings.is_greedy:
        return isolate(rows, lambda some: choose(some).argmax(-1).tolist())
    chances, faults = isolate(rows, lambda some: list(probabilities(choose(some), settings)))
    tokens: dict[int, int] = {}
    for row, chance in chances.items():
        try:
            tokens[row] = draw(chance, jobs[row].rng)
        except Exception as error:  # as in `isolate`, but a generator is asked only once
            faults[row] = error
    return tokens, faults


@torch.inference_mode()
def find_logprobs(
    logits: torch.Tensor, tokens: dict[int, int], jobs: Sequence[Job]
) -> tuple[dict[int, TokenLogprobs], Faults]:
    """For the rows that want them: what the model itself thought, before temperature and top-p."""
    wanted = [row for row in tokens if jobs[row].top_logprobs is not None]
    if not wanted:
        return {}, {}

    def compute(rows: Sequence[int]) -> list[TokenLogprobs]:
        logprobs = logits[list(rows)].float().log_softmax(-1)
        most = max(jobs[row].top_logprobs or 0 for row in rows)
        top = logprobs.topk(min(max(most, 1), logprobs.shape[-1]))
        values, ids = top.values.tolist(), top.indices.tolist()
        return [
            TokenLogprobs(
                float(logprobs[place, tokens[row]]),
                list(zip(ids[place], values[place], strict=True))[: jobs[row].top_logprobs or 0],
            )
            for place, row in enumerate(rows)
        ]

    return isolate(wanted, compute)
