"""`fit` through the real command line: its losses, its files, and equal settings' equal results."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_sft import GPTConfig, GPTModel, InstructionDataModule
from lightning_sft.commands.verify_resume import equal
from support.runs import TINY, load, newest_checkpoint, read_metrics, run, write_config
from support.tiny_run import CONFIG, write_hf


def start_weights(folder: Path) -> Path:
    """Random weights as the book's code saves them."""
    torch.manual_seed(0)
    torch.save(GPTModel(GPTConfig(**TINY)).state_dict(), folder / "start.pth")
    return folder / "start.pth"


@pytest.mark.parametrize(
    "layout", [{}, {"data__padding_free": True}, {"data__share_prefix": True}], ids=str
)
@pytest.mark.parametrize("mask_prompt", [False, True])
def test_twenty_steps_equal_a_plain_loop(
    tmp_path: Path, layout: dict[str, bool], mask_prompt: bool
) -> None:
    weights = start_weights(tmp_path)
    config = write_config(
        tmp_path,
        model__weights=str(weights),
        trainer__max_steps=20,
        trainer__max_epochs=-1,
        trainer__limit_val_batches=0,
        loss_curve__every_n_steps=0,
        data__mask_prompt=mask_prompt,
        **layout,
    )
    assert run("fit", "--config", config) == 0
    ours = read_metrics(tmp_path / "runs/tiny/version_0", "train_loss")

    data = InstructionDataModule(
        str(tmp_path / "data.json"), batch_size=4, max_length=128, mask_prompt=mask_prompt
    )
    model = GPTModel(GPTConfig(**TINY))
    model.load_state_dict(torch.load(weights, weights_only=True))
    expected = []
    # The chapter's optimizer and loop: padded batches, all logits, mean loss, nothing fused.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, weight_decay=0.1, fused=False, foreach=False
    )
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.current_epoch = lambda epoch=epoch: epoch
        for batch in loader:
            loss = F.cross_entropy(
                model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    assert ours == pytest.approx(expected[:20], abs=1e-5)


def test_files_of_a_run_and_nothing_else(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert run("fit", "--config", config) == 0
    folder = tmp_path / "runs/tiny/version_0"
    made = {str(p.relative_to(tmp_path)) for p in set(tmp_path.rglob("*")) - before if p.is_file()}
    names = {
        ".lock",
        "config.yaml",
        "metrics.csv",
        "samples.jsonl",
        "loss-curve.png",
        "gpt2-2M-sft.pth",
        "checkpoints/step-000016.ckpt",
        "checkpoints/step-000016.ckpt.json",
    }
    events = {str(p.relative_to(tmp_path)) for p in folder.glob("events.out.tfevents.*")}
    assert len(events) == 1
    assert made == {f"runs/tiny/version_0/{name}" for name in names} | events


def test_a_second_run_gets_a_folder_of_its_own_and_the_same_losses(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_epochs=1, model__architecture__drop_rate=0.1)
    assert run("fit", "--config", config) == 0
    assert run("fit", "--config", config) == 0
    first, second = (tmp_path / f"runs/tiny/version_{n}" for n in (0, 1))
    assert read_metrics(first, "train_loss") == read_metrics(second, "train_loss")
    states = [load(newest_checkpoint(folder))["state_dict"] for folder in (first, second)]
    assert equal(*states)


def test_a_saved_config_repeats_the_run(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_epochs=1)
    assert run("fit", "--config", config) == 0
    first = tmp_path / "runs/tiny/version_0"
    assert run("fit", "--config", first / "config.yaml") == 0
    second = tmp_path / "runs/tiny/version_1"
    assert read_metrics(first, "train_loss") == read_metrics(second, "train_loss")


def test_watching_does_not_change_training(tmp_path: Path) -> None:
    """Samples, the curve and validation draw no random numbers and leave no trace."""
    shared = {"trainer__max_epochs": 1, "model__architecture__drop_rate": 0.1}
    assert run("fit", "--config", write_config(tmp_path, **shared)) == 0
    quiet = write_config(
        tmp_path,
        loss_curve__every_n_steps=0,
        samples__indices=[],
        trainer__limit_val_batches=0,
        **shared,
    )
    assert run("fit", "--config", quiet) == 0
    watched, unwatched = (tmp_path / f"runs/tiny/version_{n}" for n in (0, 1))
    assert read_metrics(watched, "train_loss") == read_metrics(unwatched, "train_loss")


def test_samples_and_curve_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--config", write_config(tmp_path, loss_curve__every_n_steps=5)) == 0
    folder = tmp_path / "runs/tiny/version_0"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(s["epoch"], s["step"], s["index"]) for s in samples] == [
        (0, 0, 0),
        (1, 8, 0),
        (2, 16, 0),
    ]
    data = json.loads((tmp_path / "data.json").read_text())
    assert samples[0]["output"] == data[int(40 * 0.85) + int(40 * 0.10)]["output"]  # val_data[0]
    assert len(read_metrics(folder, "val_eval_loss")) == 4  # steps 0, 5, 10, 15 of 16
    assert (folder / "loss-curve.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "Ep 1 (Step 000005): Train loss" in out
    assert "Ep 2 (Step 000015): Train loss" in out
    assert "val_data[0] before training" in out


def test_the_curve_is_the_chapters_evaluation(tmp_path: Path) -> None:
    """Mean of batch means over the first batches, against the definition written out."""
    weights = start_weights(tmp_path)
    config = write_config(
        tmp_path,
        model__weights=str(weights),
        model__optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-15}},
        trainer__max_steps=1,
        loss_curve__num_batches=2,
    )
    assert run("fit", "--config", config) == 0
    folder = tmp_path / "runs/tiny/version_0"
    data = InstructionDataModule(str(tmp_path / "data.json"), batch_size=4, max_length=128)
    model = GPTModel(GPTConfig(**TINY))
    model.load_state_dict(torch.load(weights, weights_only=True))
    for column, loader in (
        ("train_eval_loss", data.train_dataloader()),
        ("val_eval_loss", data.val_dataloader()),
    ):
        batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
        means = [
            F.cross_entropy(model(b["input_ids"]).flatten(0, 1), b["targets"].flatten()).item()
            for b in batches
        ]
        assert read_metrics(folder, column) == pytest.approx([sum(means) / len(means)], abs=1e-5)


