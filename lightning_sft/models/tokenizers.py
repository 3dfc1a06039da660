"""Which tokenizer a model reads and writes with.

The one place that chooses: who generates, serves, evaluates or talks is handed what this returns.
This module does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_sft.data.tokenizer import Tokenizer, gpt2_tokenizer

if TYPE_CHECKING:
    from lightning_sft.models.gpt2 import GPTModel


def tokenizer_of(model: GPTModel) -> Tokenizer:
    """The tokenizer of the model's family; made once per process."""
    return gpt2_tokenizer()
