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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import Entry, Example
from lightning_sft.data.jsonl_lines import JoinedEntries, LineEntries
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.data.rows import TokenRows
from lightning_sft.data.segments import Masking
from lightning_sft.data.token_files import ARRAYS, array_path, writing
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.data.tokenizing import tokenize_part, tokenize_parts

# Below this, tokenizing takes less than a second and a file would only be clutter.
CACHE_FROM_ENTRIES = 5_000


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
    if len(entries) < CACHE_FROM_ENTRIES:
        return tokenize_part(entries, 0, style, tokenizer, masking)
    folder = files.cache_dir() / "tokens" / _key(entries, style, tokenizer, masking)
    if not _is_whole(folder):
        # Of several processes one tokenizes; the others wait here and then find it done.
        with files.lock(folder):
            if not _is_whole(folder):
                _save(tokenize_parts(entries, style, tokenizer, masking), len(entries), folder)
    arrays = {name: np.load(array_path(folder, name), mmap_mode="r") for name in ARRAYS}
    return TokenRows(**arrays)


def _key(
    entries: Sequence[Example], style: PromptStyle, tokenizer: Tokenizer, masking: Masking
) -> str:
    """A digest of everything that the rows depend on."""
    # The name says nothing about the text; two styles that write alike may share a file.
    digest = hashlib.sha256(repr((tokenizer.name, replace(style, name=""))).encode())
    parts = entries.parts if isinstance(entries, JoinedEntries) else [entries]
    is_held = not any(isinstance(part, LineEntries) for part in parts)
    is_plain = is_held and all(isinstance(entry, Entry) for entry in entries)
    if style.template or not is_plain:
        digest.update(repr(masking).encode())
    for part in parts:
        # What stays in its file is known by that, without reading it entry by entry.
        if isinstance(part, LineEntries):
            digest.update(part.fingerprint().encode())
        else:
            _add_entries(digest, part)
    return digest.hexdigest()[:32]


def _add_entries(digest: Any, entries: Sequence[Example]) -> None:
    for entry in entries:
        if not isinstance(entry, Entry):
            digest.update(repr(entry).encode())
            continue
        # Lengths first, so that moving a character between fields changes the key.
        texts = (entry.instruction, entry.input, entry.output)
        digest.update(repr([len(text) for text in texts]).encode())
        digest.update("".join(texts).encode())


def _is_whole(folder: Path) -> bool:
    """Whether every file is the one that was written."""
    try:
        digests = files.read_json(folder / "done", files.MOST_SMALL)["sha256"]
        return all(files.sha256_of(array_path(folder, name)) == digests[name] for name in ARRAYS)
    except (InputError, OSError, KeyError, TypeError):
        return False  # not there, not finished, or of a version that kept no digests


def _save(parts: Iterable[TokenRows], count: int, folder: Path) -> None:
    """Write rows as they come, of so many entries, and then that they are whole."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done").unlink(missing_ok=True)
    num_rows = 0
    # At a terminal, a bar.
    with writing(folder) as writer, tqdm(total=count, desc="Tokenizing", disable=None) as bar:
        for rows in parts:
            writer.append(rows)
            num_rows += len(rows)
            if len(rows):
                bar.update(int(rows.indices[-1]) + 1 - bar.n)
    digests = {name: files.sha256_of(array_path(folder, name)) for name in ARRAYS}
    files.write_json(folder / "done", {"rows": num_rows, "sha256": digests})
