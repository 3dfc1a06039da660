"""Training and generation beside the peers, in one run on one machine.

Ours runs through its own command line and Trainer; beside it the chapter's loop around the package
`llms_from_scratch`, transformers in a plain loop, and TRL's SFTTrainer: one architecture, random
weights, an untied head, the same rows in the chapter's order. Each measurement is a process of its
own, and the peers take turns, so that a slow minute of the machine meets all of them. A peer that
is not installed is left out. docs/performance.md says what each figure means.

    pip install -e '.[bench]' && pip install --no-deps llms-from-scratch
    python scripts/benchmark.py --out benchmark              # results.json, .md and .png in there
    python scripts/benchmark.py --quick --architecture '{"emb_dim": 32, "n_heads": 4}'
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

# Nothing imports torch outside a function: Linux counts a parent's memory into its child's peak, so
# the process that starts the measurements has to stay small.
from lightning_sft.entries import BOOK_DATA_URL

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BATCH_SIZE, SEED, END_OF_TEXT, IGNORE_INDEX = 8, 123, 50256, -100
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


def peak_memory() -> float:
    """Most memory that this process has held, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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

    from lightning_sft import training_cli
    from lightning_sft.__main__ import main as run_command

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

    class WatchedCLI(training_cli.SFTCLI):
        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
            return trainer

    watched = mock.patch.object(training_cli, "SFTCLI", WatchedCLI)
    with watched, tempfile.TemporaryDirectory() as folder:
        arguments = ["fit", f"--config={CONFIGS / 'gpt2-small.yaml'}", "--model.weights=null"]
        arguments += [f"--config={CONFIGS / 'bf16.yaml'}"] * bf16
        arguments += [f"--config={CONFIGS / name}" for name in overlays]
        arguments += ["--trainer.accelerator=cpu", "--trainer.devices=1", f"--run.dir={folder}"]
        arguments += ["--trainer.limit_val_batches=0", "--loss_curve.every_n_steps=0"]
        arguments += ["--samples.indices=[]", f"--data.share_prefix={json.dumps(share_prefix)}"]
        named = isinstance(run.architecture, str)  # a quoted name would be another one
        shape = run.architecture if named else json.dumps(run.architecture)
        arguments += [f"--model.architecture={shape}"]
        arguments += [f"--data.max_length={get_config(run).context_length}"]
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
    """GPT2LMHeadModel with an attention mask and its own loss, and fused AdamW."""
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
    vocabulary = Tokenizer(models.WordLevel({end: END_OF_TEXT}, unk_token=end))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=end, pad_token=end)
    rows = [[*ids, END_OF_TEXT] for batch in row_batches(run) for ids in batch]
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
    from lightning_sft.data import InstructionDataModule
    from lightning_sft.loader import epoch_order

    rows = InstructionDataModule(run.data).rows("train")
    order = epoch_order(len(rows), SEED, 0)[: BATCH_SIZE * (run.steps + 2)]
    ids = [list(map(int, rows[place].ids)) for place in order]
    return [ids[k : k + BATCH_SIZE] for k in range(0, len(ids), BATCH_SIZE)]


def padded_batches(run: Namespace, recorder: Recorder) -> Iterator[dict[str, Any]]:
    """The same rows, padded as in the chapter; making a batch is part of its step."""
    from lightning_sft.data import collate

    for rows in row_batches(run):
        recorder.start_step()
        recorder.batches.append(collate(rows))
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
    width = config.emb_dim
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    shapes = [(rows, *shape) for shape in block * config.n_layers]
    shapes.append((head_rows, width, config.vocab_size))
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


Answer = Callable[[list[list[int]], int], list[list[int]]]  # prompts, new tokens → the new ids


def answer_ours(run: Namespace, *, bf16: bool) -> Answer:
    """`generate`, as under `predict` and `chat`."""
    import torch

    from lightning_sft.generation import generate
    from lightning_sft.model import GPTModel

    model = GPTModel(get_config(run)).to(torch.bfloat16 if bf16 else torch.float32)
    ends: dict[str, Any] = {
        "batch_size": 1_000_000,
        "eos_token_id": None,
    }  # batches are cut by the caller
    return lambda prompts, count: generate(model, prompts, max_new_tokens=count, **ends)


def answer_chapter(run: Namespace) -> Answer:
    """The chapter's `generate`: one prompt, and all of it again for each token."""
    import torch
    from llms_from_scratch.ch05 import generate

    model, context = make_chapter_model(run).eval(), get_config(run).context_length

    def answer(prompts: list[list[int]], count: int) -> list[list[int]]:
        (prompt,) = prompts
        return generate(model, torch.tensor(prompts), count, context)[:, len(prompt) :].tolist()

    return answer


