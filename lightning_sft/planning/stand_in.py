"""A module that can be planned before its weights, and the tokenizer beside them, are here.

Weights cost the same whatever is in them, so they are left alone. Lengths of rows do depend on the
tokenizer; where the model's own is missing, GPT-2's counts in its place, which comes within a few
per cent of these vocabularies on English text and rather above than below the larger ones.
"""

from __future__ import annotations

import re
from pathlib import Path

from lightning_sft.common import hub
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.data.prompts import STYLES
from lightning_sft.data.tokenizer import GPT2Tokenizer, Tokenizer
from lightning_sft.models.registry import family_of
from lightning_sft.training.module import SFTModule

# What a vocabulary with special tokens has one of for each of these in a style.
_MARKER = re.compile(r"<\|\w+\|>|</?think>")


class StandInTokenizer(GPT2Tokenizer):
    """GPT-2's pieces of text under ids that any vocabulary has, and a token for each marker.

    Args:
        vocab_size: Of the model; ids are below it, and mean nothing.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.name = f"stand-in-{vocab_size}"
        self.vocab_size = vocab_size
        self.eos_token_id = vocab_size - 1
        texts = [text for style in STYLES.values() for text in (style.instruction, style.header)]
        markers = sorted(set(_MARKER.findall("".join(texts))))
        self.special_tokens = {name: place % vocab_size for place, name in enumerate(markers)}

    def encode(self, text: str) -> list[int]:
        """As many ids as GPT-2's tokenizer makes."""
        return [token % self.vocab_size for token in super().encode(text)]


class PlannedModule(SFTModule):
    """A module whose weights are never read, with a tokenizer in any case."""

    def find_tokenizer(self, source: str | None, weights: str | None) -> Tokenizer:
        """The model's own where it is here, else a stand-in.

        Raises:
            InputError: There is one, and it cannot be read or is not this model's.
        """
        comes_along = family_of(self.config).tokenizer is None
        if not comes_along or source is not None:
            return super().find_tokenizer(source, weights)
        if weights is not None and _is_here(weights):
            return read_tokenizer(weights)
        return StandInTokenizer(self.config.vocab_size)

    @property
    def counts_by_stand_in(self) -> bool:
        """Whether lengths are GPT-2's for want of the model's own tokenizer."""
        return isinstance(self.tokenizer, StandInTokenizer)


def _is_here(weights: str) -> bool:
    """Whether a path is there, or a name's tokenizer in the hub's cache: a plan fetches nothing."""
    repository = hub.find_repository(weights)
    if repository is None:
        return Path(weights).expanduser().exists()
    return hub.find_cached(repository, weights=False) is not None
