"""Entries unlike the others: far too long or short, and in another alphabet.

Both are meant to be looked at, not to be believed: a long answer may be the best one, and an
alphabet is no language (English and German share one). Nothing is downloaded to find them.

    >>> measure_lengths([entry.output for entry in entries]).quantiles["50 %"]
    49

This module does not import torch.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

QUANTILES = {"least": 0.0, "1 %": 0.01, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "99 %": 0.99}
QUANTILES["most"] = 1.0
FENCE = 3.0  # interquartile ranges; Tukey's outer fence, "far out"
FEWEST_LETTERS = 4  # a text with fewer has no alphabet: a number, a formula
LATIN_LETTERS = re.compile(f"(?:[A-Za-z][^A-Za-z]*){{{FEWEST_LETTERS}}}")
NO_LETTERS = "no letters"


class Lengths(NamedTuple):
    """Lengths in characters: quantiles by name, and the places of texts that are far out."""

    quantiles: dict[str, int]
    short: list[int]
    long: list[int]


class Scripts(NamedTuple):
    """How many texts are in which script, and the places of those that are not in the first."""

    counts: dict[str, int]
    others: list[int]


def measure_lengths(texts: Sequence[str]) -> Lengths:
    """Quantiles of the lengths, and who lies beyond Tukey's outer fences of their logarithms.

    Of the logarithm, because lengths of text have a long tail by nature. At least one text.

    Source: Tukey, "Exploratory Data Analysis", 1977, section 2D.
    """
    lengths = np.array([len(text) for text in texts])
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
    logarithms = np.log1p(lengths)
    low, high = np.quantile(logarithms, [0.25, 0.75])
    reach = FENCE * (high - low)
    return Lengths(
        dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
        np.flatnonzero(logarithms < low - reach).tolist(),
        np.flatnonzero(logarithms > high + reach).tolist(),
    )


def find_scripts(texts: Sequence[str]) -> Scripts:
    """The script that most letters of each text are in, such as LATIN or CYRILLIC.

    A text without letters belongs to no script and is no outlier.
    """
    scripts = [find_script(text) for text in texts]
    counts = dict(Counter(scripts).most_common())
    usual = next((name for name in counts if name != NO_LETTERS), NO_LETTERS)
    others = [n for n, script in enumerate(scripts) if script not in (usual, NO_LETTERS)]
    return Scripts(counts, others)


def find_script(text: str) -> str:
    """The script of most letters, or `no letters` where there are fewer than four."""
    if text.isascii():  # as most are, and fast
        return "LATIN" if LATIN_LETTERS.search(text) else NO_LETTERS
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if (script := _script_of(character)) is not None:
            found[script] += count
    return found.most_common(1)[0][0] if found.total() >= FEWEST_LETTERS else NO_LETTERS


@functools.lru_cache(maxsize=1 << 17)
def _script_of(character: str) -> str | None:
    """The first word of a letter's Unicode name, which is its script; None for anything else."""
    if not character.isalpha():
        return None
    # "CJK UNIFIED IDEOGRAPH-4E2D", "FULLWIDTH LATIN SMALL LETTER A", "LATIN SMALL LETTER A"
    words = unicodedata.name(character, "UNKNOWN").split()
    return words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH") and len(words) > 1 else words[0]
