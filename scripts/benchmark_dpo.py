"""Steps of preference tuning, ours and TRL's DPOTrainer, in turn, on the same pairs of ids.

Both tune a model with random weights on the first batches of the same preference file, full and
with LoRA, eight pairs a step in fp32 or bf16. Each measurement is a process of its own: one step to
warm up and a few timed ones, all peers alternating, so that a slow minute of the machine meets all.

    python scripts/benchmark_dpo.py --data instruction-data-with-preference.json --out benchmark-dpo
    python scripts/benchmark_dpo.py --data pairs.json --architecture smollm2-135m --bf16
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmark import describe_machine
from benchmark_models import get_config, make_transformers_model
from benchmark_training import BATCH_SIZE, DoneError, Recorder

PEERS = ("ours", "TRL", "ours, LoRA", "TRL, LoRA")
RANK, LR, BETA = 16, 5e-6, 0.1


def make_pairs(run: Namespace) -> Any:
    """The data of both, in the model's tokens; the prompt is computed once where we may."""
    from lightning_sft import InstructionDataModule
    from lightning_sft.data.find_tokenizer import read_tokenizer

    context = min(get_config(run).context_length, 1024)
    data = InstructionDataModule(
        run.data, format="preference", mask_prompt=True, share_prefix=True, max_length=context
    )
    if run.tokenizer:
        data.tokenizer = read_tokenizer(run.tokenizer)
    return data


def train_ours(run: Namespace, recorder: Recorder, lora: bool) -> None:
    """`SFTModule` with `DPO` in a plain Trainer."""
    import lightning as L
    import torch

    from lightning_sft import DPO, SFTModule
    from lightning_sft.models.lora import LoRAConfig

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, _: int) -> None:
            recorder.start_step()
            recorder.batches.append(batch)

    data = make_pairs(run)
    module = SFTModule(
        run.architecture,
        None,
        lora=LoRAConfig(rank=RANK) if lora else None,
        objective=DPO(beta=BETA),
        optimizer=lambda params: torch.optim.AdamW(params, lr=LR),
        max_length=data.config.max_length,
        tokenizer=run.tokenizer,
    )
    L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, use_distributed_sampler=False, callbacks=[Watch()],
        precision="bf16-mixed" if run.bf16 else "32-true",
    ).fit(module, datamodule=data)  # fmt: skip


