"""`evaluate` on the Llama family: the ids that lm-eval's own model makes, and its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sft import load_model
from lightning_sft.runs.evaluation_file import read_evaluation
from support.lm_eval_tasks import compare_with_hf, write_tasks
from support.runs import run
from support.tiny_families import KINDS, write_family

pytest.importorskip("lm_eval", reason="lm-eval is missing (extra eval)")
# Beside a base model's own end of text, every kind of first and last token.
FEW = ["llama3.2-base", "smollm2", "qwen3"]


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return write_tasks(tmp_path / "tasks")


def write_both(folder: Path, kind: str) -> tuple[Path, Path]:
    """A model, and its exported folder."""
    source, out = write_family(folder / "hf", kind), folder / "out"
    options = ["--format", "hf", "--out", out, "--prompt_style", KINDS[kind].style]
    assert run("export", "--ckpt_path", source, *options) == 0
    return source, out


@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_the_ids_of_transformers(kind, tmp_path):
    """Special tokens are known by their names here, as a benchmark has no other way to say them."""
    transformers = pytest.importorskip("transformers")
    from lightning_sft.evaluating.lm_eval_model import EvalModel

    source, out = write_both(tmp_path, kind)
    model = EvalModel(load_model(source, device="cpu", prompt_style=KINDS[kind].style))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "One  two?"}]
    asked = model.apply_chat_template(messages)
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked == theirs
    assert model.chat_template(True) == tokenizer.chat_template
    begin = KINDS[kind].bos or ""
    assert asked.startswith(begin)
    for text in ["Hello world", "", " 12 é", f"a{KINDS[kind].eos}b", "<think>x"]:
        assert model.tok_encode(text) == tokenizer.encode(text)
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert model.tok_encode(text, add_special_tokens=False) == plain
    # What begins a row is not put before it again.
    given = tokenizer.encode(asked, add_special_tokens=False)
    assert model.tok_encode(asked) == model.tok_encode(asked, add_special_tokens=False) == given
    first = tokenizer.bos_token_id if KINDS[kind].bos else tokenizer.eos_token_id
    assert model.prefix_token_id == first


@pytest.mark.slow  # half a minute, until lm-eval has read all its tasks' names
@pytest.mark.process
def test_the_command(tmp_path, tasks, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = write_family(tmp_path / "hf", "llama3.2")
    options = ["--ckpt_path", source, "--include_path", tasks, "--prompt_style", "llama3"]
    options += ["--limit", 3, "--device", "cpu"]
    assert run("evaluate", *options, "--tasks", "colours,writing", "--apply_chat_template") == 0
    assert {row["task"] for row in read_evaluation(tmp_path / "evaluation.json")} == {
        "colours",
        "writing",
    }
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", FEW)
def test_same_as_lm_evals_own_model(kind, chat, tmp_path, tasks, capsys):
    pytest.importorskip("transformers")
    source, out = write_both(tmp_path, kind)
    model = load_model(source, device="cpu", prompt_style=KINDS[kind].style)
    largest = compare_with_hf(model, out, tasks, chat)
    with capsys.disabled():
        print(f"\n{kind}, chat template {chat}: largest difference {largest:.1e}")
