"""`load_model(…).answer(…)`: the text that the pieces below give; and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_sft
from lightning_sft import (
    AnsweringModel,
    Conversation,
    Entry,
    GPTConfig,
    GPTModel,
    generate,
    load_model,
)
from lightning_sft.common.errors import InputError
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.prompts import get_style
from lightning_sft.data.tokenizer import gpt2_tokenizer
from lightning_sft.decoding.kept_rows import WORTH_KEEPING
from support.runs import TINY, newest_checkpoint, run, write_config, write_data

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
LIMIT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def model() -> AnsweringModel:
    torch.manual_seed(0)
    network = GPTModel(GPTConfig(**TINY)).eval()
    with torch.no_grad():
        network.out_head.weight.normal_(std=0.3)  # answers that differ
    return AnsweringModel(network, get_style("alpaca"))


def test_an_answer_is_what_generate_and_the_style_give(model: AnsweringModel) -> None:
    tokenizer, style = gpt2_tokenizer(), get_style("alpaca")
    ids = tokenizer.encode(style.prompt(Entry("Say it", "twice", "")))
    expected = style.extract(tokenizer.decode(generate(model.model, [ids], **LIMIT)[0]))
    assert expected
    assert model.answer("Say it", input="twice", **LIMIT) == expected
    assert model.answer("Say it", "twice", **LIMIT) == expected
    assert model.answer("Say it", **LIMIT) != expected


def test_pieces_join_to_the_answer(model: AnsweringModel) -> None:
    pieces = list(model.stream("Say it", input="twice", max_new_tokens=30))
    assert len(pieces) > 3
    assert "".join(pieces) == model.answer("Say it", input="twice", max_new_tokens=30)
    entry = Entry("Say it", "twice", "")
    assert list(model.stream(entry, max_new_tokens=30)) == pieces


def test_a_list_is_answered_as_one_by_one(model: AnsweringModel) -> None:
    asked: list[str | Entry] = [
        "Say it",
        Entry("Say it", "twice", ""),
        "Say something longer, then",
    ]
    found = model.answer(asked, batch_size=2, **LIMIT)
    alone = [model.answer([one], **LIMIT)[0] for one in asked]
    assert found == alone
    assert len(set(found)) == 3
    assert model.answer([]) == []


def test_a_conversation_is_answered_as_its_prompt_alone(
    model: AnsweringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As messages, mappings or a conversation, streamed or not; and only what is new is read."""
    read: list[int] = []
    right = model.model.hidden_states

    def count(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        read.append(ids.numel())
        return right(ids, **settings)

    model = AnsweringModel(model.model, get_style("phi3"))
    monkeypatch.setattr(model.model, "hidden_states", count)
    said: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    for turn in range(3):
        said.append({"role": "user", "content": f"Say it {turn} times"})
        talk = Conversation(tuple(said))
        expected = model.answer([talk], **LIMIT)[0]
        read.clear()
        assert model.answer(said, **LIMIT) == expected
        ids = encode_prompt(talk, model.style, model.tokenizer)
        assert read[0] < len(ids) / 2 or turn < 2  # after a row that was worth keeping
        read.clear()
        assert "".join(model.stream(talk, **LIMIT)) == expected
        assert read[0] == (1 if len(ids) > WORTH_KEEPING else len(ids))
        said.append({"role": "assistant", "content": expected})
    with pytest.raises(InputError, match=r"messages\[0\]\.role: 'assistant' cannot come first"):
        model.answer(said[-1:], **LIMIT)
    assert model.answer(Entry("Say it", "twice", ""), **LIMIT) == model.answer(
        "Say it", "twice", **LIMIT
    )


def test_history_is_cut_on_request_alone(model: AnsweringModel) -> None:
    turn = [{"role": "user", "content": "word " * 20}, {"role": "assistant", "content": "x"}]
    talk = [{"role": "system", "content": "Be brief."}, *turn * 8, turn[0]]
    with pytest.raises(InputError, match="context"):
        model.answer(talk, **LIMIT)
    short, cut = model.cut_history(talk, **LIMIT)
    assert 0 < cut < 8
    assert short.messages[0].content == "Be brief."
    assert len(short.messages) == 2 + 2 * (8 - cut)
    assert model.answer(short, **LIMIT)
    assert model.cut_history(short, **LIMIT) == (short, 0)


def test_a_model_that_was_trained_on_reads_anew(model: AnsweringModel) -> None:
    talk = [{"role": "user", "content": "Say it " + "once more " * 20}]
    model.answer(talk, **LIMIT)
    with torch.no_grad():
        model.model.tok_emb.weight.mul_(1.5)
    asked = Conversation(tuple(talk))
    assert model.answer(talk, **LIMIT) == model.answer([asked], **LIMIT)[0]
    with torch.no_grad():
        model.model.tok_emb.weight.div_(1.5)


def test_settings_are_those_of_generation(model: AnsweringModel) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "top_k": 50, **LIMIT}
    assert model.answer("Say it", seed=1, **hot) == model.answer("Say it", seed=1, **hot)
    assert model.answer("Say it", seed=1, **hot) != model.answer("Say it", seed=2, **hot)
    for call in (model.answer, model.stream):  # a stream too says so at once
        with pytest.raises(InputError, match=r"unknown 'beams'; allowed: max_new_tokens"):
            call("Say it", beams=4)
        with pytest.raises(InputError, match="temperature"):
            call("Say it", temperature=-1)
    with pytest.raises(InputError, match="give entries"):
        model.answer(["Say it"], input="twice")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="context"):
        model.answer("word " * 500)


def test_training_mode_is_left_as_it_was(model: AnsweringModel) -> None:
    model.model.train()
    model.answer("Say it", **LIMIT)
    assert model.model.training
    model.model.eval()


def read_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code, with a tiny model in place of gpt2-small, which a test cannot fetch."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "instruction-data.json", 20)
    config = write_config(tmp_path, run__name="quickstart", trainer__max_steps=2)
    assert run("fit", "--config", config) == 0
    ask, train = read_blocks()
    exec(compile(ask, str(PAGE), "exec"), {})
    named = 'architecture="gpt2-small", weights="gpt2-small"'
    assert named in train
    tiny = train.replace(named, f"architecture={TINY!r}, weights=None, max_length=128")
    tiny = tiny.replace("batch_size=8", "batch_size=8, max_length=128")
    exec(compile(tiny, str(PAGE), "exec"), {})
    folder = tmp_path / "runs" / "python" / "version_0"
    for name in ("samples.jsonl", "loss-curve.png", "gpt2-2M-sft.pth", "checkpoints"):
        assert (folder / name).exists(), name
    assert "val_data[0] before training" in capsys.readouterr().out


def test_a_run_and_its_files_are_one_model(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_steps=2)
    assert run("fit", "--config", config) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    sources = [folder, newest_checkpoint(folder), folder / "gpt2-2M-sft.pth"]
    answers = {load_model(source, device="cpu").answer("Say it", **LIMIT) for source in sources}
    assert len(answers) == 1
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "missing.ckpt")


def test_every_public_name_is_there() -> None:
    for name in lightning_sft.__all__:
        assert getattr(lightning_sft, name).__doc__, name
    assert set(lightning_sft._OWNERS) == set(lightning_sft.__all__)
