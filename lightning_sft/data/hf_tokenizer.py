"""Text → token ids for any byte-level vocabulary, through the library tokenizers.

From the `tokenizer.json` of a Hugging Face folder, or from what a GGUF file holds of one. Text is
plain text here too: `<|im_end|>` typed by a user becomes ordinary tokens. Who wants a special token
asks for it by its name.

    >>> tokenizer = HFTokenizer.from_folder("SmolLM2-135M-Instruct")
    >>> [tokenizer.token_id("<|im_start|>"), *tokenizer.encode("user\\n")]
    [1, 4093, 198]

Source: tokenizers' documentation; the splits that llama.cpp and Hugging Face know by the same
vocabularies. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.tokenizer import byte_alphabet, encode_in_threads

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(most_digits: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's pieces of text, and Qwen's, which has its digits one by one."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + most_digits + "|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, _BYTES])


# How a vocabulary cuts text before it merges, by the name that GGUF has for it.
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # GGUF's types of tokens
_THREADS = "TOKENIZERS_PARALLELISM"  # the library looks at it each time it encodes many


class HFTokenizer:
    """A byte-level tokenizer with special tokens.

    Args:
        tokenizer: Of the library.
        source: Where it is from, for messages.
        eos_token: The token that ends an answer.
        bos_token: The token that every row begins with, if the model wants one.
        chat_template: The model's own, in Jinja.

    Raises:
        InputError: Not a byte-level vocabulary, or one without these tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str,
        eos_token: str,
        bos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise InputError(f"tokenizer: {source} is not byte-level, the only kind supported")
        # Special tokens in text are text. What is merely an added word, such as Qwen's <think>,
        # stays one token, as everywhere else.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._byte_of = byte_alphabet()
        # Different for different vocabularies: what is kept of tokenized text goes by it. Taken of
        # the library's own writing, it is the same again for what `save` wrote.
        content = f"{tokenizer.to_str()}{eos_token}{bos_token}"
        self.name = f"bpe-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        self.chat_template = chat_template
        self.facts = {"eos_token": eos_token, "bos_token": bos_token}
        self.special_tokens = {
            token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()
        }
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos_token_id = self.token_id(eos_token)
        self.bos_token_id = None if bos_token is None else self.token_id(bos_token)

    @classmethod
    def from_folder(cls, folder: str | Path) -> HFTokenizer:
        """The tokenizer of a Hugging Face folder: tokenizer.json and tokenizer_config.json.

        Raises:
            InputError: A file is missing or damaged, or names no end-of-sequence token.
        """
        path = Path(folder) / "tokenizer.json"
        facts = _read_json(path.with_name("tokenizer_config.json"))
        template_file = path.with_name("chat_template.jinja")
        template = facts.get("chat_template")
        if template_file.is_file():  # where newer folders keep it
            template = files.read_text(template_file, files.MOST_SMALL)
        try:
            content = files.read_bytes(path)
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain ones
            raise InputError(f"{path}: no tokenizer that can be read ({error})") from None
        if (eos_token := _token_text(facts.get("eos_token"))) is None:
            raise InputError(f"{path.with_name('tokenizer_config.json')}: eos_token is missing")
        bos_token = _token_text(facts.get("bos_token"))
        begin = tokenizer.encode("", add_special_tokens=True).tokens  # what is put around a text
        return cls(
            tokenizer,
            str(path),
            eos_token,
            bos_token if bos_token in begin[:1] else None,
            template if isinstance(template, str) else None,
        )

    @classmethod
    def from_gguf(cls, facts: Mapping[str, Any]) -> HFTokenizer:
        """The tokenizer that a GGUF file's facts describe.

        Raises:
            InputError: Another kind of tokenizer, or text is cut in an unknown way.
        """
        kind, cut = (facts.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if kind != "gpt2":
            raise InputError(f"GGUF: tokenizer {kind!r} is not supported; allowed: gpt2")
        if cut not in PRE_TOKENIZERS:
            raise InputError(
                f"GGUF: tokenizer.ggml.pre {cut!r} is not one of {', '.join(PRE_TOKENIZERS)}"
            )
        tokens, merges = _fact(facts, "tokens"), _fact(facts, "merges")
        types = facts.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        # Names of rows that only fill up the embedding are no tokens.
        vocabulary = {
            token: number
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind != UNUSED
        }
        is_llama3 = cut == "llama-bpe"
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=is_llama3))
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[cut]
        tokenizer.decoder = decoders.ByteLevel()
        if cut == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        for token, kind in zip(tokens, types, strict=True):
            if kind in (CONTROL, USER_DEFINED):
                is_special = kind == CONTROL
                tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special)])
        begins = facts.get("tokenizer.ggml.add_bos_token", is_llama3)
        begin = tokens[_fact(facts, "bos_token_id")] if begins else None
        if begin is not None:  # for whoever reads what `save` writes
            known = [(begin, tokenizer.token_to_id(begin))]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=known
            )
        return cls(
            tokenizer,
            "GGUF",
            tokens[_fact(facts, "eos_token_id")],
            begin,
            facts.get("tokenizer.chat_template"),
        )

    def save(self, folder: Path, **more: Any) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `from_folder` reads again.

        Args:
            more: Of tokenizer_config.json, for other programs; or in place of what would be there.
        """
        facts = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.facts
        facts |= {"chat_template": self.chat_template} | more
        known = {name: value for name, value in facts.items() if value is not None}
        with files.atomic_write(folder / "tokenizer.json") as file:
            file.write(self._tokenizer.to_str())
        files.write_json(folder / "tokenizer_config.json", known)

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew in another process: the library forgets there that text is only text.
        names = self.facts["eos_token"], self.facts["bos_token"]
        return HFTokenizer, (self._tokenizer, self.name, *names, self.chat_template)

    @property
    def backend(self) -> Tokenizer:
        """The library's own, for whoever writes it in another form."""
        return self._tokenizer

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Special tokens that are no text, unlike added words such as Qwen's <think>."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return frozenset(number for number, token in added if token.special)

    def token_id(self, token: str) -> int:
        """The id of a special token, by its name.

        Raises:
            InputError: There is no such token.
        """
        if token not in self.special_tokens:
            known = ", ".join(list(self.special_tokens)[:10])
            raise InputError(f"tokenizer: no special token {token!r}; there are: {known}")
        return self.special_tokens[token]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens read as plain text, nothing put around it.

        A few vocabularies, SmolLM2's among them, lack some bytes; these are left out.
        """
        return self._tokenizer.encode(_whole(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""

        def encode(part: Sequence[str]) -> list[list[int]]:
            found = self._tokenizer.encode_batch_fast(
                [_whole(text) for text in part], add_special_tokens=False
            )
            return [encoding.ids for encoding in found]

        with _without_own_threads():
            return encode_in_threads(encode, texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    @functools.cached_property
    def _special_bytes(self) -> dict[int, bytes]:
        return {number: token.encode() for token, number in self.special_tokens.items()}

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters; none of an id without one."""
        if token in self._special_bytes:
            return self._special_bytes[token]
        text = self._tokenizer.id_to_token(token)
        return b"" if text is None else bytes(map(self._byte_of.__getitem__, text))


@contextlib.contextmanager
def _without_own_threads() -> Iterator[None]:
    """Keep the library from starting threads of its own.

    They stay for good, and a process that is forked from then on, such as a loader's worker, has
    none of them: the library warns at each, and would wait for ever if it were asked again.
    """
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _whole(text: str) -> str:
    """Half a surrogate pair, which no UTF-8 has, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _token_text(token: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or a mapping around it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _fact(facts: Mapping[str, Any], key: str) -> Any:
    if (value := facts.get(f"tokenizer.ggml.{key}")) is None:
        raise InputError(f"GGUF: tokenizer.ggml.{key} is missing")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = files.read_json(path, files.MOST_SMALL)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no JSON that can be read ({error})") from None
    if not isinstance(facts, dict):
        raise InputError(f"{path}: not a mapping")
    return facts
