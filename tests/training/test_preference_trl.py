"""Preference losses beside TRL's, same ids and weights: losses, gradients, metrics, 20 steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft import DPO, SFTModule
from lightning_sft.data.batching import BatchMaker
from lightning_sft.data.pair_batching import PairBatchMaker
from lightning_sft.data.pair_rows import PairRow
from lightning_sft.data.rows import Row
from lightning_sft.models.llama_weights import to_hf
from lightning_sft.training.preference_loss import PREFERENCE_METRICS
from support.tiny_run import write_hf

pytestmark = [pytest.mark.slow, pytest.mark.process]
EOS = 258  # of the tiny tokenizer
TRL_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
               "logps/chosen", "logps/rejected")  # fmt: skip


def make_pairs(count: int, prompt: int | None = None, answer: int | None = None) -> list[PairRow]:
    """Random ids; of a fixed length where one is given."""
    draw = random.Random(5)

    def ids(most: int, length: int | None) -> list[int]:
        return [draw.randrange(32, 127) for _ in range(length or draw.randint(2, most))]

    pairs = []
    for index in range(count):
        asked, begin = ids(12, prompt), ids(4, None)
        chosen, rejected = (
            Row([*asked, *begin, *ids(9, answer and answer - len(begin))], len(asked), index)
            for _ in range(2)
        )
        pairs.append(PairRow(chosen, rejected, index))
    return pairs


def answers(row: Row) -> list[int]:
    return [*row.ids[row.prompt_length :], EOS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "model")


def our_module(folder: Path, objective: DPO) -> SFTModule:
    module = SFTModule("auto", str(folder), objective=objective, prompt_style="chatml")
    module.configure_model()
    module.train()
    return module


def our_batch(pairs: list[PairRow]) -> dict[str, Any]:
    return PairBatchMaker(BatchMaker(128, True, True, True, EOS), "train")(pairs)


def their_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dpo_trainer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Any:
    """TRL's, made for one pair of text; the pairs of ids go through its collator."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.base_trainer import _BaseTrainer

    monkeypatch.setattr(_BaseTrainer, "_send_telemetry", lambda self: None)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, max_length=None,
        disable_dropout=True, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    record = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    return trl.DPOTrainer(
        model=their_model(folder),
        ref_model=their_model(folder),
        args=arguments,
        train_dataset=Dataset.from_list([record]),
        processing_class=tokenizer,
    )


def their_loss(trainer: Any, pairs: list[PairRow]) -> torch.Tensor:
    examples = [
        {
            "prompt_ids": list(pair.chosen.ids[: pair.chosen.prompt_length]),
            "chosen_ids": answers(pair.chosen),
            "rejected_ids": answers(pair.rejected),
        }
        for pair in pairs
    ]
    return trainer.compute_loss(trainer.model, trainer.data_collator(examples))


def compare_gradients(module: SFTModule, model: Any) -> None:
    ours = to_hf({name: p.grad for name, p in module.network.named_parameters()})
    theirs = {name: p.grad for name, p in model.named_parameters()}
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= len(theirs) - 1  # a tied head has one name there
    for name in shared:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_twenty_steps_beside_its_dpo_trainer(
    loss: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = dpo_trainer(folder, tmp_path, monkeypatch, loss_type=[loss], beta=0.3)
    module = our_module(folder, DPO(beta=0.3, loss=loss))  # type: ignore[arg-type]
    trainer.model.train()
    pairs = make_pairs(8 * 20)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (module, trainer.model)]
    for step in range(20):
        part = pairs[8 * step : 8 * step + 8]
        found = module.sum_pairs(our_batch(part))
        losses = found.loss / len(part), their_loss(trainer, part)
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5, rel=1e-5), step
        for optimizer, value in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            value.backward()
        if step < 2:
            compare_gradients(module, trainer.model)
        ours = dict(zip(PREFERENCE_METRICS, (found.metrics / len(part)).tolist(), strict=True))
        logged = trainer._metrics["train"]
        for name, theirs in zip(PREFERENCE_METRICS, TRL_METRICS, strict=True):
            if loss == "ipo" and name.startswith("logps"):
                continue  # ours are the means that the loss takes, TRL's the sums
            assert ours[name] == pytest.approx(logged[theirs][-1], abs=1e-4, rel=1e-5), (step, name)
        for optimizer in optimizers:
            optimizer.step()
    assert module.reference is not None


def without_reference(name: str, **settings: Any) -> Any:
    """TRL's CPO or ORPO trainer with what its loss looks at, and no data set."""
    from accelerate import Accelerator

    if name == "simpo":
        from trl.experimental.cpo import CPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOTrainer as Trainer  # type: ignore[assignment]
    trainer = object.__new__(Trainer)
    common = {"is_encoder_decoder": False, "aux_loss_enabled": False, "label_smoothing": 0.0}
    common |= {"accelerator": Accelerator(cpu=True), "alpha": 0.0, "cpo_alpha": 0.0}
    for key, value in (common | {"pad_token_id": EOS, "padding_value": EOS} | settings).items():
        setattr(trainer, key, value)
    return trainer


def concatenated(pairs: list[PairRow]) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = {}
    for name in ("chosen", "rejected"):
        rows = [getattr(pair, name) for pair in pairs]
        width = max(len(row.ids) + 1 for row in rows)
        padded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            ids, fill = [*row.ids, EOS], width - len(row.ids) - 1
            padded["input_ids"].append(ids + [EOS] * fill)
            padded["attention_mask"].append([1] * len(ids) + [0] * fill)
            learned = [-100] * row.prompt_length + answers(row)
            padded["labels"].append(learned + [-100] * fill)
        batch |= {f"{name}_{key}": torch.tensor(value) for key, value in padded.items()}
    return batch


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_reference(loss: str, folder: Path) -> None:
    """ORPO's cross-entropy is a mean over all tokens of the batch there, the prompt's too; a mean
    of each pair's answer here. For prompts of one token and answers of one length they are one."""
    objective = DPO(beta=0.5, loss=loss, gamma=0.7)  # type: ignore[arg-type]
    trainer = without_reference(loss, beta=0.5, loss_type="simpo", simpo_gamma=0.7)
    module, model = our_module(folder, objective), their_model(folder)
    pairs = make_pairs(8, prompt=1, answer=9) if loss == "orpo" else make_pairs(8)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (module, model)]
    for step in range(20):
        found = module.sum_pairs(our_batch(pairs))
        expected, metrics = trainer.get_batch_loss_metrics(model, concatenated(pairs))
        value = found.loss / len(pairs)
        assert value.item() == pytest.approx(expected.item(), abs=1e-5), step
        ours = (found.metrics / len(pairs)).tolist()
        for mine, theirs in zip(ours, TRL_METRICS, strict=True):
            assert mine == pytest.approx(metrics[theirs], abs=1e-5), theirs
        for optimizer, loss_value in zip(optimizers, (value, expected), strict=True):
            optimizer.zero_grad()
            loss_value.backward()
        if step < 2:
            compare_gradients(module, model)
        for optimizer in optimizers:
            optimizer.step()
    assert module.reference is None
