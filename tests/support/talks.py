"""Conversations for whole runs: of one to three turns, some with weights or given answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_talks(path: Path, count: int = 20) -> Path:
    """Every conversation keeps an answer that carries loss."""
    talks = []
    for number in range(count):
        talk: list[dict[str, Any]] = [{"role": "system", "content": f"Rule {number % 3}."}]
        for turn in range(1 + number % 3):
            talk.append({"role": "user", "content": f"Question {number} {turn}" * (turn + 1)})
            talk.append({"role": "assistant", "content": f"Answer {turn} " * (1 + number % 4)})
        talk[-1]["weight"] = [1, 0.5, 2][number % 3]
        if len(talk) > 3 and number % 2:
            talk[2]["train"] = False
        talks.append({"messages": talk})
    path.write_text(json.dumps(talks))
    return path
