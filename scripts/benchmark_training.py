"""Training for `benchmark.py`: four loops over the same rows, and the clock they all run by."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

from benchmark_models import (
    get_config,
    is_gpt2,
    make_chapter_model,
    make_data,
    make_transformers_model,
    peak_memory,
    product_shapes,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BATCH_SIZE, SEED, IGNORE_INDEX = 8, 123, -100
ADAMW: dict[str, Any] = {"lr": 5e-5, "weight_decay": 0.1}


class DoneError(Exception):
    """Ends a training loop, whoever runs it, as soon as enough steps are timed."""


class Recorder:
    """The clock of a loop: one step to warm up, then `steps`, each from its start to the next's."""

    def __init__(self, steps: int) -> None:
        self.steps, self.peak_gb = steps, 0.0
        self.starts: list[float] = []
        self.inside: list[float] = []  # per step, seconds of work that any loop does
        self.batches: list[dict[str, Any]] = []

    def start_step(self) -> None:
        self.starts.append(time.perf_counter())
        self.inside.append(0.0)
        if len(self.starts) == self.steps + 2:
            self.peak_gb = peak_memory()
            raise DoneError

    def enter(self, *_: Any) -> None:
        self.inside[-1] -= time.perf_counter()

    def leave(self, *_: Any) -> None:
        self.inside[-1] += time.perf_counter()


def train_ours(
    run: Namespace,
    recorder: Recorder,
    *,
    bf16: bool,
    share_prefix: bool,
    overlays: tuple[str, ...] = (),
) -> None:
    """`lightning_sft fit`; inside are loss, backward with zero_grad, and optimizer."""
    import lightning as L

    from lightning_sft.__main__ import main as run_command
    from lightning_sft.commands import training as training_command

    class Watch(L.Callback):
        on_before_zero_grad = on_before_optimizer_step = recorder.enter  # type: ignore[assignment]
        on_after_backward = recorder.leave  # type: ignore[assignment]

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.sum_loss = timed(pl_module.sum_loss)
            trainer.optimizers[0].register_step_post_hook(recorder.leave)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, _: int) -> None:
            recorder.start_step()
            recorder.batches.append(batch)

    def timed(sum_loss: Callable[..., Any]) -> Callable[..., Any]:
        def call(batch: Any) -> Any:
            recorder.enter()
            result = sum_loss(batch)
            recorder.leave()
            return result

        return call

    class WatchedCLI(training_command.SFTCLI):
        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
            return trainer

    watched = mock.patch.object(training_command, "SFTCLI", WatchedCLI)
    with watched, tempfile.TemporaryDirectory() as folder:
        base = "gpt2-small.yaml" if is_gpt2(run) else "smollm2-135m.yaml"
        arguments = ["fit", f"--config={CONFIGS / base}", "--model.weights=null"]
        arguments += [f"--config={CONFIGS / 'bf16.yaml'}"] * bf16
        arguments += [f"--config={CONFIGS / name}" for name in overlays]
        arguments += ["--trainer.accelerator=cpu", "--trainer.devices=1", f"--run.dir={folder}"]
        arguments += ["--trainer.limit_val_batches=0", "--loss_curve.every_n_steps=0"]
        arguments += ["--samples.indices=[]", f"--data.share_prefix={json.dumps(share_prefix)}"]
        named = isinstance(run.architecture, str)  # a quoted name would be another one
        shape = run.architecture if named else json.dumps(run.architecture)
        arguments += [f"--model.architecture={shape}"]
        arguments += [f"--data.max_length={get_config(run).context_length}"]
        arguments += [f"--data.prompt_style={run.style}", "--data.mask_prompt=false"]
        arguments += [f"--model.tokenizer={run.tokenizer}"] * bool(run.tokenizer)
        run_command([*arguments, f"--data.path={run.data}"])


def train_chapter(run: Namespace, recorder: Recorder) -> None:
    """The chapter's loop: all logits of a padded batch, AdamW as torch makes it by itself."""
    import torch

    model = make_chapter_model(run)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for batch in padded_batches(run, recorder):
        optimizer.zero_grad()
        logits, targets = model(batch["input_ids"]), batch["targets"]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()


def train_transformers(run: Namespace, recorder: Recorder, *, bf16: bool) -> None:
    """transformers' own model with an attention mask and its own loss, and fused AdamW."""
    import torch

    model = make_transformers_model(run).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
    for batch in padded_batches(run, recorder):
        targets = batch["targets"]  # shifted already, which `shift_labels` tells its loss
        mask = (targets != IGNORE_INDEX).long()
        labels = {"labels": targets, "shift_labels": targets}
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(batch["input_ids"], attention_mask=mask, **labels).loss
        loss.backward()
        optimizer.step()


