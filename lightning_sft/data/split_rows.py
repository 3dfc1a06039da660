"""One split as `fit` trains on it: tokenized, checked, cut to length, counted.

    >>> rows, counts = make_rows(splits.train, config, style, tokenizer, "train split")

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig
from lightning_sft.data.conversation import Example
from lightning_sft.data.counting import SplitCounts, check_answers, check_masks, count_split
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.rows import TokenRows, fit_to_length
from lightning_sft.data.token_cache import tokenize_entries
from lightning_sft.data.tokenizer import Tokenizer


def tokenize_split(
    examples: Sequence[Example],
    config: DataConfig,
    style: PromptStyle,
    tokenizer: Tokenizer,
    where: str,
) -> TokenRows:
    """All rows of a split, before any is cut.

    Args:
        where: The split's name, for messages.

    Raises:
        InputError: The style has no place for a message, or masks are all empty or all full.
    """
    try:
        rows = tokenize_entries(examples, style, tokenizer, config.masking())
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    check_masks(rows, config, style, where)
    return rows


def take_rows(
    rows: TokenRows, config: DataConfig, style: PromptStyle, tokenizer: Tokenizer, where: str
) -> tuple[TokenRows, SplitCounts]:
    """The rows that take part in training, and what was counted of all.

    Raises:
        InputError: A row breaks the length policy, or most rows lost their answer to it.
    """
    taken = fit_to_length(
        rows,
        max_length=config.max_length,
        overlong=config.overlong,
        mask_prompt=config.mask_prompt,
        where=where,
    )
    counts = count_split(rows, config, style, tokenizer)
    check_answers(counts, config, where)
    return taken, counts
