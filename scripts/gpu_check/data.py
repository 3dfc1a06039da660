"""Data for a machine without a network: rows of the chapter's kind, and rows of a given length."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from gpu_check.setting import Setting
from lightning_sft import InstructionDataModule

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.json"
CHAPTER_ENTRIES = 1100  # of which 935 are trained on


def chapter_file(setting: Setting) -> str:
    """The chapter's own file if it was given, else as many entries of the quickstart's."""
    if setting.data is not None:
        return setting.data
    entries = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    count = setting.pick(CHAPTER_ENTRIES, 24)
    path = setting.folder("data") / f"quickstart-{count}.json"
    return _write(path, entries[:count])


def long_file(setting: Setting, rows: int, tokens: int) -> str:
    """Entries of more than so many tokens, with nothing in common behind the prompt.

    Cut to `tokens` by `max_length`, they fill every place of a batch, as packed documents would.
    """
    rng = random.Random(0)
    text = QUICKSTART.read_text(encoding="utf-8")
    words = sorted({word for word in text.split() if word.isalpha()})
    entries = [
        {"instruction": f"Say {rng.choice(words)}.", "input": "", "output": " ".join(chosen)}
        for chosen in (rng.choices(words, k=tokens) for _ in range(rows * 5 // 4 + 4))
    ]
    path = setting.folder("data") / f"words-{rows}x{tokens}.json"
    return _write(path, entries)


def _write(path: Path, entries: list[dict[str, str]]) -> str:
    """Once, and whole: the ranks of a sharded run read it at the same time."""
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(entries), encoding="utf-8")
        unfinished.replace(path)
    return str(path)


def make_data(module: Any, path: str, **settings: Any) -> InstructionDataModule:
    """A data module with the tokenizer of a module, which a stand-in would not hand on by itself.

    Args:
        settings: As `InstructionDataModule` takes them.
    """
    data = InstructionDataModule(path, **settings)
    data.tokenizer = module.tokenizer
    return data
