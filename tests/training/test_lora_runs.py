"""LoRA through the command line: what a checkpoint holds, resuming, answering, and refusals."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lightning_sft.commands.verify_resume import equal
from lightning_sft.common.errors import InputError
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.loading import load_weights
from lightning_sft.models.lora import LoRAConfig, is_adapter, merge_lora
from lightning_sft.models.lora_checkpoint import identify_base
from lightning_sft.models.ready import load_for_answers
from lightning_sft.models.registry import get_config
from lightning_sft.training.module import SFTModule
from support.resuming import fit_until_done, stop_before
from support.runs import (
    TINY,
    load,
    newest_checkpoint,
    read_metrics,
    run,
    run_apart,
    write_config,
    write_data,
)

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["*"]}
RESPONSES = "instruction-data-with-response.json"


class Trained(NamedTuple):
    """A full run of one epoch, and a LoRA run beside its weights."""

    folder: Path
    full: Path
    base: Path
    config: Path
    run: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("lora")
    quiet: dict[str, Any] = {"trainer__max_epochs": 1, "loss_curve__every_n_steps": 0}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
    config = write_config(folder, run__name="full", model__optimizer=optimizer, **quiet)
    assert run("fit", "--config", config) == 0
    base = folder / "runs/full/version_0/gpt2-2M-sft.pth"
    config = write_config(
        folder, model__weights=str(base), model__lora=LORA, model__optimizer=optimizer, **quiet
    )
    assert run("fit", "--config", config) == 0
    return Trained(
        folder, newest_checkpoint(base.parent), base, config, folder / "runs/tiny/version_0"
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_a_checkpoint_holds_adapters_and_what_they_belong_to(trained: Trained) -> None:
    path = newest_checkpoint(trained.run)
    content = load(path)
    assert all(map(is_adapter, content["state_dict"]))
    assert len(content["state_dict"]) == 2 * 13
    settings = content["hyper_parameters"]
    assert (settings["lora"], settings["weights"]) == (LORA, str(trained.base))
    base = GPTModel(get_config(TINY))
    load_weights(base, str(trained.base))
    assert content["base"] == identify_base(base)
    # Adapters and AdamW's two moments of them; the rest is a few kilobytes a tensor.
    numbers = sum(tensor.numel() for tensor in content["state_dict"].values())
    assert 12 * numbers < path.stat().st_size < 12 * numbers + 100_000
    assert content["optimizer_states"][0]["state"].keys() == set(range(26))


def test_every_way_to_the_answers_gives_the_same_ones(trained: Trained, tmp_path: Path) -> None:
    """The checkpoint, a copy of it far from its run, and the merged .pth; predict and chat."""
    checkpoint, merged = newest_checkpoint(trained.run), trained.run / "gpt2-2M-sft.pth"
    away = Path(shutil.copy(checkpoint, tmp_path / "away.ckpt"))
    data = ["--data.path", trained.folder / "data.json", "--data.max_length", "128"]
    data += [
        "--generation.max_new_tokens",
        "8",
        "--run.dir",
        tmp_path / "runs",
        "--trainer.accelerator",
        "cpu",
    ]
    places = {checkpoint: trained.run, merged: tmp_path / "runs/config/version_0"}
    places[away] = tmp_path / "runs/run/version_0"
    answers = []
    for source, place in places.items():
        assert run("predict", "--ckpt_path", source, *data) == 0
        found = list(tmp_path.rglob(RESPONSES)) + list(trained.run.glob(RESPONSES))
        assert len(found) == 1, (place, found)
        answers.append(json.loads(found[0].read_text()))
        found[0].unlink()
    assert answers[0] == answers[1] == answers[2]
    input_ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [load_for_answers(str(source))[0](input_ids) for source in places]
        module = SFTModule(TINY, str(trained.base), load(checkpoint)["hyper_parameters"]["lora"])
        module.network.load_state_dict(
            {n.removeprefix("model."): t for n, t in load(checkpoint)["state_dict"].items()}, False
        )
        unmerged = module.eval()(input_ids)
        base = load_for_answers(str(trained.base))[0](input_ids)
    for found in logits:
        torch.testing.assert_close(found, unmerged, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base, unmerged, atol=1e-3)


def test_validate_gives_the_loss_of_the_run(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("validate", "--ckpt_path", newest_checkpoint(trained.run)) == 0
    out = capsys.readouterr().out
    shown = float(next(line for line in out.splitlines() if "val_loss" in line).split("│")[2])
    assert shown == pytest.approx(read_metrics(trained.run, "val_loss")[-1], abs=1e-5)


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with dropout in the adapters and in the model."""
    stops = (4, 6)  # at the first step of the second epoch, and behind a checkpoint in it
    config = write_config(
        tmp_path,
        data__path=str(write_data(tmp_path / "data.json", 20)),
        model__lora=LORA,
        model__architecture__drop_rate=0.1,
        model__lr_scheduler={"class_path": "lightning_sft.WarmupCosine"},
        checkpoints__every_n_steps=1,
        loss_curve__every_n_steps=3,
    )
    assert run("fit", "--config", config) == 0
    stop_before(monkeypatch, *stops)
    config.write_text(config.read_text().replace("name: tiny", "name: stopped"))
    assert fit_until_done(config) == len(stops) + 1
    whole, resumed = tmp_path / "runs/tiny/version_0", tmp_path / "runs/stopped/version_0"
    expected, got = load(newest_checkpoint(whole)), load(newest_checkpoint(resumed))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "tokens_seen", "base"):
        assert equal(got[key], expected[key]), key
    assert any(tensor.any() for name, tensor in got["state_dict"].items() if "lora_b" in name)
    for column in ("train_loss", "val_loss", "val_eval_loss"):
        assert read_metrics(resumed, column) == read_metrics(whole, column), column
    states = [load(folder / "gpt2-2M-sft.pth") for folder in (whole, resumed)]
    assert equal(*states)


