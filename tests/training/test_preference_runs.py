"""Whole runs on preferences: however cut, killed and resumed, beside each kind of reference."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_sft import DPO, InstructionDataModule, SFTModule
from lightning_sft.commands.verify_resume import compare_runs
from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import BatchMaker
from lightning_sft.data.pair_batching import PairBatchMaker
from lightning_sft.data.pair_rows import PairRow
from lightning_sft.data.rows import Span
from lightning_sft.models.lora import LoRAConfig
from lightning_sft.training.loggers import PREFERENCE_COLUMNS, RunFolder
from lightning_sft.training.preference_loss import PREFERENCE_METRICS
from lightning_sft.training.reference import FILE_NAME
from support.pairs import plain_log_probs, settings_for_pairs, write_pairs
from support.plain import make_trainer, train
from support.resuming import killed_behind
from support.runs import load, newest_checkpoint, read_metrics, run, run_apart, write_config

pytestmark = pytest.mark.process  # trains whole runs
TINY = {"emb_dim": 8, "n_heads": 2, "n_layers": 1, "context_length": 128, "drop_rate": 0.0}
DATA: dict[str, Any] = {
    "format": "preference", "mask_prompt": True, "max_length": 128, "fractions": (0.8, 0.1, 0.1)
}  # fmt: skip
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def make_module(objective: DPO, **settings: Any) -> SFTModule:
    return SFTModule(
        dict(TINY),
        None,
        objective=objective,
        max_length=128,
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-2),
        **settings,
    )


def fit(
    folder: Path,
    objective: DPO,
    data: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[list[float], dict[str, float]]:
    """Losses of each step, and what the last validation found."""
    path = folder / "pairs.json"
    if not path.exists():
        write_pairs(path, 30)
    made = InstructionDataModule(str(path), **(DATA | {"batch_size": 8} | (data or {})))
    torch.manual_seed(0)
    seen: list[float] = []
    model = make_module(objective, **(module or {}))
    log = model._log_step
    model._log_step = lambda loss, batch: (seen.append(float(loss)), log(loss, batch))  # type: ignore[method-assign]
    trained = make_trainer(max_epochs=2, **({"precision": "64-true"} | trainer))
    trained.fit(model, datamodule=made)
    return seen, {name: float(value) for name, value in trained.callback_metrics.items()}


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_a_step_does_not_depend_on_how_its_pairs_are_cut(loss: str, tmp_path: Path) -> None:
    expected, found = fit(tmp_path, DPO(beta=0.5, loss=loss))
    assert len(expected) == 6
    for settings, accumulate in (
        ({"batch_size": 4}, 2),
        ({"batch_size": 8, "padding_free": True}, 1),
        ({"batch_size": 8, "share_prefix": True}, 1),
        ({"batch_size": 1, "share_prefix": True}, 8),
    ):
        losses, metrics = fit(
            tmp_path, DPO(beta=0.5, loss=loss), settings, accumulate_grad_batches=accumulate
        )
        assert losses == pytest.approx(expected, abs=1e-10)
        for name in ("val_loss", *(f"val_{name}" for name in PREFERENCE_METRICS)):
            assert metrics[name] == pytest.approx(found[name], abs=1e-10), name


def test_one_value_of_everything_that_is_watched(tmp_path: Path) -> None:
    losses, metrics = fit(tmp_path, DPO())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-12)
    assert losses[-1] < losses[0]
    assert {*PREFERENCE_METRICS, "val_loss", "train_loss"} <= metrics.keys()
    assert "val_perplexity" not in metrics
    for split in ("", "val_"):
        margin = metrics[f"{split}reward_chosen"] - metrics[f"{split}reward_rejected"]
        assert metrics[f"{split}reward_margin"] == pytest.approx(margin)
        assert 0.5 < metrics[f"{split}reward_accuracy"] <= 1.0


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["full", "lora"])
def test_references_agree(lora: LoRAConfig | None, tmp_path: Path) -> None:
    """A frozen copy or adapters off, and the same numbers from a file: losses within 1e-6."""
    module = {"lora": lora}
    expected, _ = fit(tmp_path, DPO(), module=module, precision="32-true")
    ahead = DPO(reference="precomputed")
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):  # computed, then read
        path = write_pairs(tmp_path / "pairs.json", 30)
        model = make_module(ahead, **module)
        seen: list[float] = []
        log = model._log_step
        model._log_step = lambda loss, batch, log=log, seen=seen: (  # type: ignore[method-assign,misc]
            seen.append(float(loss)), log(loss, batch)
        )  # fmt: skip
        trainer = make_trainer(folder, max_epochs=2, precision="32-true")
        trainer.fit(model, datamodule=InstructionDataModule(str(path), **DATA, batch_size=8))
        assert seen == pytest.approx(expected, abs=1e-6)
        assert model.reference is not None
        assert model.reference.frozen is None  # let go
        if lora is None:
            with pytest.raises(InputError, match="are of train and val alone"):
                model.reference.log_probs(model.network, {"split": "test"})
    assert (tmp_path / "run" / FILE_NAME).is_file()


def test_precomputed_numbers_of_other_weights_are_computed_anew(tmp_path: Path) -> None:
    path, folder = write_pairs(tmp_path / "pairs.json", 30), RunFolder(tmp_path / "run")
    for seed, expected in ((123, math.log(2)), (7, math.log(2))):
        model = make_module(DPO(reference="precomputed"), seed=seed)
        trainer = make_trainer(folder, max_steps=1, limit_val_batches=0)
        trainer.fit(model, datamodule=InstructionDataModule(str(path), **DATA, batch_size=8))
        assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["model", "precomputed", "lora"])
def test_killed_and_resumed_equals_whole(name: str, tmp_path: Path) -> None:
    reference: Any = "precomputed" if name == "precomputed" else "model"
    options: dict[str, Any] = {
        "max_epochs": 2,
        "data": DATA | {"share_prefix": True},
        "module": {
            "objective": DPO(reference=reference),
            "lora": LoRAConfig(rank=2) if name == "lora" else None,
        },
        "checkpoints": {"every_n_steps": 1, "keep_last": 2},
    }
    broken, whole = tmp_path / "broken/version_0", tmp_path / "whole/version_0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.plain.TINY", TINY)
        for folder in (broken, whole):
            folder.parent.mkdir()
            write_pairs(folder.parent / "data.json", 30)
        train(whole, **options)
        with killed_behind("save", 3):
            train(broken, **options)
        train(broken, **options)
    assert compare_runs(broken, whole) == []


# --- the book's ---


def spans_of_the_book(pair: PairRow) -> PairRow:
    """Its mask begins two tokens behind the prompt and leaves out the end-of-text token."""
    chosen, rejected = (
        row._replace(spans=[Span(row.prompt_length + 2, len(row.ids))])
        for row in (pair.chosen, pair.rejected)
    )
    return pair._replace(chosen=chosen, rejected=rejected)


def test_step_by_step_equal_to_a_plain_form_of_the_books(book_data_path: Path) -> None:
    """Its 1,100 pairs, splits, prompt, mask and loss, written out with whole logits."""
    path = book_data_path.with_name("instruction-data-with-preference.json")
    if not path.exists():
        pytest.skip("needs the book's preference file beside the chapter's")
    data = InstructionDataModule(
        str(path), format="preference", mask_prompt=True, header_in_prompt=False,
        equal_answers="keep", max_length=256,
    )  # fmt: skip
    assert [len(data.pairs(split)) for split in ("train", "test", "val")] == [935, 110, 55]
    eos = data.tokenizer.eos_token_id
    make = PairBatchMaker(BatchMaker(256, True, True, True, eos), "train")
    objective = DPO(average=True)
    architecture = TINY | {"context_length": 256}
    modules = [
        SFTModule(dict(architecture), None, objective=objective, header_in_prompt=False)
        for _ in range(3)
    ]
    for module in modules:
        module.configure_model()
        module.double()
    ours, (plain, frozen) = modules[0], [module.network for module in modules[1:]]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (ours, plain)]
    losses = []
    for micro_batch in data.order(8).plan(0)[:6]:
        pairs = [spans_of_the_book(data.pairs("train")[place]) for place in micro_batch[0]]
        found = ours.sum_pairs(make(pairs))
        policy, tokens = plain_log_probs(plain, pairs, eos, learns_end=False)
        with torch.no_grad():
            reference, _ = plain_log_probs(frozen, pairs, eos, learns_end=False)
        means, means_before = policy / tokens, reference / tokens
        chosen, rejected = (means - means_before).unbind(1)
        expected = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        metrics = (found.metrics / len(pairs)).tolist()
        assert metrics[:2] == pytest.approx([chosen.mean().item(), rejected.mean().item()])
        losses.append((found.loss.item() / len(pairs), expected.item()))
        for optimizer, loss in zip(optimizers, (found.loss / len(pairs), expected), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert round(losses[0][0], 4) == 0.6931
    assert losses[-1][0] < 0.6931
    for one, other in losses:
        assert one == pytest.approx(other, abs=1e-10)


# --- the command line ---


def test_a_run_says_and_keeps_what_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "pairs.json", 30, equal=(3, 27))
    config = write_config(
        tmp_path, **settings_for_pairs(data__path=str(data), trainer__max_epochs=1)
    )
    assert run("fit", "--config", config) == 0
    out = capsys.readouterr().out
    assert "train split: 1 pairs of two equal answers are left out: 3\n" in out
    assert "val split: 1 pairs of two equal answers are left out: 0\n" in out
    assert "data: 23 training, 2 validation and 3 test pairs" in out
    assert "rejected: It is 27, my friend. Indeed. Indeed. Indeed." in out
    folder = tmp_path / "runs/tiny/version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == PREFERENCE_COLUMNS
    assert len(read_metrics(folder, "reward_margin")) == 5
    assert len(read_metrics(folder, "val_reward_accuracy")) == 1
    assert len(read_metrics(folder, "val_eval_reward_margin")) == 1
    assert (folder / "loss-curve.png").is_file()
    # Validation, further training and answers take the run's checkpoint as any other.
    checkpoint = newest_checkpoint(folder)
    assert run("validate", "--ckpt_path", checkpoint) == 0
    assert "val_reward_accuracy" in capsys.readouterr().out
    assert run("predict", "--ckpt_path", checkpoint) == 0
    assert run("fit", "--ckpt_path", checkpoint, "--trainer.max_epochs", 2) == 0
    assert len(read_metrics(folder, "reward_margin")) == 10
    for changes, message in (
        (["--model.objective.init_args.beta=0.2"], "was trained with model.objective {'beta': 0.1"),
        (["--seed_everything=7"], "its reference has the sha256"),
        (["--data.max_length=64"], "max_length was 128, is 64"),
    ):
        assert run("fit", "--ckpt_path", newest_checkpoint(folder), *changes) == 2
        assert message in capsys.readouterr().err


def test_samples_say_how_likely_both_answers_are(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.json", 30)
    settings = settings_for_pairs(data__path=str(data), trainer__max_epochs=1)
    assert run("fit", "--config", write_config(tmp_path, **settings)) == 0
    lines = (tmp_path / "runs/tiny/version_0/samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2
    for record in records:
        assert record["output"] != record["rejected"]
        assert record["chosen_log_prob"] < 0 > record["rejected_log_prob"]
        assert record["chosen_tokens"] > record["rejected_tokens"] > 0


GOOD = {"prompt": "Q", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__mask_prompt": False}, "data.mask_prompt: false is not allowed with preferences"),
        ({"model__objective": {"class_path": "lightning_sft.DPO", "init_args": {"beta": 0}}},
         "error: model.objective.beta: 0.0 is not allowed; it must be positive and finite"),
        ({"data__format": "messages"}, "data.format: messages holds no chosen and rejected"),
        ({"data__max_tokens": 500}, "data.max_tokens: not with preferences"),
        ({"model__objective": None}, "holds preferences (chosen and rejected), which supervised"),
        ({"data__overlong": "error", "data__max_length": 30}, "train split: pair 0 has 41 tokens"),
        ({"data__equal_answers": "error"}, "the two answers of 1 pairs are equal: 3"),
        ({"data__max_length": 20}, "has an answer that data.max_length 20 cuts away"),
        ({"trainer__strategy": "sharded"}, "preference tuning is not done on a sharded model"),
    ],
)  # fmt: skip
def test_what_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "pairs.json", 30, equal=(3,))
    settings = settings_for_pairs(data__path=str(data)) | changes
    assert run("fit", "--config", write_config(tmp_path, **settings)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Q", "chosen": "yes"}, "entry 1: 'rejected' is missing"),
        (GOOD | {"chosen": " "}, "entry 1: 'chosen' is blank; it must hold an answer"),
    ],
)
def test_bad_records(
    record: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([GOOD, record, *[GOOD] * 20]))
    config = write_config(tmp_path, **settings_for_pairs(data__path=str(path)))
    assert run("fit", "--config", config) == 2
    assert message in capsys.readouterr().err


def test_a_reference_of_another_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = write_pairs(tmp_path / "pairs.json", 30), tmp_path / "other.pth"
    module = SFTModule(TINY | {"emb_dim": 16}, None)
    torch.save(module.network.state_dict(), other)
    init_args = {"reference_weights": str(other)}
    objective = {"class_path": "lightning_sft.DPO", "init_args": init_args}
    settings = settings_for_pairs(data__path=str(data), model__objective=objective)
    assert run("fit", "--config", write_config(tmp_path, **settings)) == 2
    error = capsys.readouterr().err
    assert "model.objective.reference_weights: " in error
    assert error.count("\n") == 1


def test_commands_that_know_no_pairs_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "pairs.json", 30)
    config = write_config(tmp_path, **settings_for_pairs(data__path=str(data)))
    for command, message in (("plan", "does not count preference tuning"),
                             ("inspect", "counts no preferences")):  # fmt: skip
        assert run(command, "--config", config) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(tmp_path: Path) -> None:
    """24 pairs in steps of eight, and a last one of which a rank has only a repeat."""
    states, losses = {}, {}
    data = write_pairs(tmp_path / "pairs.json", 31)
    for name, size, two in (("one", 8, []), ("two", 4, TWO)):
        settings = settings_for_pairs(
            data__path=str(data), data__batch_size=size, data__drop_last=False, run__name=name,
            trainer__precision="64-true", trainer__max_epochs=1, loss_curve__every_n_steps=0,
            samples__indices=[], data__fractions=[0.81, 0.09, 0.1],
        )  # fmt: skip
        config = write_config(tmp_path, **settings)
        code, _, error = run_apart("fit", "--config", config, *two, cwd=tmp_path)
        assert code == 0, error
        folder = tmp_path / "runs" / name / "version_0"
        states[name] = load(newest_checkpoint(folder))["state_dict"]
        losses[name] = [
            read_metrics(folder, column) for column in ("train_loss", "val_loss", "reward_margin")
        ]
    for one, other in zip(losses["one"], losses["two"], strict=True):
        assert other == pytest.approx(one, abs=1e-10)
    for key, value in states["one"].items():
        assert torch.allclose(states["two"][key], value, rtol=0, atol=1e-10), key
