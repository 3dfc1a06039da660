"""What `prepare` finds in the three splits together, and the splits that a policy makes of them.

    >>> quality = examine(DataConfig("instruction-data.json").read().splits, threshold=0.9)
    >>> quality.count_twins("test", "train"), quality.count_twins("val", "train")
    (6, 7)
    >>> split_of = apply_policies(quality, ["drop_duplicates", "drop_leaks"])

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Example
from lightning_sft.data.entries import Splits
from lightning_sft.data.faults import find_repeats
from lightning_sft.data.near_duplicates import Places, Twins, comparison_text, find_twins
from lightning_sft.data.outliers import Lengths, Scripts, find_scripts, measure_lengths
from lightning_sft.data.twin_groups import (
    Nearest,
    find_duplicates,
    find_groups,
    find_leaking,
    find_nearest,
    regroup,
)

LEFT_OUT = -1
POLICIES = {
    "report": "look, and write no data",
    "drop_duplicates": "leave out training entries with an earlier near-twin in train",
    "drop_leaks": "leave out training entries with a near-twin in test or validation",
    "regroup": "new splits of the same sizes that part no near-twins",
}


@dataclass(frozen=True)
class Quality:
    """Entries of all splits in one row, train first, then test, then validation; N of them.

    Args:
        splits: As they were examined.
        threshold: The least cosine of near-twins.
        split_of: The number of each entry's split, as in `Splits`. Shape (N,).
        twins: Pairs of texts that are alike.
        nearest: For each split by name, every entry's most similar twin in it, itself left out.
        groups: The number of each entry's group of twins. Shape (N,).
        repeats: Entries with the very prompt of an earlier one, by split and in `all` together.
        prompts, answers: Their lengths.
        scripts: Of prompt and answer together.
        blank: Places of entries with a blank answer.
    """

    splits: Splits
    threshold: float
    split_of: Places
    twins: Twins
    nearest: dict[str, Nearest]
    groups: Places
    repeats: dict[str, int]
    prompts: Lengths
    answers: Lengths
    scripts: Scripts
    blank: list[int]

    @property
    def entries(self) -> list[Example]:
        """All of them in the order of `split_of`."""
        return [entry for part in self.splits for entry in part]

    def places(self, split: str) -> Places:
        """Where a split's entries are."""
        return np.flatnonzero(self.split_of == Splits._fields.index(split))

    def count_twins(self, split: str, other: str) -> int:
        """How many entries of one split have a near-twin in the other (or in their own)."""
        return int((self.nearest[other].place[self.places(split)] >= 0).sum())


def examine(splits: Splits, threshold: float) -> Quality:
    """Look at everything.

    Raises:
        InputError: The threshold is not allowed, far too many are alike, or scikit-learn is
            missing.
    """
    entries = [entry for part in splits for entry in part]
    split_of = np.repeat(np.arange(len(splits)), [len(part) for part in splits])
    texts = [comparison_text(entry) for entry in entries]
    answers = [entry.output for entry in entries]
    twins = find_twins(texts, threshold)
    repeats = {name: len(find_repeats(part)) for name, part in splits._asdict().items()}
    return Quality(
        splits=splits,
        threshold=threshold,
        split_of=split_of,
        twins=twins,
        nearest={name: find_nearest(twins, split_of == n) for n, name in enumerate(Splits._fields)},
        groups=find_groups(twins),
        repeats=repeats | {"all": len(find_repeats(entries))},
        prompts=measure_lengths(texts),
        answers=measure_lengths(answers),
        scripts=find_scripts([f"{a}\n{b}" for a, b in zip(texts, answers, strict=True)]),
        blank=[place for place, answer in enumerate(answers) if not answer.strip()],
    )


def parse_policies(text: str) -> list[str]:
    """The names in a list such as `drop_duplicates,drop_leaks`; none for `report`.

    Raises:
        InputError: An unknown name, or two that do not go together.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise InputError(f"policy: unknown {name!r}; allowed: {', '.join(POLICIES)}")
    if len(names) > 1 and {"report", "regroup"} & set(names):
        raise InputError(f"policy: {text!r}: report and regroup stand alone")
    return [name for name in names if name != "report"]


def apply_policies(quality: Quality, policies: Sequence[str]) -> Places:
    """The split that each entry goes to, `LEFT_OUT` for those that are left out. Shape (N,).

    Raises:
        InputError: A split would stay empty.
    """
    split_of = quality.split_of.copy()
    if "regroup" in policies:
        split_of = regroup(quality.twins, quality.split_of)
    if "drop_duplicates" in policies:
        split_of[find_duplicates(quality.twins, quality.split_of)] = LEFT_OUT
    if "drop_leaks" in policies:
        split_of[find_leaking(quality.twins, quality.split_of)] = LEFT_OUT
    for number, name in enumerate(Splits._fields):
        if not (split_of == number).any():
            raise InputError(
                f"policy: {','.join(policies)} leaves the {name} split empty at threshold "
                f"{quality.threshold:g}; a higher one leaves out less"
            )
    return split_of


def summarize_quality(quality: Quality) -> dict[str, Any]:
    """All counts as plain JSON values."""
    names = Splits._fields
    group_sizes = np.bincount(quality.groups)
    return {
        "threshold": quality.threshold,
        "splits": {name: len(part) for name, part in quality.splits._asdict().items()},
        "repeats": quality.repeats,
        "near_twins": {
            name: {other: quality.count_twins(name, other) for other in names} for name in names
        },
        "groups": int((group_sizes > 1).sum()),
        "largest_group": int(group_sizes.max()),
        "lengths": {
            what: found._asdict()
            for what, found in (("prompt", quality.prompts), ("answer", quality.answers))
        },
        "scripts": quality.scripts._asdict(),
        "blank": quality.blank,
    }