def answer_transformers(run: Namespace, *, bf16: bool) -> Answer:
    """`generate` with its cache, the prompts padded on the left."""
    import torch

    model = make_transformers_model(run).eval().to(torch.bfloat16 if bf16 else torch.float32)

    def answer(prompts: list[list[int]], count: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        pads = [[0] * (longest - len(prompt)) for prompt in prompts]
        ids = torch.tensor([pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
        mask = torch.tensor([pad + [1] * (longest - len(pad)) for pad in pads])
        ends = {"max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        answers = model.generate(ids, attention_mask=mask, do_sample=False, **ends)
        return answers[:, longest:].tolist()

    return answer


def measure_generation(
    prepare: Callable[..., Answer], run: Namespace, rows: int, most: int = 110, **options: Any
) -> dict[str, Any]:
    """Answers to the test prompts, or to `most` of them, evenly picked; like lengths together."""
    from lightning_sft.data import InstructionDataModule

    data = InstructionDataModule(run.data)
    texts = [data.style.prompt(entry) for entry in data.split("test")][: run.prompts]
    prompts = sorted((data.tokenizer.encode(text) for text in texts), key=len)
    prompts = prompts[:: max(len(prompts) // most, 1)][:most]
    batches = [prompts[k : k + rows] for k in range(0, len(prompts), rows)]
    answer = prepare(run, **options)
    answer(batches[0], 2)
    begun = time.perf_counter()
    answers = [ids for batch in batches for ids in answer(batch, run.new_tokens)]
    seconds = time.perf_counter() - begun
    if [len(ids) for ids in answers] != [run.new_tokens] * len(prompts):
        raise SystemExit("an answer ended early")
    rate = len(prompts) * run.new_tokens / seconds
    return {"rate": rate, "peak_gb": peak_memory(), "prompts": len(prompts)}


def get_config(run: Namespace) -> Any:
    from lightning_sft import model

    return model.get_config(run.architecture)


def make_chapter_model(run: Namespace) -> Any:
    from llms_from_scratch.ch04 import GPTModel

    return GPTModel(dataclasses.asdict(get_config(run)))


def make_transformers_model(run: Namespace) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = get_config(run)
    sizes: dict[str, Any] = {
        "n_embd": ours.emb_dim,
        "n_layer": ours.n_layers,
        "n_head": ours.n_heads,
    }
    sizes |= {"vocab_size": ours.vocab_size, "n_positions": ours.context_length}
    dropout: Any = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, tie_word_embeddings=False))


# Name → function and options. A name's first word is whose it is; behind × are the rows.
PACKAGES = {"chapter": "llms_from_scratch", "TRL": "trl", "ours": "lightning_sft"}
PEERS: dict[str, dict[str, tuple[Callable[..., Any], dict[str, Any]]]] = {
    "training": {"chapter fp32": (train_chapter, {})},
    "generation": {"chapter fp32 × 1": (answer_chapter, {"rows": 1, "most": 3})},
}
for _name, _bf16 in (("fp32", {"bf16": False}), ("bf16", {"bf16": True})):
    PEERS["training"] |= {
        f"ours {_name}": (train_ours, _bf16 | {"share_prefix": True}),
        f"ours padded {_name}": (train_ours, _bf16 | {"share_prefix": False}),
        f"transformers {_name}": (train_transformers, _bf16),
        f"TRL {_name}": (train_trl, _bf16),
    }
    PEERS["generation"] |= {
        f"ours {_name} × 1": (answer_ours, _bf16 | {"rows": 1, "most": 4}),
        f"ours {_name} × 8": (answer_ours, _bf16 | {"rows": 8}),
        f"transformers {_name} × 8": (answer_transformers, _bf16 | {"rows": 8}),
        f"ours {_name} × 32": (answer_ours, _bf16 | {"rows": 32}),
        f"transformers {_name} × 32": (answer_transformers, _bf16 | {"rows": 32}),
        f"ours {_name} × 110": (answer_ours, _bf16 | {"rows": 110}),
    }


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    file = Path("/proc/cpuinfo")
    cpu = file.read_text() if file.exists() else ""
    models = [line.split(": ")[1] for line in cpu.splitlines() if line.startswith("model name")]
    built = torch.__config__.show().splitlines()
    packages = ["lightning-sft", "torch", "lightning", "llms-from-scratch", "transformers", "trl"]
    found = [name for name in packages if importlib.util.find_spec(name.replace("-", "_"))]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": os.cpu_count(),
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": [f for f in ("avx512_bf16", "amx_bf16") if f in cpu],
        "blas": [line.strip(" -") for line in built if "Math Kernel" in line or "DNN v" in line],
        "threads": torch.get_num_threads(),
        "load before": os.getloadavg()[0],
        "versions": {name: version(name) for name in found},
    }


def run_job(part: str, name: str, run: Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(run.threads)
    torch.manual_seed(SEED)
    if part == "machine":
        return describe_machine()
    function, options = PEERS[part][name]
    measure = measure_training if part == "training" else measure_generation
    return measure(function, run, **options)


def start_job(part: str, name: str, run: Namespace) -> dict[str, Any]:
    """One measurement in a process of its own, which prints its result as the last line."""
    job = json.dumps([part, name, vars(run)])
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--job", job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part}, {name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


Results = dict[str, list[dict[str, Any]]]


def measure_in_turn(part: str, repeats: int, run: Namespace, left_out: str) -> Results:
    """Every peer once, then every peer again, but for those whose name holds `left_out`."""
    names = [name for name in PEERS[part] if not left_out or left_out not in name]
    needed = {name: PACKAGES.get(name.split()[0], "transformers") for name in names}
    results: Results = {name: [] for name in needed if importlib.util.find_spec(needed[name])}
    for name, package in needed.items():
        if name not in results:
            print(f"skipped: {name} ({package} is not installed)")
    for number in range(1, repeats + 1):
        for name, rounds in results.items():
            rounds.append(start_job(part, name, run))
            print(f"{part} {number}/{repeats} {name}: {rounds[-1]['rate']:.1f}", flush=True)
    seen = {str(result.get("supervised")) for rounds in results.values() for result in rounds}
    if len(seen) > 1:
        raise SystemExit(f"the peers did not train on the same targets: {seen}")
    return results


def tabulate(part: str, results: Results) -> str:
    """A Markdown table: medians over the rounds, and how many times as fast ours is."""

    def show(name: str, field: str, form: str) -> str:
        values = [result[field] for result in results.get(name, []) if field in result]
        return format(median(values), form) if values else "–"

    head = [part, "tokens/s", "lowest–highest", "peak GB", "matrix products", "Lightning's own"]
    lines = [[*head, "ours fp32 is", "ours bf16 is"], ["---"] * 8]
    for name, rounds in results.items():
        rates = [result["rate"] for result in rounds]
        cells = [name, f"{median(rates):.1f}", f"{min(rates):.1f}–{max(rates):.1f}"]
        cells += [show(name, "peak_gb", ".2f"), show(name, "products", ".0%")]
        cells += [show(name, "overhead", ".1%")]
        for precision in ("fp32", "bf16"):
            # The same number of rows for one that takes batches, all for the chapter's one by one.
            rows = name.partition(" × ")[2]
            same = f" × {'110' if name.startswith('chapter') else rows}" if rows else ""
            ours = show(f"ours {precision}{same}", "rate", "")
            cells.append("–" if ours == "–" else f"{float(ours) / median(rates):.2f}×")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(results: dict[str, Results], path: Path) -> None:
    """Bars of the median rates, one panel for each part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 5), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        peers = results[part]
        rates = [median(result["rate"] for result in rounds) for rounds in peers.values()]
        colours = ["C0" if name.startswith("ours") else "C7" for name in peers]
        axes.bar_label(axes.barh(list(peers), rates, color=colours), fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(f"{part}, tokens a second")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure training and generation beside peers.")
    book = os.environ.get("LIGHTNING_SFT_BOOK_DATA") or BOOK_DATA_URL
    parser.add_argument("--data", default=book, help="the chapter's instruction-data.json")
    parser.add_argument("--only", choices=list(PEERS))
    parser.add_argument("--architecture", default="gpt2-small", help="or JSON of GPTConfig fields")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all peers")
    parser.add_argument("--steps", type=int, default=6, help="timed training steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no_bf16", action="store_true", help="for processors that emulate it")
    parser.add_argument("--quick", action="store_true", help="one round, little of everything")
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.job:
        part, name, settings = options.job
        print("\n" + json.dumps(run_job(part, name, Namespace(**settings))))
        return
    repeats, steps, new_tokens, prompts = options.repeats, options.steps, 64, 110
    if options.quick:
        repeats, steps, new_tokens, prompts = 1, 2, 8, 16
    architecture = options.architecture
    if architecture.startswith("{"):
        architecture = json.loads(architecture)
    run = Namespace(data=options.data, architecture=architecture, steps=steps)
    run.threads, run.new_tokens, run.prompts = options.threads, new_tokens, prompts
    machine = start_job("machine", "", run)
    print(json.dumps(machine, indent=4), flush=True)
    parts = [options.only] if options.only else list(PEERS)
    left_out = "bf16" if options.no_bf16 else ""
    results = {part: measure_in_turn(part, repeats, run, left_out) for part in parts}
    table = "\n".join(tabulate(part, results[part]) for part in parts)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "settings": vars(run) | {"repeats": repeats}} | results
    (options.out / "results.json").write_text(json.dumps(record, indent=4))
    (options.out / "results.md").write_text(table)
    draw(results, options.out / "results.png")
    print("\n" + table)


if __name__ == "__main__":
    main()