def train_trl(run: Namespace, recorder: Recorder, *, bf16: bool) -> None:
    """SFTTrainer, without two defaults that would slow it: clipping and recomputed activations."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.start_step()

    class WatchedTrainer(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            targets = inputs["labels"][:, 1:]
            recorder.batches.append({"input_ids": inputs["input_ids"], "targets": targets})
            return super().training_step(model, inputs, *args, **kwargs)

    end = "<|endoftext|>"  # the rows are ids already; the tokenizer only says how to pad them
    end_id = make_data(run).tokenizer.eos_token_id
    vocabulary = Tokenizer(models.WordLevel({end: end_id}, unk_token=end))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=end, pad_token=end)
    rows = [[*ids, end_id] for batch in row_batches(run) for ids in batch]
    settings: dict[str, Any] = {"bf16": bf16, "use_cpu": True, "optim": "adamw_torch_fused"}
    settings |= {"learning_rate": ADAMW["lr"], "weight_decay": ADAMW["weight_decay"]}
    settings |= {"per_device_train_batch_size": BATCH_SIZE, "train_sampling_strategy": "sequential"}
    settings |= {"max_grad_norm": 0.0, "gradient_checkpointing": False}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
    settings |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "dataloader_pin_memory": False}
    with tempfile.TemporaryDirectory() as folder:
        WatchedTrainer(
            model=make_transformers_model(run),
            args=SFTConfig(output_dir=folder, **settings),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            callbacks=[Watch()],
        ).train()


def row_batches(run: Namespace) -> list[list[list[int]]]:
    """Token ids of the chapter's first batches: to warm up, to time, and one to end on."""
    from lightning_sft.data.order import epoch_order

    rows = make_data(run).rows("train")
    order = epoch_order(len(rows), SEED, 0)[: BATCH_SIZE * (run.steps + 2)]
    ids = [list(map(int, rows[place].ids)) for place in order]
    return [ids[k : k + BATCH_SIZE] for k in range(0, len(ids), BATCH_SIZE)]


def padded_batches(run: Namespace, recorder: Recorder) -> Iterator[dict[str, Any]]:
    """The same rows, padded as in the chapter; making a batch is part of its step."""
    from lightning_sft.data.batching import collate

    end_id = make_data(run).tokenizer.eos_token_id
    for rows in row_batches(run):
        recorder.start_step()
        recorder.batches.append(collate(rows, eos_token_id=end_id, pad_token_id=end_id))
        yield recorder.batches[-1]


def measure_training(train: Callable[..., None], run: Namespace, **options: Any) -> dict[str, Any]:
    """One peer's timed steps, then the matrix products of such a step by themselves."""
    recorder, is_ours = Recorder(run.steps), train is train_ours
    with contextlib.suppress(DoneError):
        train(run, recorder, **options)
    if not recorder.peak_gb:
        raise SystemExit(f"training ended before {run.steps} steps were timed")
    timed, seconds = slice(1, run.steps + 1), recorder.starts[-1] - recorder.starts[1]
    counts = [count_tokens(batch, is_ours) for batch in recorder.batches[timed]]
    supervised, computed, head = zip(*counts, strict=True)
    products = time_products(run, round(mean(computed)), round(mean(head)), **options)
    result = {"rate": sum(supervised) / seconds, "peak_gb": recorder.peak_gb}
    result |= {"step_seconds": seconds / run.steps, "products": products * run.steps / seconds}
    if is_ours:
        result["overhead"] = 1 - sum(recorder.inside[timed]) / seconds
    return result | {"supervised": supervised, "computed": computed}


def count_tokens(batch: dict[str, Any], is_ours: bool) -> tuple[int, int, int]:
    """Targets of a batch, positions computed for them, and those multiplied with the head."""
    supervised = batch["targets"] != IGNORE_INDEX
    head = computed = batch["input_ids"].numel()
    if is_ours:
        head = len(batch["gather"][supervised].unique()) if "gather" in batch else supervised.sum()
    return int(supervised.sum()), computed, int(head)


def time_products(run: Namespace, rows: int, head_rows: int, bf16: bool = False, **_: Any) -> float:
    """Seconds of a step's products of activations and weights, forward and backward, alone."""
    import torch

    config, dtype = get_config(run), torch.bfloat16 if bf16 else torch.float32
    shapes = [(rows, *shape) for shape in product_shapes(run)]
    shapes.append((head_rows, config.emb_dim, config.vocab_size))
    weights = [torch.randn(n_out, n_in, dtype=dtype) for _, n_in, n_out in shapes]

    def products() -> float:
        seconds = 0.0
        for (num, n_in, n_out), weight in zip(shapes, weights, strict=True):
            x, grad = torch.ones(num, n_in, dtype=dtype), torch.ones(num, n_out, dtype=dtype)
            begun = time.perf_counter()
            _ = x @ weight.T, grad @ weight, grad.T @ x
            seconds += time.perf_counter() - begun
        return seconds

    return median([products() for _ in range(4)][1:])