def test_val_loss_weighs_tokens_not_batches(tmp_path: Path) -> None:
    from torchmetrics.text import Perplexity

    weights = start_weights(tmp_path)
    config = write_config(
        tmp_path,
        model__weights=str(weights),
        model__optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-15}},
        trainer__max_steps=1,
        trainer__limit_train_batches=1,
        data__fractions=[0.5, 0.2, 0.3],
    )
    assert run("fit", "--config", config) == 0
    data = InstructionDataModule(
        str(tmp_path / "data.json"), batch_size=4, max_length=128, fractions=(0.5, 0.2, 0.3)
    )
    model = GPTModel(GPTConfig(**TINY))
    model.load_state_dict(torch.load(weights, weights_only=True))
    perplexity = Perplexity(ignore_index=-100)
    batch_means = []
    for batch in data.val_dataloader():
        logits = model(batch["input_ids"])
        perplexity.update(logits, batch["targets"])
        batch_means.append(F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).item())
    expected = perplexity.compute().item()
    folder = tmp_path / "runs/tiny/version_0"
    assert read_metrics(folder, "val_perplexity") == pytest.approx([expected], rel=1e-4)
    # The negative control: on ragged rows the mean of batch means is another number.
    (val_loss,) = read_metrics(folder, "val_loss")
    assert abs(val_loss - sum(batch_means) / len(batch_means)) > 1e-5


def test_tensorboard_reads_scalars_and_samples(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("fit", "--config", write_config(tmp_path, trainer__max_epochs=1)) == 0
    events = EventAccumulator(str(tmp_path / "runs/tiny/version_0")).Reload()
    tags = events.Tags()
    wanted = {"train_loss", "val_loss", "val_perplexity", "lr", "tokens_per_second", "tokens_seen"}
    assert wanted | {"train_eval_loss", "val_eval_loss"} <= set(tags["scalars"])
    assert len(events.Scalars("train_loss")) == 8
    (text,) = (tag for tag in tags["tensors"] if tag.startswith("val_data[0]"))
    shown = events.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert "wanted: It is 38" in shown


def test_the_saved_weights_load_in_the_books_model(tmp_path: Path) -> None:
    from llms_from_scratch.ch04 import GPTModel as BookModel

    assert run("fit", "--config", write_config(tmp_path, trainer__max_epochs=1)) == 0
    folder = tmp_path / "runs/tiny/version_0"
    book = BookModel({**TINY, "vocab_size": 50257, "qkv_bias": True})
    book.load_state_dict(torch.load(folder / "gpt2-2M-sft.pth", weights_only=True))
    state = load(newest_checkpoint(folder))["state_dict"]
    ours = GPTModel(GPTConfig(**TINY))
    ours.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    ids = torch.randint(0, 50257, (2, 17), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(book.eval()(ids), ours.eval()(ids), atol=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
@pytest.mark.parametrize("kept", [True, False])
def test_memory_of_large_gradients_is_kept_from_step_to_step(kept: bool) -> None:
    """40 MB is above what glibc keeps by itself, and 9,766 pages."""
    code = (
        "import resource, sys, torch\n"
        "from lightning_sft.training.module import keep_freed_memory\n"
        "if sys.argv[1] == 'True': keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10):\n"
        "    before = faults()\n"
        "    torch.ones(10_000_000)\n"
        "    print(faults() - before)"
    )
    command = [sys.executable, "-c", code, str(kept)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    faults = min(map(int, out.split()))  # not each: a hole of the right size may come late
    assert faults < 100 if kept else faults > 9_000


@pytest.mark.slow
@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_equals_plain_with_few_graphs(
    tmp_path: Path, family: str, share_prefix: bool
) -> None:
    """Lengths change with every batch; one graph, or one more, serves them all."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    changes: dict[str, Any] = {"data__share_prefix": share_prefix, "trainer__max_epochs": 1}
    if family == "llama":  # with norms of queries and keys, as Qwen3 has
        llama = dataclasses.replace(CONFIG, qk_norm=True)
        weights = str(write_hf(tmp_path / "hf", llama))
        changes |= {"model__weights": weights, "model__architecture": dataclasses.asdict(llama)}
        changes |= {"data__prompt_style": "chatml"}
    config = write_config(tmp_path, **changes)
    assert run("fit", "--config", config, "--run.name", "plain") == 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = ["--model.compile=true", "--run.name=compiled"]
    assert run("fit", "--config", config, *compiled) == 0
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    plain, ours = (
        read_metrics(tmp_path / f"runs/{name}/version_0", "train_loss")
        for name in ("plain", "compiled")
    )
    assert ours == pytest.approx(plain, abs=1e-5)
    states = [
        load(newest_checkpoint(tmp_path / f"runs/{name}/version_0"))["state_dict"]
        for name in ("plain", "compiled")
    ]
    assert states[0].keys() == states[1].keys()  # no `_orig_mod.` in the names
