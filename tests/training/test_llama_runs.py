"""The Llama family through the commands and from Python, with tiny models on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_sft import InstructionDataModule, SFTModule, load_model
from lightning_sft.common.errors import InputError
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.models.llama import LlamaModel
from support.runs import (
    load,
    newest_checkpoint,
    read_metrics,
    run,
    spawn,
    write_config,
    write_data,
)
from support.tiny_run import CONFIG, make_tiny, write_hf, write_tiny_gguf

SETTINGS = {"model__architecture": "auto", "data__prompt_style": "chatml"}
OPTIMIZER = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 1e-3, "weight_decay": 0.1},
}


def write_run(folder: Path, weights: Path, **changes: Any) -> Path:
    return write_config(folder, model__weights=str(weights), **SETTINGS | changes)


def test_a_run_needs_its_weights_folder_no_more(tmp_path, capsys):
    """Trained, resumed to the bit, asked and served from the run folder alone."""
    weights = write_hf(tmp_path / "hf")
    config = write_run(tmp_path, weights)
    assert run("fit", "--config", config) == 0
    whole = tmp_path / "runs" / "tiny" / "version_0"
    assert (whole / "llama-32x2-sft.pth").is_file()
    assert read_tokenizer(whole).name == read_tokenizer(weights).name
    often = ["--checkpoints.every_n_steps", 3, "--checkpoints.keep_last", 9]
    assert run("fit", "--config", config, *often, "--trainer.max_steps", 7) == 0
    part = tmp_path / "runs" / "tiny" / "version_1"
    shutil.rmtree(weights)
    checkpoint = part / "checkpoints" / "step-000006.ckpt"
    assert run("fit", "--config", part / "config.yaml", "--ckpt_path", checkpoint,
               "--trainer.max_steps", -1) == 0  # fmt: skip
    ours, theirs = load(newest_checkpoint(part)), load(newest_checkpoint(whole))
    assert ours["global_step"] == theirs["global_step"]
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor)
    assert read_metrics(part, "train_loss") == read_metrics(whole, "train_loss")
    assert ours["hyper_parameters"]["architecture"]["n_kv_groups"] == 2

    for path in (newest_checkpoint(whole), whole / "llama-32x2-sft.pth"):
        assert run("predict", "--ckpt_path", path) == 0
    model = load_model(whole, device="cpu")
    answer = model.answer("Say the number 3", max_new_tokens=5)
    assert "".join(model.stream("Say the number 3", max_new_tokens=5)) == answer
    again = load_model(newest_checkpoint(whole), device="cpu")
    assert again.answer("Say the number 3", max_new_tokens=5) == answer
    capsys.readouterr()


def test_the_checkpoint_knows_its_tokenizer(tmp_path, capsys):
    config = write_run(tmp_path, write_hf(tmp_path / "hf"))
    assert run("fit", "--config", config, "--trainer.max_steps", 1) == 0
    checkpoint = newest_checkpoint(tmp_path / "runs" / "tiny" / "version_0")
    lone = shutil.copy(checkpoint, tmp_path / "lone.ckpt")
    assert load_model(lone, device="cpu").tokenizer.eos_token_id == 258  # where training had it
    assert SFTModule.load_from_checkpoint(lone).tokenizer.eos_token_id == 258
    other = write_hf(tmp_path / "other", eos="<|eot_id|>")
    shutil.copy(checkpoint, other / "lone.ckpt")
    with pytest.raises(InputError, match=r"^model.tokenizer: this is bpe-\w+, and the checkpoint"):
        load_model(other / "lone.ckpt", device="cpu")
    capsys.readouterr()


def test_from_a_gguf(tmp_path, capsys, monkeypatch):
    weights = write_tiny_gguf(tmp_path / "tiny.gguf", monkeypatch)
    changes = {"data__padding_free": True, "model__activation_checkpointing": True}
    config = write_run(tmp_path, weights, **changes)
    assert run("inspect", "--config", config, "--show", 1) == 0
    assert "<|im_start|>[[user\nSay" in capsys.readouterr().out
    assert run("fit", "--config", config, "--trainer.max_steps", 2) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    assert (folder / "tokenizer.json").is_file()
    first = read_metrics(folder, "train_loss")
    monkeypatch.undo()
    config = write_run(tmp_path, write_hf(tmp_path / "hf"))
    assert run("fit", "--config", config, "--trainer.max_steps", 2) == 0
    second = read_metrics(tmp_path / "runs" / "tiny" / "version_1", "train_loss")
    assert first == pytest.approx(second, abs=1e-5)


def test_adapters(tmp_path, capsys):
    lora = {"rank": 2, "targets": ["W_query", "ff.*", "out_head"]}
    config = write_run(tmp_path, write_hf(tmp_path / "hf"), model__lora=lora)
    assert run("fit", "--config", config, "--data.share_prefix", "true") == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    assert all("lora_" in name for name in load(newest_checkpoint(folder))["state_dict"])
    answers = [
        load_model(path, device="cpu").answer("Say the number 3", max_new_tokens=5)
        for path in (newest_checkpoint(folder), folder)
    ]
    assert answers[0] == answers[1]
    for path in (newest_checkpoint(folder), folder):
        assert run("predict", "--ckpt_path", path) == 0
    capsys.readouterr()


def test_from_python_the_data_takes_the_models_tokenizer(tmp_path):
    weights = str(write_hf(tmp_path / "hf"))
    data = InstructionDataModule(
        str(write_data(tmp_path / "data.json")), prompt_style="chatml", max_length=256
    )
    module = SFTModule("auto", weights, prompt_style="chatml")
    L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    ).fit(module, data)  # fmt: skip
    assert data.tokenizer is module.tokenizer
    assert isinstance(module.network, LlamaModel)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_train_as_one(tmp_path, strategy):
    config = write_run(tmp_path, write_hf(tmp_path / "hf"), trainer__max_steps=4)
    assert run("fit", "--config", config) == 0
    options = ["--trainer.strategy", strategy, "--trainer.devices", 2, "--data.batch_size", 2]
    process = spawn("fit", "--config", config, *options, cwd=tmp_path, forked=False)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    one, two = (
        read_metrics(tmp_path / "runs" / "tiny" / f"version_{number}", "train_loss")
        for number in (0, 1)
    )
    assert two == pytest.approx(one, abs=1e-5)


# --- transformers ---


@pytest.mark.parametrize("layout", ["padded", "padding_free", "share_prefix"])
def test_twenty_steps_equal_transformers(tmp_path, layout):
    """A plain loop over the same ids, padded and with the loss over all tokens of the answer."""
    transformers = pytest.importorskip("transformers")
    folder = write_hf(tmp_path / "hf")
    changes = {} if layout == "padded" else {f"data__{layout}": True}
    changes |= {"data__mask_prompt": True, "data__max_length": 256}
    config = write_run(tmp_path, folder, **changes)
    assert run("fit", "--config", config, "--trainer.max_epochs", 3, "--trainer.max_steps", 20) == 0
    ours = read_metrics(tmp_path / "runs" / "tiny" / "version_0", "train_loss")

    data = InstructionDataModule(
        str(tmp_path / "data.json"), batch_size=4, prompt_style="chatml", mask_prompt=True
    )
    data.tokenizer = read_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER["init_args"])
    theirs: list[float] = []
    loader = data.train_dataloader()
    for epoch in range(3):
        loader.current_epoch = lambda epoch=epoch: epoch
        for batch in loader:
            if len(theirs) == 20:
                break
            logits = model(batch["input_ids"]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            theirs.append(loss.item())
    assert len(ours) == len(theirs) == 20
    assert ours == pytest.approx(theirs, abs=1e-5)


# --- Refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.architecture", json.dumps({"family": "llama"}), "--model.weights", "null"],
            "model.tokenizer: random weights bring no tokenizer; give a folder with tokenizer.json "
            "or a GGUF",
        ),
        (
            ["--model.architecture", json.dumps({"family": "mamba"})],
            "architecture: unknown family 'mamba'; allowed: gpt2, llama",
        ),
        (
            ["--data.header_in_prompt", "false"],
            "header_in_prompt: the header of chatml holds this model's end-of-text token, at which "
            "answers end; leave header_in_prompt true",
        ),
        (
            ["--model.architecture", "gpt2-small", "--model.tokenizer", "hf"],
            "model.tokenizer: GPT-2 has its own tokenizer; leave it out",
        ),
        (
            ["--model.weights", "null"],
            "model.architecture: auto: None has no config.json and is no GGUF; give a name or the "
            "fields",
        ),
    ],
    ids=str,
)
def test_what_is_refused_in_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    config = write_run(tmp_path, write_hf(tmp_path / "hf"))
    assert run("fit", "--config", config, *options) == 2
    assert capsys.readouterr().err.strip().removeprefix("error: ") == message
    assert not (tmp_path / "runs").exists()


def test_weights_of_another_rotation_are_refused(tmp_path, capsys):
    """Of the same shapes, so that they would load."""
    fields = {"family": "llama", "vocab_size": 266, "context_length": 256, "emb_dim": 32}
    fields |= {"n_heads": 4, "n_layers": 2, "hidden_dim": 48, "n_kv_groups": 2, "rope_base": 2e4}
    folder = write_hf(tmp_path / "hf")
    config = write_run(tmp_path, folder, model__architecture=fields)
    assert run("fit", "--config", config) == 2
    assert f"{folder} has rope_base 10000.0, the architecture has 20000.0" in (
        capsys.readouterr().err
    )
    assert make_tiny().config == CONFIG


def test_commands_that_are_not_there_yet(tmp_path, capsys):
    folder = write_hf(tmp_path / "hf")
    out = tmp_path / "out"
    assert run("export", "--ckpt_path", folder, "--format", "hf", "--out", out) == 2
    assert "export: only GPT-2 is exported so far" in capsys.readouterr().err
    assert not out.exists()
    config = write_run(tmp_path, folder)
    assert run("plan", "--config", config) == 2
    assert "plan: costs are estimated for GPT-2 only so far" in capsys.readouterr().err
