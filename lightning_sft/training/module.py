"""The LightningModule: batch → loss, metrics, optimizer, schedule.

The loss of an optimizer step is the sum over its supervised tokens divided by their number, over
all micro-batches of the accumulation window and all ranks. Cutting the same entries into other
batches therefore gives the same update; averaging each micro-batch first, as is usual, does not.
On one device without accumulation it is exactly the chapter's loss. With an objective of
preferences the same holds of pairs instead of tokens.

Source: `calc_loss_batch` and `train_model_simple` of chapters 5 and 7 of "Build a Large Language
Model (From Scratch)".
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.data.batching import IGNORE_INDEX
from lightning_sft.data.encoding import check_style
from lightning_sft.data.loader import Batch, TrainLoader, accumulation_plan
from lightning_sft.data.prompts import PromptStyle, get_style
from lightning_sft.data.template import bind_style
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.decoding.generation import GenerationConfig, generate
from lightning_sft.models.files import locate
from lightning_sft.models.found_config import check_config, settle_config
from lightning_sft.models.gguf_file import note_quantized
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.layers import run_block
from lightning_sft.models.loading import load_weights, make_model
from lightning_sft.models.lora import (
    LoRAConfig,
    add_lora,
    has_lora,
    is_adapter,
    merge_lora,
)
from lightning_sft.models.lora_checkpoint import check_adapters, identify_base
from lightning_sft.models.prepacked import discard_prepacked, prepack
from lightning_sft.models.registry import family_of
from lightning_sft.models.tokenizer import check_tokenizer, find_tokenizer
from lightning_sft.training.callback_check import check_callbacks
from lightning_sft.training.data_check import check_data
from lightning_sft.training.fused import fuse
from lightning_sft.training.host_memory import keep_freed_memory
from lightning_sft.training.lightning_internals import (
    batches_done,
    given_train_loader,
    set_logged_step,
    settle_place,
)
from lightning_sft.training.log_probs import adapter_of, supervised_states
from lightning_sft.training.loss import sum_cross_entropy
from lightning_sft.training.objectives import DPO
from lightning_sft.training.pair_sums import PairMeans, PairSums, sum_pairs
from lightning_sft.training.preference_loss import PREFERENCE_METRICS
from lightning_sft.training.reference import Reference, check_objective, make_reference
from lightning_sft.training.schedule import WarmupCosine
from lightning_sft.training.sharding import shard
from lightning_sft.training.steps import count_steps_ahead, ends_step, is_time_up


class SFTModule(L.LightningModule):
    """Instruction fine-tuning of a `GPTModel`.

    Args:
        architecture: `gpt2-small`, `-medium`, `-large`, `-xl`, `smollm2-135m` and its kin, a
            mapping of `GPTConfig` or `LlamaConfig` fields, or `auto`: what the weights say.
        weights: Where the model starts: a name as above or of the Hugging Face hub (owner/name,
            owner/name@revision), a path (folder, .safetensors, .pth, .ckpt, .gguf), or null for
            random weights.
        lora: Freeze the weights and train adapters beside them; a checkpoint then holds these.
        objective: `lightning_sft.DPO` learns from preferences; null is supervised fine-tuning.
        optimizer: Any of `torch.optim`; fused where the device has it.
        lr_scheduler: Any of `torch.optim.lr_scheduler`, or `lightning_sft.WarmupCosine`. Stepped
            after every optimizer step (`ReduceLROnPlateau`: after every validation).
        activation_checkpointing: Keep only each block's input and compute the rest again in the
            backward pass: a third more work, a fraction of the activations' memory.
        compile: Have torch.compile fuse what lies between a block's matrix products in training;
            needs a C++ compiler on CPUs, and a minute for the first step.
        prompt_style, header_in_prompt: As in the data; the checkpoint keeps them, so that answers
            are asked for as they were trained.
        max_length: The data's; checked against the model's context.
        generation: How answers are written.
        seed: Of random weights and dropout.
        tokenizer: A folder with tokenizer.json, a name of the hub, or a GGUF, where it is not with
            the weights. GPT-2 has its own.
    """

    def __init__(
        self,
        architecture: str | dict[str, Any] = "gpt2-medium",
        weights: str | None = "gpt2-medium",
        lora: LoRAConfig | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=5e-5, weight_decay=0.1
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        *,
        activation_checkpointing: bool = False,
        compile: bool = False,
        prompt_style: str | dict[str, str] = "alpaca",
        header_in_prompt: bool = True,
        max_length: int | None = None,
        generation: GenerationConfig | None = None,
        seed: int = 123,
        tokenizer: str | None = None,
        objective: DPO | None = None,
    ) -> None:
        super().__init__()
        # A checkpoint's hyperparameters are plain mappings.
        self.lora = LoRAConfig(**lora) if isinstance(lora, Mapping) else lora
        self.objective = DPO.of(objective)
        if isinstance(generation, Mapping):
            generation = GenerationConfig(**generation)
        self.generation = generation or GenerationConfig()
        self.config: Any = settle_config(architecture, weights)
        self.tokenizer: Tokenizer = self.find_tokenizer(tokenizer, weights)
        style = get_style(prompt_style, header_in_prompt)
        self.style: PromptStyle = bind_style(style, self.tokenizer)
        self.tokenizer_source = tokenizer or weights
        self.weights, self.seed = weights, seed
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile
        self._check_settings(max_length)
        self.save_hyperparameters(self._plain_settings(), logger=False)

        self.model: GPTModel | None = None  # made by `configure_model`
        # Adapters are of use only beside the weights they were trained with: what identifies those.
        self.base: dict[str, str] = {}
        self.reference: Reference | None = None  # made by `configure_model` where one is needed
        self.strict_loading = self.lora is None  # `on_load_checkpoint` checks adapters itself

        self.tokens_seen = 0  # input tokens on all ranks since the first step
        self.val_loss = TokenLoss()
        self.on_answer: Callable[[int, list[int]], None] | None = None  # told of each answer
        self._step_loss = torch.zeros(())  # of the micro-batches of this step so far
        if self.objective is not None:
            self.val_pairs = PairMeans()
            self._step_pairs = torch.zeros(len(PREFERENCE_METRICS))
        self._wants_stop = self._stopped_early = False

    def find_tokenizer(self, source: str | None, weights: str | None) -> Tokenizer:
        """The tokenizer of `source`, of the weights, or of the family; a plan has others."""
        return find_tokenizer(self.config, source, weights)

    def _check_settings(self, max_length: int | None) -> None:
        if self.lora is not None:
            self.lora.check()
        if self.objective is not None:
            self.objective.check()
        if max_length is not None and max_length > self.config.context_length:
            raise InputError(
                f"data.max_length: {max_length} is more than the model's context of "
                f"{self.config.context_length} tokens"
            )
        check_style(self.style, self.tokenizer)
        if self.config.vocab_size < self.tokenizer.vocab_size:
            raise InputError(
                f"architecture: vocab_size {self.config.vocab_size} is less than the tokenizer's "
                f"{self.tokenizer.vocab_size}"
            )

    def _plain_settings(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values only, so that it loads with weights_only=True."""
        style = dataclasses.asdict(self.style)
        comes_along = family_of(self.config).tokenizer is None
        return {
            "architecture": dataclasses.asdict(self.config),
            # A checkpoint holds them, or else the adapters of these.
            "weights": locate(self.weights) if self.lora or self.needs_reference else None,
            "lora": self.lora.as_dict() if self.lora else None,
            "header_in_prompt": style.pop("header_in_prompt"),
            "prompt_style": style,
            "generation": dataclasses.asdict(self.generation),
            "seed": self.seed,
            **({"objective": self.objective.as_dict()} if self.objective else {}),
        } | ({"tokenizer": locate(self.tokenizer_source)} if comes_along else {})

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with the weights that training begins with."""
        return self.objective is not None and self.objective.needs_reference

    def configure_model(self) -> None:
        """Make the model and read its weights, once."""
        if self.model is not None:
            return
        model = make_model(self.config)
        if self.weights is not None:
            check_config(self.config, self.weights)
            path = load_weights(model, self.weights)
            if path is not None and path.suffix == ".gguf":
                note_quantized(path)
        else:
            model.randomize(self.seed)
        if self.lora is not None:
            add_lora(model, self.lora, self.seed)
            self.base = identify_base(model)
        answers_only = self._trainer is not None and self.trainer.state.fn == "predict"
        if self.objective is not None and self.needs_reference and not answers_only:
            weights = self.objective.reference_weights
            self.reference = make_reference(model, weights, self.base)
        model.recompute = self.activation_checkpointing
        if self.compile_blocks:
            # Lengths change from batch to batch: one graph for all of them, not one for each.
            model.compiled = torch.compile(run_block, dynamic=True)
        mesh = self.device_mesh  # of a sharded strategy
        if mesh is not None and self.objective is not None:
            raise InputError(
                "trainer.strategy: preference tuning is not done on a sharded model; give "
                "multi-gpu.yaml (DDP), with lora.yaml where memory is short"
            )
        self.model = model if mesh is None else shard(model, mesh)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of token ids (B, T)."""
        return self.network(input_ids)

    @property
    def network(self) -> GPTModel:
        """The model, made if it is not there yet."""
        self.configure_model()
        assert self.model is not None
        return self.model

    def sum_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy summed over the supervised tokens of a batch, and their number.

        Where the batch has weights: each token's times its weight, and the sum of the weights.

        With an objective: its losses, summed over the pairs of a batch, and the number of these.

        Args:
            batch: Of `collate` or `pack`; of `PairBatchMaker`.
        """
        if self.objective is not None:
            pairs = self.sum_pairs(batch)
            return pairs.loss, pairs.num_pairs
        hidden, supervised, places = supervised_states(self.network, batch)
        head = self.network.out_head
        weights = batch["weights"][supervised] if "weights" in batch else None  # (K,)
        loss = sum_cross_entropy(
            hidden,  # (M, D)
            head.weight,
            batch["targets"][supervised],
            places,
            adapter_of(head),
            weights,
        )
        return loss, supervised.sum() if weights is None else weights.sum(dtype=loss.dtype)

    def sum_pairs(self, batch: Batch) -> PairSums:
        """Losses and metrics of the objective, summed over the pairs of a batch.

        Args:
            batch: Of `PairBatchMaker`.
        """
        assert self.objective is not None
        return sum_pairs(self.network, self.objective, self.reference, batch)

    def configure_callbacks(self) -> list[L.Callback]:
        """None of its own; it is asked before any callback is set up, in time to refuse some."""
        if self.trainer.state.fn == "fit":
            check_callbacks(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Check that the data fits, also where a plain `Trainer` brings the two together.

        A loader that `fit` was given on its own follows the trainer like a DataModule's.
        """
        check_data(self, getattr(self.trainer, "datamodule", None), stage)
        if stage == "fit":
            loader = given_train_loader(self.trainer)
            if isinstance(loader, TrainLoader):
                loader.follow(self.trainer)

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        wanted = self.objective.reference if self.objective else None
        if self.reference is not None and wanted == "precomputed":
            self.reference.precompute(self, self.trainer)

    def on_train_start(self) -> None:
        # In the middle of an epoch Lightning leaves out the hook in which a schedule sets it.
        plan, epoch = accumulation_plan(self.trainer), self.current_epoch
        self.trainer.accumulate_grad_batches = plan[max(e for e in plan if e <= epoch)]
        if self._stopped_early:
            rank_zero_info(
                "note: a callback had ended this run, so nothing is trained; to train further, "
                "start anew with the checkpoint as model.weights"
            )
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """No step is open at the beginning of an epoch."""
        self._open_step()

    def _open_step(self) -> None:
        self._step_loss = torch.zeros((), device=self.device)
        if self.objective is not None:
            self._step_pairs = torch.zeros(len(PREFERENCE_METRICS), device=self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout is a function of seed, epoch, step and rank: a resumed run repeats it."""
        place = self.current_epoch * 1_000_003 + batch_idx
        torch.manual_seed((self.seed * 1_000_033 + place) * 1_009 + self.global_rank)
        set_logged_step(self.trainer, self.global_step)
        if "step_targets" not in batch:
            batch.update(self._count_alone(batch))

    def _count_alone(self, batch: Batch) -> Batch:
        """What a `TrainLoader` would say of a batch; of torch's own loader, which looks not ahead.

        Raises:
            InputError: The step has more than this batch.
        """
        if self.trainer.accumulate_grad_batches * self.trainer.world_size != 1:
            raise InputError(
                "trainer.accumulate_grad_batches and devices: a step over several batches is "
                "divided by the tokens of all of them, which only the loader of an "
                "InstructionDataModule knows ahead; give that, or set both to 1"
            )
        supervised = (batch["targets"] != IGNORE_INDEX).sum().item()
        if self.objective is not None:
            supervised = (batch["index"] >= 0).sum().item()  # pairs
        elif "weights" in batch:
            supervised = batch["weights"].double().sum().item()
        counts = {"num_tokens": batch["input_ids"].numel(), "step_targets": supervised}
        return {"index": torch.full((len(batch["targets"]),), -1)} | batch | counts

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """A micro-batch's share of its step's loss, times whatever Lightning will divide it by."""
        # `calc_loss_batch` and `loss.backward()` of listing 7.7's training loop; Lightning calls
        # backward, the optimizer and zero_grad around it.
        if self.objective is not None:
            pairs = self.sum_pairs(batch)
            loss_sum = pairs.loss
            self._step_pairs = self._step_pairs + pairs.metrics / batch["step_targets"]
        else:
            loss_sum, _ = self.sum_loss(batch)
        self.tokens_seen += batch["num_tokens"]  # of all ranks
        share = loss_sum / batch["step_targets"]
        self._step_loss = self._step_loss + share.detach()
        if ends_step(self.trainer, batch_idx):
            self._log_step(self._step_loss, batch)
            self._open_step()
        # Lightning divides by the micro-batches of a step, and ranks are averaged: undo both.
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._stop_between_steps(batch_idx)

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == "fit":
            self._stop_between_steps(batches_done(self.trainer) - 1)

    def _stop_between_steps(self, batch_idx: int) -> None:
        """Let a run that is to stop (`max_time`, a callback) finish its optimizer step first.

        Accumulated gradients are not saved, and would be lost to the run that goes on.
        """
        at_step = ends_step(self.trainer, batch_idx)
        self._wants_stop = self.trainer.should_stop or self._wants_stop
        self.trainer.should_stop = self._wants_stop and at_step

    def _log_step(self, loss: torch.Tensor, batch: Batch) -> None:
        loss = self.trainer.strategy.reduce(loss, reduce_op="sum")
        if not torch.isfinite(loss):
            entries = [int(index) for index in batch["index"]]
            raise ServiceError(
                f"train_loss is {float(loss)} at step {self.global_step} (training entries "
                f"{entries}); lower the learning rate or set trainer.gradient_clip_val; the last "
                "checkpoint is unharmed"
            )
        optimizer = self.optimizers()
        lr = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        size = len(batch["targets"])
        self.log("train_loss", loss, prog_bar=True, batch_size=size)
        self.log("lr", lr, batch_size=size)
        self.log("tokens_seen", float(self.tokens_seen), batch_size=size)
        if self.objective is not None:
            means = self.trainer.strategy.reduce(self._step_pairs, reduce_op="sum")
            for name, mean in zip(PREFERENCE_METRICS, means, strict=True):
                self.log(name, mean, batch_size=size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums; the division is at the end, over all tokens of the split."""
        self._evaluate(batch)

    def _evaluate(self, batch: Batch) -> None:
        if self.objective is None:
            self.val_loss.update(*self.sum_loss(batch))
            return
        pairs = self.sum_pairs(batch)
        self.val_loss.update(pairs.loss, pairs.num_pairs)
        self.val_pairs.update(pairs)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and `val_perplexity`, or an objective's own metrics, on every rank."""
        loss = self._log_evaluation("val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            scheduler = self.lr_schedulers()
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As `validation_step`, on the test split."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log `test_loss` and `test_perplexity`."""
        self._log_evaluation("test")

    def _log_evaluation(self, name: str) -> float:
        loss = float(self.val_loss.compute())
        self.val_loss.reset()
        # The metric has summed over ranks already, so every rank logs the same number.
        settings: dict[str, Any] = {"batch_size": 1, "rank_zero_only": False}
        self.log(f"{name}_loss", loss, prog_bar=True, **settings)
        if self.objective is None:
            self.log(f"{name}_perplexity", math.exp(min(loss, 700.0)), **settings)
            return loss
        means = self.val_pairs.compute().tolist()
        self.val_pairs.reset()
        for metric, mean in zip(PREFERENCE_METRICS, means, strict=True):
            self.log(f"{name}_{metric}", mean, **settings)
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Any]]:
        """Answer a batch of prompts: `index` and `responses`, the entries' places and texts."""
        # Repeats that even out the ranks carry index -1.
        wanted = [place for place, index in enumerate(batch["index"]) if index >= 0]
        responses = self.answer([batch["prompts"][place] for place in wanted])
        return {"index": [batch["index"][place] for place in wanted], "responses": responses}

    def answer(self, prompts: list[list[int]], model: GPTModel | None = None) -> list[str]:
        """The texts that the model answers to prompts of token ids, without headers.

        Args:
            model: Answers instead of the module's own, which may be sharded.
        """
        model = model or self.network
        settings = dataclasses.asdict(self.generation)
        answers = generate(
            model,
            prompts,
            **settings,
            eos_token_id=self.tokenizer.eos_token_id,
            on_answer=self.on_answer,
        )
        return [self.style.extract(self.tokenizer.decode(ids)) for ids in answers]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of what is trained, fused where that was seen to work, and its schedule."""
        if self.lora is not None and not has_lora(self.network):
            raise InputError(
                "model.lora: its adapters were merged to answer; load the checkpoint again to train"
            )
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            optimizer = self.optimizer(trainable)
            scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"model.optimizer or model.lr_scheduler: {error}") from error
        for group in optimizer.param_groups:
            # Not the scheduled rate: a warm-up may begin near nothing.
            lr = float(group.get("initial_lr", group["lr"]))
            if not 0.0 < lr < math.inf:
                raise InputError(f"model.optimizer: lr {lr} is not allowed; it must be positive")
        fuse(optimizer)
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, WarmupCosine):
            total_steps = count_steps_ahead(self.trainer)
            if total_steps is None:
                raise InputError(
                    "model.lr_scheduler: WarmupCosine needs to know where the run ends; set "
                    "trainer.max_epochs or trainer.max_steps"
                )
            scheduler.set_total_steps(total_steps)
        if isinstance(scheduler, ReduceLROnPlateau):
            # Never by Lightning, which steps it once an epoch, behind the epoch's checkpoint and
            # not at all where a run goes on from there; `on_validation_epoch_end` does.
            never: Any = {"scheduler": scheduler, "frequency": sys.maxsize, "monitor": "val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": never}
        every_step: Any = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": every_step}

    def on_predict_start(self) -> None:
        """A merged model answers faster. What is sharded over devices stays as it is."""
        if isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            merge_lora(self.network)
        with self.trainer.precision_plugin.predict_step_context():
            prepack(self.network)

    def on_predict_end(self) -> None:
        """The second copy of the weights is given back."""
        discard_prepacked(self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        if family_of(self.config).tokenizer is None:
            checkpoint["tokenizer"] = self.tokenizer.name
        stops = self._wants_stop or self.trainer.should_stop
        checkpoint["stopped_early"] = stops and not is_time_up(self.trainer)
        if self.reference is not None:
            checkpoint["reference"] = self.reference.identity
        if self.lora is not None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in state if is_adapter(name)}
            checkpoint["base"] = self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        check_tokenizer(self.tokenizer, checkpoint)
        self._stopped_early = checkpoint.get("stopped_early", False)
        settle_place(checkpoint["loops"])
        goes_on = self._trainer is not None and self.trainer.state.fn == "fit"
        check_objective(self.objective, self.reference, checkpoint, goes_on)
        if self.lora is not None:
            check_adapters(self.network, checkpoint, self.weights)
        elif any(map(is_adapter, checkpoint.get("state_dict", ()))):  # none: a shard is loaded
            raise InputError("ckpt_path: holds LoRA adapters; add model.lora as it was trained")


class TokenLoss(Metric):
    """Cross-entropy per supervised token over everything it has seen, on all ranks."""

    full_state_update = False
    loss_sum: torch.Tensor
    num_targets: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # MPS has no float64; elsewhere it keeps the sum of many batches exact.
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("loss_sum", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        # A sum of weights where targets have some; up to 2^53 a number of targets is exact, too.
        self.add_state("num_targets", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, loss_sum: torch.Tensor, num_targets: torch.Tensor) -> None:
        self.loss_sum = self.loss_sum + loss_sum.to(self.loss_sum)
        self.num_targets = self.num_targets + num_targets.to(self.num_targets)

    def compute(self) -> torch.Tensor:
        return self.loss_sum / self.num_targets
