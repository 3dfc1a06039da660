"""Single entries as the model will see them, for `inspect --entries` and `--show`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from lightning_sft.common.errors import InputError
from lightning_sft.data.config import DataConfig
from lightning_sft.data.rows import Row, TokenRows
from lightning_sft.data.tokenizer import Tokenizer


def parse_places(text: str) -> list[int]:
    """The numbers of a list such as `0,5`."""
    try:
        return [int(place) for place in text.split(",")]
    except ValueError:
        raise InputError(f"entries: {text!r} is not a list such as 0,5") from None


def show_entries(
    places: Sequence[int], split: str, rows: TokenRows, config: DataConfig, tokenizer: Tokenizer
) -> None:
    """Print entries as text and as ids, the supervised tokens marked.

    Colour on a terminal, double brackets elsewhere.
    """
    for place in places:
        if not 0 <= place < len(rows):
            raise InputError(f"entries: {split} has entries 0 to {len(rows) - 1}, not {place}")
        print("\n".join(_describe(rows[place], split, config, tokenizer)))


def _describe(row: Row, split: str, config: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    ids = [*map(int, row.ids), tokenizer.eos_token_id]
    seen = ids[: config.max_length + 1]
    # A row's first token is predicted from nothing, so it is never a target.
    first = max(row.prompt_length, 1) if config.mask_prompt else 1
    texts = [_printable(tokenizer.decode(part)) for part in (seen[:first], seen[first:])]
    yield (
        f"{split} entry {row.index}: {row.prompt_length} prompt and "
        f"{len(row.ids) - row.prompt_length} answer tokens, {max(len(seen) - first, 0)} supervised"
        + (f", {len(ids) - len(seen)} cut off" if len(ids) > len(seen) else "")
    )
    yield texts[0] + _marked(texts[1])
    yield " ".join(map(str, seen[:first])) + " " + _marked(" ".join(map(str, seen[first:])))
    yield ""


def _marked(text: str) -> str:
    if not text:
        return ""
    return f"\x1b[32m{text}\x1b[0m" if sys.stdout.isatty() else f"[[{text}]]"


def _printable(text: str) -> str:
    """Control characters spelled out: data must not steer the terminal it is shown on."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
