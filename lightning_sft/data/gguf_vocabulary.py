"""A tokenizer as GGUF describes one: tokens with their types, merges, and the way text is cut.

    >>> vocabulary_of(read_tokenizer("SmolLM2-135M-Instruct"), 49152).cut
    'smollm'

`HFTokenizer.from_gguf` is the way back. llama.cpp knows the ways to cut text by name alone, so a
tokenizer that cuts in none of these ways cannot be put into the format.

Source: the GGUF format and `get_vocab_base_pre` of convert_hf_to_gguf.py,
github.com/ggml-org/llama.cpp. This module does not import torch.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import normalizers

from lightning_sft.common.errors import InputError
from lightning_sft.data.hf_tokenizer import (
    CONTROL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    HFTokenizer,
)
from lightning_sft.data.tokenizer import Tokenizer, read_merges, read_vocabulary_file

NORMAL = 1  # GGUF's type of a token that is a piece of text
# Something of all that the known ways cut differently: contractions, digits, spaces, line ends, an
# accent of its own.
_PROBE = "I'll WE'VE don'T 1 12 1234567 x12.5\n\n\t  naïve e\u0301 日本語 _a!?? 🙂\r\n  two  end\n "


class Vocabulary(NamedTuple):
    """What GGUF keeps of a tokenizer.

    cut: The name of its pre-tokenizer, `tokenizer.ggml.pre`.
    tokens: By id; every row of the embedding has one.
    types: GGUF's numbers, one a token.
    merges: In order, `left right` each.
    """

    cut: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Everything that a GGUF file says of a tokenizer's text.

    Args:
        vocab_size: Rows of the embedding; those without a token are named and marked unused, as
            llama.cpp wants a name for each.

    Raises:
        InputError: llama.cpp has no name for the way in which it cuts text.
    """
    if isinstance(tokenizer, HFTokenizer):
        cut, names, merges, types = _read_library(tokenizer)
    else:
        cut, names, merges, types = _read_gpt2(tokenizer)
    rows = range(vocab_size)
    return Vocabulary(
        cut,
        [names.get(row, f"[PAD{row}]") for row in rows],
        [types.get(row, NORMAL) if row in names else UNUSED for row in rows],
        merges,
    )


Parts = tuple[str, dict[int, str], list[str], dict[int, int]]


def _read_gpt2(tokenizer: Tokenizer) -> Parts:
    vocabulary = json.loads(read_vocabulary_file("encoder.json"))
    names = {number: token for token, number in vocabulary.items()}
    return "gpt-2", names, read_merges(), {tokenizer.eos_token_id: CONTROL}


def _read_library(tokenizer: HFTokenizer) -> Parts:
    library = tokenizer.backend
    model = json.loads(library.to_str())["model"]
    cut = _name_cut(library, model)
    names = {number: token for token, number in library.get_vocab(with_added_tokens=True).items()}
    # Older files have a merge as one text.
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    added = tokenizer.special_tokens.values()
    control = tokenizer.control_ids
    types = {number: CONTROL if number in control else USER_DEFINED for number in added}
    return cut, names, merges, types


def _name_cut(library: LibraryTokenizer, model: dict[str, Any]) -> str:
    """The name of the pre-tokenizer that does the same to the probe.

    Also what else goes with the name: Llama 3 takes a word that is a token as it is, whatever the
    merges make of it.
    """
    found = _cut_probe(library.normalizer, library.pre_tokenizer)
    for name, pieces in _known_cuts().items():
        same_words = bool(model.get("ignore_merges")) == (name == "llama-bpe")
        if found == pieces and same_words:
            return name
    raise InputError(
        "export: this tokenizer cuts text in a way that llama.cpp has no name for here (known: "
        f"{', '.join(PRE_TOKENIZERS)}); --format hf can hold it"
    )


@functools.cache
def _known_cuts() -> dict[str, list[str]]:
    nfc = normalizers.NFC()
    return {
        name: _cut_probe(nfc if name == "qwen2" else None, cut)
        for name, cut in PRE_TOKENIZERS.items()
    }


def _cut_probe(normalizer: Any, cut: Any) -> list[str]:
    if cut is None:
        return []
    text = _PROBE if normalizer is None else normalizer.normalize_str(_PROBE)
    return [piece for piece, _ in cut.pre_tokenize_str(text)]
