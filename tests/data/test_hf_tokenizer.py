"""Byte-level vocabularies: ids equal tiktoken's and transformers'; text is no special token."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft.common.errors import InputError
from lightning_sft.common.gguf_header import read_gguf_header
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.prompts import get_style
from lightning_sft.data.tokenizer import PART, gpt2_tokenizer, read_vocabulary_file
from lightning_sft.decoding.answer_text import AnswerText
from support.real_model import real_gguf as _real_gguf

real_gguf = pytest.fixture(scope="session")(_real_gguf)

SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>"]  # 50257, 50258, 50259: the last no special one


@functools.cache
def facts(cut: str) -> dict[str, Any]:
    """What a GGUF with GPT-2's vocabulary and three more tokens would say."""
    vocabulary = json.loads(read_vocabulary_file("encoder.json"))
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), *SPECIAL, "[PAD50260]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 50256 + [3, 3, 3, 4, 5],
        "tokenizer.ggml.merges": read_vocabulary_file("vocab.bpe").decode().strip().split("\n")[1:],
        "tokenizer.ggml.bos_token_id": 50257,
        "tokenizer.ggml.eos_token_id": 50258,
        "tokenizer.chat_template": "{{ messages }}",
    }


@functools.cache
def tokenizer_of(cut: str) -> HFTokenizer:
    return HFTokenizer.from_gguf(facts(cut))


@functools.cache
def cut_by(pattern: str) -> tiktoken.Encoding:
    """tiktoken with GPT-2's vocabulary and another way to cut text."""
    return tiktoken.Encoding(
        "test", pat_str=pattern, mergeable_ranks=gpt2_tokenizer()._encoding._mergeable_ranks,
        special_tokens={},
    )  # fmt: skip


def llama_pattern(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + "|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def cut_digits(text: str) -> list[str]:
    return [part for part in re.split(r"(\d)", text) if part]


EXPECTED = {
    "gpt-2": lambda text: gpt2_tokenizer().encode(text),
    "llama-bpe": lambda text: cut_by(llama_pattern("{1,3}")).encode_ordinary(text),
    "qwen2": lambda text: cut_by(llama_pattern("")).encode_ordinary(
        unicodedata.normalize("NFC", text)
    ),
    "smollm": lambda text: [
        token for part in cut_digits(text) for token in gpt2_tokenizer().encode(part)
    ],
}
WORDS = [
    "I'll",
    "WE'VE",
    "1234567",
    " 12",
    "  3",
    "\n\n",
    "\r\n ",
    "Straße",
    "e\u0301",
    "日本",
    "🙂",
    "!?",
]
WORDS += [" ", "\t", "hello", " world", "<|im_end|>", "<|endoftext|>", "_x", "'"]


@pytest.mark.parametrize("cut", EXPECTED)
@settings(max_examples=50)
@given(
    words=st.lists(st.sampled_from(WORDS) | st.text("abcXYZ '09.,\n\té", max_size=5), max_size=8)
)
def test_ids_from_a_gguf_equal_tiktokens(cut, words):
    text = "".join(words)
    assert tokenizer_of(cut).encode(text) == EXPECTED[cut](text)


def test_text_is_never_a_special_token():
    tokenizer = tokenizer_of("gpt-2")
    text = "<|im_start|>user<|im_end|><|endoftext|>"
    assert tokenizer.encode(text) == gpt2_tokenizer().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<think>") == [50259]  # a word of the vocabulary, as in transformers
    assert [tokenizer.token_id(name) for name in SPECIAL] == [50257, 50258, 50259]
    with pytest.raises(InputError, match=r"^tokenizer: no special token '<s>'; there are: <\|end"):
        tokenizer.token_id("<s>")


def test_what_a_gguf_says():
    tokenizer = tokenizer_of("gpt-2")
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (50258, None)
    assert tokenizer.vocab_size == 50260  # rows that fill up the embedding are no tokens
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer_of("llama-bpe").bos_token_id == 50257  # unless the file says otherwise
    said = facts("llama-bpe") | {"tokenizer.ggml.add_bos_token": False}
    assert HFTokenizer.from_gguf(said).bos_token_id is None
    assert len({tokenizer_of(cut).name for cut in EXPECTED}) == 4
    other = facts("gpt-2") | {"tokenizer.ggml.merges": facts("gpt-2")["tokenizer.ggml.merges"][:-1]}
    assert HFTokenizer.from_gguf(other).name != tokenizer.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, "tokenizer 'llama' is not supported; allowed: gpt2"),
        (
            {"pre": "tekken"},
            "tokenizer.ggml.pre 'tekken' is not one of gpt-2, smollm, llama-bpe, qwen2",
        ),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
    ],
    ids=str,
)
def test_bad_gguf(change, message):
    named = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(InputError) as error:
        HFTokenizer.from_gguf(facts("gpt-2") | named)
    assert str(error.value) == f"GGUF: {message}"


@settings(max_examples=30)
@given(text=st.text(max_size=20))
def test_bytes_of_tokens_are_the_text(text):
    tokenizer = tokenizer_of("gpt-2")
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids) == text
    answer = AnswerText()
    assert (
        "".join(answer.add(tokenizer.token_bytes(token)) for token in ids) + answer.finish() == text
    )


def test_a_surrogate_alone_and_ids_without_a_token():
    tokenizer = tokenizer_of("gpt-2")
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.decode([50257, 64, 50260, 99999]) == "<|im_start|>a"
    assert tokenizer.encode_batch(["a", "", "b \ud800"]) == [
        tokenizer.encode(text) for text in ("a", "", "b \ufffd")
    ]


