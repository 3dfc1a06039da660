"""Which tokenizer a model reads and writes with; who generates or serves is handed it."""

from __future__ import annotations

from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.models.decoder import Decoder
from lightning_sft.models.registry import family_of


def tokenizer_of(model: Decoder) -> Tokenizer:
    """The tokenizer of the model's family; made once per process."""
    return family_of(model.config).tokenizer()
