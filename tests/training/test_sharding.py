"""A model divided among two gloo processes trains as one that is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_sft.commands.verify_resume import COMPARED, equal
from support.runs import load, newest_checkpoint, read_metrics, run, run_apart, write_config

SHARDED = ["--trainer.devices=2", "--trainer.strategy=sharded"]
RECOMPUTE = "--model.activation_checkpointing=true"


def test_a_sharded_run_equals_a_whole_one_and_goes_on_exactly(tmp_path: Path) -> None:
    settings = {
        "model__architecture__tie_embeddings": True,
        "trainer__max_epochs": 1,
        "checkpoints": {"every_n_steps": 3, "keep_last": 9},
    }
    config = write_config(tmp_path, **settings)
    assert run("fit", "--config", config, "--run.name", "whole") == 0
    options = [*SHARDED, RECOMPUTE, "--data.batch_size=2", "--run.name=sharded"]
    code, _, err = run_apart("fit", "--config", config, *options, cwd=tmp_path)
    assert code == 0, err

    whole, sharded = (tmp_path / f"runs/{name}/version_0" for name in ("whole", "sharded"))
    for column in ("train_loss", "val_loss", "train_eval_loss"):
        ours = read_metrics(sharded, column)
        if column == "train_eval_loss":  # of the first five batches, which are smaller here
            assert len(ours) == 2
        else:
            assert ours == pytest.approx(read_metrics(whole, column), abs=1e-5), column
    one, two = load(newest_checkpoint(whole)), load(newest_checkpoint(sharded))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.allclose(two["state_dict"][name], tensor, atol=1e-5), name
    weights = torch.load(next(sharded.glob("*-sft.pth")), weights_only=True)
    assert torch.equal(weights["tok_emb.weight"], two["state_dict"]["model.tok_emb.weight"])
    assert (sharded / "samples.jsonl").read_text().count("\n") == 2

    # Back to step 3 and on to the end: the same bits.
    middle = sharded / "checkpoints/step-000003.ckpt"
    code, _, err = run_apart("fit", "--ckpt_path", middle, cwd=tmp_path)
    assert code == 0, err
    again = load(newest_checkpoint(sharded))
    assert [key for key in COMPARED if not equal(again[key], two[key])] == []

    # One device loads the same file and answers; many at once do not.
    code, _, err = run_apart("predict", "--ckpt_path", middle, cwd=tmp_path)
    assert code == 2
    assert "error: trainer.strategy: predict needs the whole model on each device" in err
    one_device = ["--trainer.devices=1", "--trainer.strategy=auto"]
    assert run("predict", "--ckpt_path", middle, *one_device) == 0


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_epochs=1, model__architecture__drop_rate=0.1)
    assert run("fit", "--config", config, "--run.name", "kept") == 0
    assert run("fit", "--config", config, RECOMPUTE, "--run.name", "recomputed") == 0
    kept, recomputed = (
        load(newest_checkpoint(tmp_path / f"runs/{name}/version_0"))
        for name in ("kept", "recomputed")
    )
    assert equal(kept["state_dict"], recomputed["state_dict"])