def train_trl(run: Namespace, recorder: Recorder, lora: bool) -> None:
    """DPOTrainer without recomputed activations and clipping, which would slow it."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.start_step()

    class WatchedTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # the pairs are ids already

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            recorder.batches.append(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    data = make_pairs(run)
    end, end_id = "<|endoftext|>", data.tokenizer.eos_token_id
    vocabulary = Tokenizer(models.WordLevel({end: end_id}, unk_token=end))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=end, pad_token=end)
    rows = data.pairs("train")
    order = [row for part in data.order(BATCH_SIZE).plan(0) for row in part[0]]
    records = []
    for place in order[: BATCH_SIZE * (run.steps + 2)]:
        chosen, rejected, _ = rows[place]
        first = chosen.prompt_length
        record = {"prompt_ids": list(map(int, chosen.ids[:first]))}
        for name, row in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            record[name] = [*map(int, row.ids[first:]), end_id]
        records.append(record)
    settings: dict[str, Any] = {"bf16": run.bf16, "use_cpu": True, "optim": "adamw_torch_fused"}
    settings |= {"learning_rate": LR, "weight_decay": 0.01, "beta": BETA, "max_length": None}
    settings |= {"per_device_train_batch_size": BATCH_SIZE, "train_sampling_strategy": "sequential"}
    settings |= {"max_grad_norm": 0.0, "gradient_checkpointing": False, "report_to": "none"}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "dataloader_pin_memory": False}
    model = make_transformers_model(run)
    # With adapters TRL switches them off, too; else it has a second model.
    adapters = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear") if lora else None
    reference = None if lora else make_transformers_model(run)
    if reference is not None:
        reference.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        WatchedTrainer(
            model=model,
            ref_model=reference,
            args=trl.DPOConfig(output_dir=folder, **settings),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
            peft_config=adapters,
            callbacks=[Watch()],
        ).train()


def measure(name: str, run: Namespace) -> dict[str, Any]:
    """Seconds of a step and the most memory that the process ever held, in this process."""
    import torch

    torch.set_num_threads(run.threads)
    if name == "machine":
        return describe_machine()
    recorder = Recorder(run.steps)
    with contextlib.suppress(DoneError):
        (train_ours if name.startswith("ours") else train_trl)(run, recorder, "LoRA" in name)
    if not recorder.peak_gb:
        raise SystemExit(f"training ended before {run.steps} steps were timed")
    seconds = [after - before for before, after in itertools.pairwise(recorder.starts[1:])]
    computed = [int(b["input_ids"].numel()) for b in recorder.batches[1 : run.steps + 1]]
    return {"seconds": seconds, "peak_gb": recorder.peak_gb, "computed": computed}


def start(name: str, run: Namespace) -> dict[str, Any]:
    """`measure` in a process of its own, which prints its result as the last line."""
    command = [sys.executable, __file__, "--job", json.dumps([name, vars(run)])]
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tabulate(results: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds; a ratio is of neighbours in one round."""
    lines = ["| | seconds a step | tokens computed a step | peak GB |", "|---|---|---|---|"]
    steps = {name: [mean(r["seconds"]) for r in rounds] for name, rounds in results.items()}
    peaks = {name: [r["peak_gb"] for r in rounds] for name, rounds in results.items()}
    for name, rounds in results.items():
        lines.append(
            f"| {name} | {median(steps[name]):.3f} | {mean(rounds[0]['computed']):.0f} "
            f"| {median(peaks[name]):.2f} |"
        )
    for ours, theirs in (("ours", "TRL"), ("ours, LoRA", "TRL, LoRA")):
        times = [b / a for a, b in zip(steps[ours], steps[theirs], strict=True)]
        shares = [a / b for a, b in zip(peaks[ours], peaks[theirs], strict=True)]
        lines.append(
            f"| {theirs} / {ours} | {median(times):.2f} ({min(times):.2f}–{max(times):.2f}) | "
            f"| memory {median(shares):.2f} of theirs |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure preference tuning beside TRL's.")
    parser.add_argument("--data", required=True, help="a file of preferences")
    parser.add_argument("--architecture", default="gpt2-small", help="a name, or JSON of fields")
    parser.add_argument("--tokenizer", help="of an architecture that has none of its own")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all")
    parser.add_argument("--steps", type=int, default=4, help="timed training steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmark-dpo"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    if "--job" in sys.argv:
        name, settings = json.loads(sys.argv[sys.argv.index("--job") + 1])
        print("\n" + json.dumps(measure(name, Namespace(**settings))))
        return
    options = parser.parse_args()
    architecture = options.architecture
    if architecture.startswith("{"):
        architecture = json.loads(architecture)
    run = Namespace(data=options.data, architecture=architecture, steps=options.steps)
    run.threads, run.bf16, run.tokenizer = options.threads, options.bf16, options.tokenizer
    machine = start("machine", run)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in PEERS}
    for number in range(1, options.repeats + 1):
        for name, rounds in results.items():
            rounds.append(start(name, run))
            step, peak = mean(rounds[-1]["seconds"]), rounds[-1]["peak_gb"]
            print(
                f"{number}/{options.repeats} {name}: {step:.3f} s a step, {peak:.2f} GB", flush=True
            )
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "settings": vars(run) | {"repeats": options.repeats}} | results
    (options.out / "results.json").write_text(json.dumps(record, indent=4))
    (options.out / "results.md").write_text(tabulate(results))
    print("\n" + tabulate(results))


if __name__ == "__main__":
    main()
