"""Pairs of preferences for tests, and what a step makes of them written out plainly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lightning_sft.data.pair_rows import PairRow


def write_pairs(path: Path, count: int = 40, equal: tuple[int, ...] = ()) -> Path:
    """Pairs of unequal lengths, whose answers often begin alike; of some they are equal."""
    records = []
    for n in range(count):
        chosen = f"It is {n}, my friend." + " Indeed." * (n % 4)
        rejected = f"It is {n}, you fool" + " again" * (n % 3)
        record = {"prompt": f"Say the number {n}" + " again" * (n % 5), "chosen": chosen}
        records.append(record | {"rejected": chosen if n in equal else rejected})
    path.write_text(json.dumps(records))
    return path


def plain_log_probs(
    model: torch.nn.Module, pairs: list[PairRow], eos: int, learns_end: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, 2) log-probabilities of answers from whole logits, padded rows, and their tokens.

    Args:
        learns_end: Whether the end-of-text token counts.
    """
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    sequences = [[*map(int, row.ids), eos] for row in rows]
    width = max(map(len, sequences))
    ids = torch.tensor([ids + [eos] * (width - len(ids)) for ids in sequences])
    mask = torch.zeros(ids.shape)
    for place, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        begin = row.prompt_length if row.spans is None else row.spans[0].start
        mask[place, begin : len(sequence) - (not learns_end)] = 1.0
    logits = model(ids)[:, :-1]
    picked = F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    mask = mask[:, 1:].to(picked)
    return (picked * mask).sum(1).view(-1, 2), mask.sum(1).view(-1, 2)


def settings_for_pairs(**changes: Any) -> dict[str, Any]:
    """Changes to `write_config` for a run on pairs."""
    settings: dict[str, Any] = {
        "model__objective": {"class_path": "lightning_sft.DPO", "init_args": {"beta": 0.1}},
        "data__format": "preference",
        "data__mask_prompt": True,
        "data__share_prefix": True,
        "data__fractions": [0.8, 0.1, 0.1],
    }
    return settings | changes
