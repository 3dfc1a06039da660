"""The same training by others: transformers in a plain loop, with Liger, and TRL's SFTTrainer."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmark_models import make_transformers_model
from gpu_check.notebook import SkipError
from gpu_check.setting import Setting
from gpu_check.stopwatch import DoneError, Stopwatch
from lightning_sft import InstructionDataModule

ADAMW: dict[str, Any] = {"lr": 5e-5, "weight_decay": 0.1}
Peer = Callable[[Setting, str, InstructionDataModule, Stopwatch], None]


def make_model(setting: Setting, name: str) -> Any:
    """transformers' model of that architecture, random weights made on the device."""
    with torch.device(setting.device):
        model = make_transformers_model(Namespace(architecture=setting.architecture(name)))
    return model.to(setting.device)


def padded_batches(data: InstructionDataModule) -> Iterator[dict[str, Any]]:
    """The data module's batches, epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))


def train_transformers(
    setting: Setting, name: str, data: InstructionDataModule, stopwatch: Stopwatch
) -> None:
    """Its own model and loss under autocast, fused AdamW; rows padded as `data` says."""
    model = make_model(setting, name).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
    for batch in padded_batches(data):
        if stopwatch.is_over:
            return
        targets = batch["targets"].to(setting.device, non_blocking=True)
        ids = batch["input_ids"].to(setting.device, non_blocking=True)
        # Rows of one length need no mask, and without one the fused kernels may be causal.
        ragged = bool((batch["targets"] == -100).any())
        mask = {"attention_mask": (targets != -100).long()} if ragged else {}
        optimizer.zero_grad()
        with torch.autocast(setting.device, torch.bfloat16):
            loss = model(ids, **mask, labels=targets, shift_labels=targets).loss
        loss.backward()
        optimizer.step()
        stopwatch.step(batch["num_tokens"], batch["step_targets"])


def train_liger(
    setting: Setting, name: str, data: InstructionDataModule, stopwatch: Stopwatch
) -> None:
    """The same with Liger's kernels; they stay in transformers for the rest of the process."""
    family = "qwen3" if name.startswith("qwen3") else "llama"
    if name.startswith("gpt2"):
        raise SkipError("Liger has no kernels for GPT-2")
    patches = importlib.import_module("liger_kernel.transformers")
    getattr(patches, f"apply_liger_kernel_to_{family}")()
    train_transformers(setting, name, data, stopwatch)


def train_trl(
    setting: Setting, name: str, data: InstructionDataModule, stopwatch: Stopwatch
) -> None:
    """SFTTrainer, without two defaults that would slow it: clipping and recomputed activations."""
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer  # first: without it the others are not needed

    class Watched(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if stopwatch.is_over:
                raise DoneError
            loss = super().training_step(model, inputs, *args, **kwargs)
            # Without the optimizer's part, which the next round's clock takes in.
            stopwatch.step(inputs["input_ids"].numel(), (inputs["labels"][:, 1:] != -100).sum())
            return loss

    end, end_id = "<|endoftext|>", data.tokenizer.eos_token_id
    vocabulary = Tokenizer(models.WordLevel({end: end_id}, unk_token=end))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=end, pad_token=end)
    limit = data.config.max_length
    rows = [[*map(int, row.ids), end_id][:limit] for row in data.rows("train")]
    settings: dict[str, Any] = {"bf16": True, "use_cpu": setting.device == "cpu"}
    settings |= {"optim": "adamw_torch_fused", "max_steps": stopwatch.total + 1}
    settings |= {"learning_rate": ADAMW["lr"], "weight_decay": ADAMW["weight_decay"]}
    settings |= {"per_device_train_batch_size": data.batch_size, "max_length": None}
    settings |= {"max_grad_norm": 0.0, "gradient_checkpointing": False, "disable_tqdm": True}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
    settings |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(DoneError):
        Watched(
            model=make_model(setting, name),
            args=SFTConfig(output_dir=folder, **settings),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
        ).train()


PEERS: dict[str, Peer] = {
    "transformers bf16": train_transformers,
    "TRL bf16": train_trl,
    "transformers with Liger bf16": train_liger,
}
