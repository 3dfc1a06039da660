"""What is watched while a model trains: sample answers, the chapter's loss curve, throughput.

All of them write into the run folder, in evaluation mode and without touching the random state, so
a run with them trains exactly like one without.

Source: `train_model_simple`, `evaluate_model`, `generate_and_print_sample` and `plot_losses` of
chapter 5, as section 7.6 uses them; "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import json
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.decoding.generation import evaluating
from lightning_sft.training.log_probs import row_log_probs
from lightning_sft.training.loggers import folder_of
from lightning_sft.training.module import SFTModule
from lightning_sft.training.plots import plot_loss_curve
from lightning_sft.training.preference_loss import PREFERENCE_METRICS
from lightning_sft.training.sharding import gather_model, is_sharded
from lightning_sft.training.steps import ends_step


class SampleResponses(L.Callback):
    """Answers chosen validation entries before the first step and after each epoch.

    The answers go, beside the wanted ones, to the terminal, to TensorBoard's text page and to
    `samples.jsonl` in the run folder.

    Args:
        indices: Entries of the validation split; the chapter shows `val_data[0]`.
    """

    def __init__(self, indices: tuple[int, ...] = (0,)) -> None:
        self.indices = tuple(indices)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:  # the chapter's baseline, not a resumed run
            self._answer(trainer, pl_module, epoch=0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._answer(trainer, pl_module, epoch=trainer.current_epoch + 1)

    def _answer(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        module, data = _ours(trainer, pl_module)
        entries = data.split("val")
        for index in self.indices:
            if not 0 <= index < len(entries):
                raise InputError(
                    f"samples.indices: {index} is not a validation entry; allowed: 0 to "
                    f"{len(entries) - 1}"
                )
        chosen = [entries[index] for index in self.indices]
        prompts = [encode_prompt(entry, module.style, module.tokenizer) for entry in chosen]
        answers = [""] * len(chosen)
        # One rank answers while the others wait; of a sharded model it gets a whole copy.
        model = gather_model(trainer, module.config) if is_sharded(trainer) else module.network
        pairs: list[dict[str, Any]] = [{} for _ in chosen]
        if model is not None:
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                answers = module.answer(prompts, model)
                if data.has_pairs:
                    pairs = [_weigh_pair(trainer, module, data, index) for index in self.indices]
        if trainer.is_global_zero:
            for index, entry, answer, pair in zip(
                self.indices, chosen, answers, pairs, strict=True
            ):
                self._write(trainer, epoch, index, entry, answer, pair)
        trainer.strategy.barrier("samples")

    def _write(
        self,
        trainer: L.Trainer,
        epoch: int,
        index: int,
        entry: Any,
        answer: str,
        pair: dict[str, Any],
    ) -> None:
        question = entry.instruction + (f" | {entry.input}" if entry.input else "")
        when = "before training" if epoch == 0 else f"after epoch {epoch}"
        _say(
            trainer,
            f"\nval_data[{index}] {when}\n  asked:  {_shown(question)}\n"
            f"  wanted: {_shown(entry.output)}\n{_describe_pair(pair)}  answer: {_shown(answer)}",
        )
        record = {
            "epoch": epoch,
            "step": trainer.global_step,
            "index": index,
            "instruction": entry.instruction,
            "input": entry.input,
            "output": entry.output,
            "response": answer,
            **pair,
        }
        folder = folder_of(trainer)
        if folder is not None:
            files.append_line(folder / "samples.jsonl", json.dumps(record, ensure_ascii=False))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = f"**{question}**\n\nwanted: {entry.output}\n\nanswer: {answer}"
                if pair:
                    text += "\n\n" + "\n\n".join(_describe_pair(pair).splitlines())
                # As all that is logged, under the number of the step before, from 0.
                step = max(trainer.global_step - 1, 0)
                logger.experiment.add_text(f"val_data[{index}]", text, step)


def _weigh_pair(
    trainer: L.Trainer, module: SFTModule, data: InstructionDataModule, index: int
) -> dict[str, Any]:
    """The rejected answer of a validation pair, and how likely the model finds both.

    A pair that takes no part in training, as one of two equal answers, has no likelihoods.
    """
    known = data.pair("val", index)
    batch = data.pair_batch("val", index)
    if batch is None:
        return {"rejected": known.rejected}
    with evaluating(module.network):
        on_device = trainer.strategy.batch_to_device(batch, module.device, 0)
        sums, counts = row_log_probs(module.network, on_device)
    names = "chosen", "rejected"
    found = {f"{name}_log_prob": float(value) for name, value in zip(names, sums, strict=True)}
    found |= {f"{name}_tokens": int(value) for name, value in zip(names, counts, strict=True)}
    return {"rejected": known.rejected, **found}


def _describe_pair(pair: dict[str, Any]) -> str:
    """Lines for a terminal; none of an entry without a rejected answer."""
    if not pair:
        return ""
    lines = [f"  rejected: {_shown(pair['rejected'])}\n"]
    if "chosen_log_prob" in pair:
        both = ", ".join(
            f"{name} {pair[f'{name}_log_prob']:.2f} "
            f"({pair[f'{name}_log_prob'] / pair[f'{name}_tokens']:.3f} a token)"
            for name in ("chosen", "rejected")
        )
        lines.append(f"  log-probability: {both}\n")
    return "".join(lines)


class LossCurve(L.Callback):
    """The chapter's own evaluation, printed as it prints it and drawn as figure 7.17.

    Every few steps the mean over batches of the first training and validation batches is taken in
    evaluation mode. It is logged as `train_eval_loss` and `val_eval_loss`; `val_loss` is another
    number, the mean over all tokens of the whole split. Of preferences the mean reward margin is
    logged and drawn beside it.

    Args:
        every_n_steps: Optimizer steps between evaluations; 0 switches the curve off.
        num_batches: Batches of each split, always the same ones: the first of epoch 0.
    """

    def __init__(self, every_n_steps: int = 5, num_batches: int = 5) -> None:
        if every_n_steps < 0 or num_batches < 1:
            raise InputError("loss_curve: every_n_steps must be >= 0 and num_batches >= 1")
        self.every_n_steps, self.num_batches = every_n_steps, num_batches
        self.points: list[dict[str, float]] = []
        self._batches: dict[str, list[Any]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_steps and trainer.global_step == 0:
            point = self._evaluate(trainer, pl_module, epoch=0.0)
            _say(
                trainer,
                f"Initial losses\n   Training loss: {point['train_loss']:.3f}\n"
                f"   Validation loss: {point['val_loss']:.3f}",
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # The chapter counts steps from 0 and evaluates after the step.
        step = trainer.global_step - 1
        at_step = ends_step(trainer, batch_idx)
        if not self.every_n_steps or not at_step or step % self.every_n_steps:
            return
        done = (batch_idx + 1) / trainer.num_training_batches
        point = self._evaluate(trainer, pl_module, trainer.current_epoch + done)
        _say(
            trainer,
            f"Ep {trainer.current_epoch + 1} (Step {step:06d}): "
            f"Train loss {point['train_loss']:.3f}, Val loss {point['val_loss']:.3f}",
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = folder_of(trainer)
        if folder is not None and trainer.is_global_zero and self.points:
            plot_loss_curve(self.points, folder / "loss-curve.png")

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: float
    ) -> dict[str, float]:
        module, data = _ours(trainer, pl_module)
        losses, margins = {}, {}
        with torch.no_grad(), evaluating(module), trainer.precision_plugin.val_step_context():
            for split in ("train", "val"):
                batches = self._first_batches(data, split)
                losses[split], margin = self._mean_loss(trainer, module, batches)
                if margin is not None:
                    margins[split] = margin
        point = {
            "epoch": epoch,
            "step": float(trainer.global_step),
            "tokens_seen": float(module.tokens_seen),
            "train_loss": losses["train"],
            "val_loss": losses["val"],
            **{f"{split}_margin": margin for split, margin in margins.items()},
        }
        self.points.append(point)
        values = {"train_eval_loss": losses["train"], "val_eval_loss": losses["val"]}
        values |= {f"{split}_eval_reward_margin": margin for split, margin in margins.items()}
        if trainer.global_step:  # numbered as the chapter does, from 0 after the first step
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)
        return point

    def _first_batches(self, data: InstructionDataModule, split: str) -> list[Any]:
        """The batches are made once; all ranks evaluate the same ones."""
        if split not in self._batches:
            self._batches[split] = list(data.first_batches(split, self.num_batches))
        return self._batches[split]

    @staticmethod
    def _mean_loss(
        trainer: L.Trainer, module: SFTModule, batches: list[Any]
    ) -> tuple[float, float | None]:
        """The mean over batches of their losses; of preferences also of their reward margins."""
        total, margin = 0.0, 0.0
        for batch in batches:
            on_device = trainer.strategy.batch_to_device(batch, module.device, 0)
            if module.objective is None:
                loss_sum, num_targets = module.sum_loss(on_device)
            else:
                loss_sum, metrics, num_targets = module.sum_pairs(on_device)
                margin += float(metrics[PREFERENCE_METRICS.index("reward_margin")] / num_targets)
            total += float(loss_sum / num_targets)
        count = len(batches)
        return total / count, None if module.objective is None else margin / count

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = list(state_dict["points"])


class Throughput(L.Callback):
    """Logs `tokens_per_second`: input tokens on all ranks over the time of training steps alone."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._begun = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._seconds += time.perf_counter() - self._begun
        self._tokens += batch["num_tokens"]
        if ends_step(trainer, batch_idx):
            rate = self._tokens / max(self._seconds, 1e-9)
            pl_module.log("tokens_per_second", rate, prog_bar=True, batch_size=1)
            self._tokens, self._seconds = 0, 0.0


def _ours(
    trainer: L.Trainer, pl_module: L.LightningModule
) -> tuple[SFTModule, InstructionDataModule]:
    """The two objects that these callbacks know how to ask."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(pl_module, SFTModule) or not isinstance(data, InstructionDataModule):
        raise InputError("these callbacks need an SFTModule and an InstructionDataModule")
    return pl_module, data


def _say(trainer: L.Trainer, text: str) -> None:
    """Print once, above a progress bar and not through it."""
    if trainer.is_global_zero:
        tqdm.write(text)


def _shown(text: str, limit: int = 300) -> str:
    """One line of a terminal; control characters would let an answer rewrite it."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"