def test_many_texts_are_encoded_as_each_alone(monkeypatch):
    """In parts, on threads, and without what the library would leave behind in this process."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(WORDS, k=draw.randrange(12))) for _ in range(3 * PART + 7)]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    for tokenizer in map(tokenizer_of, EXPECTED):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch([]) == []
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    tokenizer_of("qwen2").encode_batch(texts)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


FORKS = """
import os, sys
from lightning_sft.data.hf_tokenizer import HFTokenizer
tokenizer = HFTokenizer.from_folder(sys.argv[1])
texts = ["Some words, " * (n % 7) for n in range(2000)]
ids = tokenizer.encode_batch(texts)
if (child := os.fork()) == 0:
    os._exit(0 if tokenizer.encode_batch(texts) == ids else 1)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_behind_it_neither_warns_nor_waits(tmp_path):
    """With threads of its own the library does both."""
    folder = str(write_folder(tmp_path, eos_token="<|im_end|>"))
    code = [sys.executable, "-c", FORKS, folder]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- A folder ---


def write_folder(folder: Path, *, begin: bool = False, **config: Any) -> Path:
    content = json.loads(tokenizer_of("qwen2")._tokenizer.to_str())
    if begin:  # as Llama 3's has it
        sequence = {"Sequence": {"id": "A", "type_id": 0}}
        special = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [special, sequence],
            "pair": [special, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|im_start|>": {"id": "<|im_start|>", "ids": [50257], "tokens": ["<|im_start|>"]}
            },
        }
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_and_a_gguf_make_the_same_tokenizer(tmp_path: Path):
    end = {"content": "<|im_end|>", "lstrip": False}
    write_folder(tmp_path, eos_token=end, bos_token="<|im_start|>", chat_template="{{ 1 }}")
    found, expected = HFTokenizer.from_folder(tmp_path), tokenizer_of("qwen2")
    text = "A text of more than 4 tokens, e\u0301 and <|im_end|><think>"
    assert found.encode(text) == expected.encode(text)
    assert (found.eos_token_id, found.bos_token_id) == (50258, None)
    assert (found.vocab_size, found.special_tokens) == (
        expected.vocab_size,
        expected.special_tokens,
    )
    assert found.chat_template == "{{ 1 }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}")
    assert HFTokenizer.from_folder(tmp_path).chat_template == "{{ 2 }}"


def test_a_token_that_every_row_begins_with(tmp_path: Path):
    folder = write_folder(tmp_path, begin=True, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer = HFTokenizer.from_folder(folder)
    assert tokenizer.bos_token_id == 50257
    assert tokenizer.encode("a") == [64]  # who wants it puts it there


def test_bad_folders(tmp_path: Path):
    with pytest.raises(InputError, match=r"tokenizer_config\.json: no JSON that can be read"):
        HFTokenizer.from_folder(tmp_path)
    write_folder(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: eos_token is missing"):
        HFTokenizer.from_folder(tmp_path)
    write_folder(tmp_path, eos_token="<nothing>")
    with pytest.raises(InputError, match="no special token '<nothing>'"):
        HFTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: no tokenizer that can be read"):
        HFTokenizer.from_folder(tmp_path)
    content = json.loads(tokenizer_of("gpt-2")._tokenizer.to_str())
    content["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not byte-level, the only kind supported"):
        HFTokenizer.from_folder(tmp_path)


# --- SmolLM2's own vocabulary ---


@pytest.fixture(scope="session")
def smollm2(real_gguf: Path) -> HFTokenizer:
    return HFTokenizer.from_gguf(read_gguf_header(real_gguf).facts)


@pytest.fixture(scope="session")
def theirs(real_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name)


def encode_theirs(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.slow
def test_smollm2_on_the_chapters_entries(smollm2, theirs, book_entries):
    assert (smollm2.vocab_size, smollm2.eos_token_id, smollm2.bos_token_id) == (49152, 2, None)
    assert smollm2.encode("user\n") == [4093, 198]
    for entry in book_entries:
        text = get_style("alpaca").prompt(entry) + entry.output
        assert smollm2.encode(text) == encode_theirs(theirs, text)


@pytest.mark.slow
def test_smollm2_on_random_text(smollm2, theirs):
    """transformers' reader of GGUF takes every vocabulary's cuts but some for GPT-2's.

    SmolLM2's tokenizer.json cuts digits out first, and so does llama.cpp for `smollm`; it shows
    where two spaces come before one.
    """
    pre = pytest.importorskip("tokenizers").pre_tokenizers
    theirs.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Digits(individual_digits=True),
            pre.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    draw = random.Random(123)
    for _ in range(10_000):
        text = "".join(draw_piece(draw) for _ in range(draw.randrange(40)))
        ids = smollm2.encode(text)
        assert ids == encode_theirs(theirs, text)
        assert smollm2.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def draw_piece(draw: random.Random) -> str:
    """A character of any plane, one that prints, white space, or something that cuts."""
    kind = draw.random()
    if kind < 0.5:
        return chr(draw.randrange(32, 127))
    if kind < 0.6:
        return draw.choice([" ", "\n", "\t", "\r", "\u00a0", "\u3000"])
    if kind < 0.7:
        return draw.choice(["<|im_end|>", "'ll", "  1", "½", " 12", "e\u0301", "\u200d"])
    point = draw.randrange(0x110000 - 0x800)
    return chr(point if point < 0xD800 else point + 0x800)  # no surrogates
