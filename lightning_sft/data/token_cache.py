"""Token rows kept on disk: a large split is tokenized once, and every process maps the same file.

A folder holds one `.npy` file for each array and, written last, `done`: how many rows there are and
the SHA-256 of each file. A folder without it was not finished, and one whose files differ from it
is damaged; both are made anew.

    >>> rows = tokenize_entries(entries, get_style("alpaca"), gpt2_tokenizer())
    >>> rows[0].ids, rows[0].prompt_length

This module does not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Entry, Example
from lightning_sft.data.conversation_rows import tokenize_example
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.rows import Row, TokenRows
from lightning_sft.data.segments import Masking
from lightning_sft.data.tokenizer import Tokenizer, encode_together

# Below this, tokenizing takes less than a second and a file would only be clutter.
CACHE_FROM_ENTRIES = 5_000
ARRAYS = (
    "ids", "offsets", "prompt_lengths", "indices", "spans", "span_weights", "span_offsets",
)  # fmt: skip


def tokenize_entries(
    entries: Sequence[Example],
    style: PromptStyle,
    tokenizer: Tokenizer,
    masking: Masking | None = None,
) -> TokenRows:
    """Tokenize a split; a large one only once, from then on read from the cache.

    Args:
        masking: Which messages of conversations carry loss. What an entry's is, is settled when
            batches are made of it.

    Returns:
        Rows in the order of the entries. Those of a large split are read-only maps of the files.

    Raises:
        InputError: The style has no place for a conversation's message; names the entry.
    """
    masking = masking or Masking()

    def tokenize_one(index: int, entry: Example, one: Tokenizer) -> list[Row]:
        try:
            return tokenize_example(entry, style, one, masking, index)
        except InputError as error:
            raise InputError(f"entry {index}: {error}") from None

    def tokenize_all() -> TokenRows:
        return TokenRows.from_rows(
            encode_together(
                tokenizer,
                lambda one: [
                    row
                    for index, entry in enumerate(entries)
                    for row in tokenize_one(index, entry, one)
                ],
            )
        )

    if len(entries) < CACHE_FROM_ENTRIES:
        return tokenize_all()
    folder = files.cache_dir() / "tokens" / _key(entries, style, tokenizer, masking)
    if not _is_whole(folder):
        # Of several processes one tokenizes; the others wait here and then find it done.
        with files.lock(folder):
            if not _is_whole(folder):
                _save(tokenize_all(), folder)
    return TokenRows(**{name: np.load(_path(folder, name), mmap_mode="r") for name in ARRAYS})


def _key(
    entries: Sequence[Example], style: PromptStyle, tokenizer: Tokenizer, masking: Masking
) -> str:
    """A digest of everything that the rows depend on."""
    # The name says nothing about the text; two styles that write alike may share a file.
    digest = hashlib.sha256(repr((tokenizer.name, replace(style, name=""))).encode())
    if style.template or not all(isinstance(entry, Entry) for entry in entries):
        digest.update(repr(masking).encode())
    for entry in entries:
        if not isinstance(entry, Entry):
            digest.update(repr(entry).encode())
            continue
        # Lengths first, so that moving a character between fields changes the key.
        texts = (entry.instruction, entry.input, entry.output)
        digest.update(repr([len(text) for text in texts]).encode())
        digest.update("".join(texts).encode())
    return digest.hexdigest()[:32]


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _is_whole(folder: Path) -> bool:
    """Whether every file is the one that was written."""
    try:
        digests = files.read_json(folder / "done", files.MOST_SMALL)["sha256"]
        return all(files.sha256_of(_path(folder, name)) == digests[name] for name in ARRAYS)
    except (InputError, OSError, KeyError, TypeError):
        return False  # not there, not finished, or of a version that kept no digests


def _save(rows: TokenRows, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        with files.atomic_write(_path(folder, name), "wb") as file:
            np.save(file, getattr(rows, name))
    digests = {name: files.sha256_of(_path(folder, name)) for name in ARRAYS}
    files.write_json(folder / "done", {"rows": len(rows), "sha256": digests})
