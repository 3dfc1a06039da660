"""Conversations: for whole runs, some with weights or given answers; and made by chance."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

# No names of special tokens: what is said stays text with us, which others' tokenizers do not keep.
WORDS = [
    "a",
    "Why?",
    "é",
    "日本",
    "\n",
    "  ",
    "<thought>",
    "12.5",
    "`code`",
    "🙂",
    "- x\n- y",
    "Ok.",
]


def make_talk(generator: random.Random) -> list[dict[str, Any]]:
    """One to four questions and answers, half of the time behind a system message."""

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, 12))) + "."

    talk = [{"role": "system", "content": text()}] if generator.random() < 0.5 else []
    for _ in range(generator.randint(1, 4)):
        talk += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    return talk


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
