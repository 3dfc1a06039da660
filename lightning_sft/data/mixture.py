"""Several files in one training split, each with a weight or a share (`data.mixture`).

    data:
      mixture:
        - {path: general.jsonl, weight: 1}
        - {path: code.parquet, weight: 2.5}

With weights an epoch holds each row of a file so many times: 2.5 is twice, and half of the rows a
third time, the other half in the next epoch. With shares it holds as many tokens as the files do
together, of which each file gives its share. Which rows those are is a function of seed and epoch.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_sft.common.errors import InputError
from lightning_sft.data.formats import FORMATS, Format
from lightning_sft.data.order import Stretch

MOST_WEIGHT = 10_000


@dataclass(frozen=True)
class Source:
    """One file of a mixture.

    Args:
        path: As `data.path`.
        weight: How many times an epoch holds each of its training rows; any number above 0.
        share: Instead, the part of an epoch's tokens that come from it, between 0 and 1.
        format: As `data.format`.
        field_names: As `data.field_names`.
    """

    path: str
    weight: float | None = None
    share: float | None = None
    format: Format = "auto"
    field_names: dict[str, str] | None = None


def read_sources(mixture: Sequence[Source | Mapping[str, Any]]) -> tuple[Source, ...]:
    """A config's list, checked.

    Raises:
        InputError: Names the file, what is wrong with it and what is allowed.
    """
    if not mixture:
        raise InputError("data.mixture: is empty; give a list of files, each with a weight")
    allowed = [field.name for field in fields(Source)]
    sources = []
    for place, given in enumerate(mixture):
        where = f"data.mixture[{place}]"
        if isinstance(given, Mapping):
            unknown = sorted(set(given) - set(allowed))
            if unknown or "path" not in given:
                problem = f"unknown key {unknown[0]!r}" if unknown else "'path' is missing"
                raise InputError(f"{where}: {problem}; allowed: {', '.join(allowed)}")
            given = Source(**given)
        sources.append(given)
        if not isinstance(given.path, str) or not given.path:
            raise InputError(f"{where}.path: {given.path!r} is not allowed; give a file or URL")
        if given.format not in FORMATS:
            allowed_formats = ", ".join(FORMATS)
            raise InputError(
                f"{where}.format: unknown {given.format!r}; allowed: {allowed_formats}"
            )
        if given.weight is not None and not _is_within(given.weight, MOST_WEIGHT, closed=True):
            raise InputError(f"{where}.weight: {given.weight!r} is not above 0 and at most 10,000")
        if given.share is not None and not _is_within(given.share, 1, closed=False):
            raise InputError(f"{where}.share: {given.share!r} is not between 0 and 1")
    shares = [source.share for source in sources if source.share is not None]
    if shares and (len(shares) < len(sources) or any(s.weight is not None for s in sources)):
        raise InputError("data.mixture: give every file a weight, or every file a share")
    if shares and not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise InputError(f"data.mixture: the shares sum to {sum(shares):g}, not to 1")
    return tuple(sources)


def _is_within(number: Any, most: float, *, closed: bool) -> bool:
    """Whether it is a number above 0 and below `most`, which it may reach if `closed`."""
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and number > 0 and (number < most or (closed and number == most))


def plan_stretches(
    sources: Sequence[Source],
    counts: Sequence[int],
    indices: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer],
) -> tuple[Stretch, ...]:
    """How often an epoch takes the rows of each file.

    Args:
        counts: Training entries of each file; the split holds them in this order.
        indices: (rows,) the entry of each row, never falling.
        lengths: (rows,) tokens of each row.

    Raises:
        InputError: A file has no row left, or a share is so small that none of its rows is taken.
    """
    # Entries may have more than one row, or none where `overlong` drops them.
    ends = np.searchsorted(indices, np.cumsum(counts))
    begins = [0, *ends[:-1].tolist()]
    total = int(lengths.sum())
    stretches = []
    for source, begin, end in zip(sources, begins, ends.tolist(), strict=True):
        if source.share is not None:
            tokens = int(lengths[begin:end].sum())
            times = source.share * total / max(tokens, 1)
        else:
            times = 1.0 if source.weight is None else source.weight
        stretch = Stretch(begin, end, times)
        if not stretch.num_taken:
            raise InputError(
                f"data.mixture: an epoch takes no row of {source.path}; it has {end - begin} "
                f"training rows, each to be taken {times:g} times"
            )
        stretches.append(stretch)
    return tuple(stretches)


def describe_mixture(
    sources: Sequence[Source],
    stretches: Sequence[Stretch],
    lengths: npt.NDArray[np.integer],
) -> list[str]:
    """One line for each file: what an epoch takes of it."""
    tokens = [
        float(lengths[s.begin : s.end].mean()) * s.num_taken if s.end > s.begin else 0.0
        for s in stretches
    ]
    return [
        f"mixture: {stretch.num_taken:,} rows an epoch of the {stretch.end - stretch.begin:,} in "
        f"{source.path}, about {part / sum(tokens):.0%} of the tokens"
        for source, stretch, part in zip(sources, stretches, tokens, strict=True)
    ]
