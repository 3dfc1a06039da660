"""What all parts of the check agree on: device, sizes, and which models are meant.

This module does not import torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Built like the real ones, and done in moments on a CPU. GPT-2's own vocabulary, for its tokenizer.
TOYS: dict[str, dict[str, Any]] = {
    "gpt2": {"emb_dim": 32, "n_heads": 4, "n_layers": 2, "context_length": 256},
    "llama": {
        "family": "llama", "vocab_size": 512, "context_length": 256, "emb_dim": 32, "n_heads": 4,
        "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 48, "qk_norm": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One invocation of the check.

    Args:
        out: Folder of results, logs and made-up data.
        device: `cuda` or `cpu`.
        quick: Toys and a few steps instead of models and measurements.
        data: The chapter's instruction-data.json, if there is one.
    """

    out: str
    device: str = "cuda"
    quick: bool = False
    data: str | None = None

    def architecture(self, name: str) -> str | dict[str, Any]:
        """A named size, or a toy of its family."""
        if not self.quick:
            return name
        return TOYS["gpt2" if name.startswith("gpt2") else "llama"]

    def pick(self, real: int, toy: int) -> int:
        """A number of steps, rows or tokens."""
        return toy if self.quick else real

    def folder(self, name: str) -> Path:
        """A folder in `out`, made if it is not there."""
        path = Path(self.out) / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