def test_another_base_is_refused_by_name(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = newest_checkpoint(trained.run)
    state = load(trained.base)
    state["trf_blocks.0.ff.layers.0.bias"][0] += 1e-4
    torch.save(state, other := tmp_path / "other.pth")
    error = refused(
        capsys, "predict", "--ckpt_path", checkpoint, "--model.weights", other,
        "--run.dir", tmp_path / "runs",
    )  # fmt: skip
    assert f"trained beside the weights {trained.base} (float32, sha256 " in error
    assert f"but model.weights are the weights {other} (float32, sha256 " in error
    error = refused(capsys, "chat", "--ckpt_path", checkpoint, "--weights", other)
    assert str(other) in error
    error = refused(capsys, "validate", "--ckpt_path", checkpoint, "--model.weights", "null")
    assert "but model.weights are random weights" in error
    # The check is what refuses: without it the wrong base would go through.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sft.training.module.check_adapters", lambda *args: None)
        assert run("validate", "--ckpt_path", checkpoint, "--model.weights", other) == 0
    # Moved but the same: it is the content that counts.
    moved = shutil.copy(trained.base, tmp_path / "moved.pth")
    assert run("validate", "--ckpt_path", checkpoint, "--model.weights", moved) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "does not say which weights its adapters belong to"),
        ({"base": {"sha256": 5, "dtype": "load"}}, "its adapters were trained beside"),
        ({"lora": {"rank": "x", "targets": ["*"]}}, "its model.lora is {'rank': 'x'"),
        ({"lora": {"rank": 4}}, "its model.lora is {'rank': 4}"),
        ({"lora": "yes"}, "its model.lora is 'yes'"),
        ({"state": float("nan")}, "holds NaN or infinity"),
        ({"state": "text"}, "1 adapters differ from what model.lora makes"),
    ],
)
def test_a_tampered_checkpoint_is_refused(
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    content = load(newest_checkpoint(trained.run))
    if "base" in change:
        content["base"] = change["base"]
    elif "lora" in change:
        content["hyper_parameters"]["lora"] = change["lora"]
    else:
        name = "model.out_head.lora_a"
        value = change["state"]
        content["state_dict"][name] = (
            value if isinstance(value, str) else content["state_dict"][name].fill_(value)
        )
    torch.save(content, path := tmp_path / "tampered.ckpt")
    assert message in refused(capsys, "chat", "--ckpt_path", path)


def test_merged_adapters_are_not_trained_on(trained: Trained) -> None:
    module = SFTModule(TINY, str(trained.base), LoRAConfig())
    merge_lora(module.network)
    with pytest.raises(InputError, match="merged to answer; load the checkpoint again"):
        module.configure_optimizers()


def test_random_weights_are_made_again_from_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model__lora=LORA, trainer__max_steps=2)
    assert run("fit", "--config", config) == 0
    checkpoint = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    assert load_for_answers(str(checkpoint))[0].config == get_config(TINY)
    error = refused(capsys, "validate", "--ckpt_path", checkpoint, "--seed_everything", "4")
    assert "trained beside random weights of seed 123" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.lora=null"],
            "LoRA adapters; add --config lora-peft.yaml, or --model.lora '{",
        ),
        (["--model.lora.scaling=alpha"], "model.lora.scaling alpha_over_rank, the configuration"),
        (["--model.lora.rank=8"], "trained with model.lora.rank 4, the configuration has 8"),
        (["--model.lora.alpha=4"], "trained with model.lora.alpha 8.0, the configuration has 4.0"),
        (["--model.lora.targets=[out_head]"], "trained with model.lora.targets ['*'], the conf"),
        (["--model.lora.targets=[q_proj]"], "trained with model.lora.targets"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_other_adapters_are_refused(
    trained: Trained,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arguments: list[str],
    message: str,
) -> None:
    checkpoint = newest_checkpoint(trained.run)
    assert message in refused(capsys, command, "--ckpt_path", checkpoint, *arguments)


def test_whole_weights_are_no_adapters_and_adapters_no_weights(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "fit", "--config", trained.config, "--ckpt_path", trained.full)
    assert "holds whole weights and no adapters; leave model.lora out, or give it as" in error
    adapters = newest_checkpoint(trained.run)
    anew = ["--config", trained.config, "--run.dir", tmp_path / "runs"]
    error = refused(capsys, "fit", *anew, "--model.weights", adapters)
    assert "holds LoRA adapters and not the weights they belong to" in error
    error = refused(capsys, "fit", *anew, "--model.lora.targets=[q_proj]")
    assert "'q_proj' matches no layer" in error
    error = refused(capsys, "fit", *anew, "--model.lora.rnk=8")
    assert error == "error: fit: Parser key \"model.lora\": Option 'rnk' is not accepted"
    error = refused(capsys, "fit", *anew, "--model.lora.rank=0")
    assert error == "error: model.lora.rank: 0 is not allowed; it must be >= 1"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("source", ["full", "base", "merged"])
def test_any_whole_weights_can_be_the_base(trained: Trained, tmp_path: Path, source: str) -> None:
    """A full checkpoint, a .pth, and what an earlier LoRA run left."""
    weights = {"full": trained.full, "base": trained.base}.get(
        source, trained.run / "gpt2-2M-sft.pth"
    )
    config = write_config(
        tmp_path, model__lora=LORA, model__weights=str(weights), trainer__max_steps=1
    )
    assert run("fit", "--config", config) == 0
    folder = tmp_path / "runs/tiny/version_0"
    assert run("validate", "--ckpt_path", newest_checkpoint(folder)) == 0


def test_a_tied_model_trains_answers_and_leaves_an_untied_one(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, model__architecture__tie_embeddings=True, model__lora=LORA, trainer__max_steps=3
    )
    assert run("fit", "--config", config) == 0
    folder = tmp_path / "runs/tiny/version_0"
    state = load(folder / "gpt2-2M-sft.pth")
    assert not torch.equal(state["out_head.weight"], state["tok_emb.weight"])
    with torch.device("meta"):
        base = SFTModule(TINY | {"tie_embeddings": True}, weights=None)
    assert torch.equal(state["tok_emb.weight"], base.network.tok_emb.weight)
    input_ids, logits = torch.arange(30)[None], []
    for path in (newest_checkpoint(folder), folder / "gpt2-2M-sft.pth"):
        model, _ = load_for_answers(str(path))
        assert not model.config.tie_embeddings
        logits.append(model(input_ids))
        assert run("predict", "--ckpt_path", path) == 0
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_two_ranks_train_the_adapters_of_one(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.json", 24)
    states = {}
    for name, size, options in (
        ("alone", 4, []),
        ("ranks", 2, ["--trainer.devices=2", "--trainer.strategy=ddp"]),
    ):
        config = write_config(
            tmp_path,
            data__path=str(data),
            data__batch_size=size,
            model__lora=LORA | {"dropout": 0.0},
            trainer__max_steps=3,
            trainer__limit_val_batches=0,
            loss_curve__every_n_steps=0,
            samples__indices=[],
            run__name=name,
        )
        if options:
            code, _, error = run_apart("fit", "--config", config, *options, cwd=tmp_path)
            assert code == 0, error
        else:
            assert run("fit", "--config", config) == 0
        states[name] = load(newest_checkpoint(tmp_path / "runs" / name / "version_0"))
    assert states["alone"]["base"] == states["ranks"]["base"]
    for name, tensor in states["alone"]["state_dict"].items():
        torch.testing.assert_close(states["ranks"]["state_dict"][name], tensor, atol=1e-5, rtol=0)


def test_chat_answers_from_adapters(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = []
    for path in (newest_checkpoint(trained.run), trained.run / "gpt2-2M-sft.pth"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Say the number 3\n"))
        assert run("chat", "--ckpt_path", path, "--generation.max_new_tokens=6") == 0
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1]


def test_loading_from_python(trained: Trained) -> None:
    module = SFTModule.load_from_checkpoint(newest_checkpoint(trained.run), weights_only=True)
    saved = read_checkpoint(newest_checkpoint(trained.run))["state_dict"]
    assert module.lora is not None
    for name, tensor in saved.items():
        assert torch.equal(module.state_dict()[name], tensor)


def test_plan_and_inspect_take_the_overlay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    both = ["--config", config, "--config", "lora.yaml"]
    assert run("plan", *both, "--probe_steps=0") == 0
    assert "parameters   4,069,072, 823,056 of them trained" in capsys.readouterr().out
    assert run("inspect", *both) == 0
