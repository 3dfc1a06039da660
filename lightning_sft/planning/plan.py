"""`plan`: what a configuration will cost, before it is run.

Counts parameters, estimates the memory of a training step (`footprint.py`), finds the longest batch
(`outlook.py`), runs a few real steps on the longest batches with random weights, and extrapolates
the time of the whole run. Where a step will not fit it names a `batch_size` and
`accumulate_grad_batches` that do and make the same update: the loss is divided by the supervised
tokens of the whole optimizer step, so 8 × 1 and 4 × 2 are one and the same. Nothing is downloaded
but the data, nothing is written.

    python -m lightning_sft plan --config gpt2-medium.yaml --memory_gb 16
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_sft.common.arguments import PROGRAM
from lightning_sft.common.errors import IncompleteError, InputError
from lightning_sft.common.parser_messages import explain, option_names
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.models.ready import find_device
from lightning_sft.planning.footprint import (
    Memory,
    count_devices,
    count_parameters,
    estimate_memory,
    free_memory,
)
from lightning_sft.planning.outlook import Outlook
from lightning_sft.planning.stand_in import PlannedModule
from lightning_sft.training.cli import SFTCLI, allow_imports, check_numbers
from lightning_sft.training.lightning_internals import command_line
from lightning_sft.training.module import SFTModule

GB = 1e9


@dataclass(frozen=True)
class Cost:
    """What the probe found: seconds per computed token and per optimizer step.

    Args:
        forward: Seconds per token of a pass without gradients.
        train: Seconds per token of a pass forward and back.
        step: Seconds of one optimizer step.
    """

    forward: float
    train: float
    step: float


class PlanCLI(SFTCLI):
    """`fit`'s own parser and links, without a trainer, a run folder or weights."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        # What else a config of `fit` may hold; not looked at.
        parser.add_method_arguments(Trainer, "fit", skip=set(LightningCLI.subcommands()["fit"]))
        parser.add_argument(
            "--memory_gb", type=float | None, default=None, help="budget; by default what is free"
        )
        parser.add_argument("--probe_steps", type=int, default=3, help="steps to time; 0 for none")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            LightningCLI.parse_arguments(self, parser, args)
        except (jsonargparse.ArgumentError, OverflowError) as error:
            raise InputError(f"plan: {explain(str(error), option_names(parser))}") from None
        check_numbers(self.config.as_dict(), "")

    def resolve_checkpoint(self) -> None:
        """A plan starts from nothing."""

    def set_seed(self) -> None:
        """The order of the batches and the random weights have seeds of their own."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def instantiate_classes(self) -> None:
        """Make the model and the data; of the trainer only its plain settings are wanted."""
        for name in ("callbacks", "logger", "plugins", "profiler"):
            self.config.trainer[name] = None
        super().instantiate_classes()
        self.datamodule.tokenizer = self.model.tokenizer  # no trainer brings the two together


def plan(arguments: list[str]) -> int:
    """Print what a configuration will cost.

    Args:
        arguments: The command line behind `plan`; the options of `fit`, and `--memory_gb` and
            `--probe_steps`.

    Returns:
        0.

    Raises:
        InputError: The command line, a config or the data is wrong.
        IncompleteError: A step does not fit the memory; names what would.
    """
    cli = _parse(arguments)
    if cli.config.probe_steps < 0 or not (cli.config.memory_gb or 1.0) > 0:
        raise InputError("plan: probe_steps must be >= 0 and memory_gb positive")
    trainer, data, module = cli.config.trainer, cli.datamodule, cli.model
    if module.objective is not None or data.has_pairs:
        raise InputError(
            "plan: does not count preference tuning; plan the same model with "
            "--model.objective null and data.format instruction: a pair costs two rows, a frozen "
            "reference (none with LoRA) the weights once more"
        )
    device, budget = find_device(trainer.accelerator), cli.config.memory_gb
    budget = budget * GB if budget is not None else free_memory(device or torch.device("cpu"))
    devices, precision = count_devices(trainer), str(trainer.precision or "32-true")
    outlook = Outlook(data, devices, trainer)
    estimate = estimate_memory(module, outlook.longest, precision, devices, outlook.sharded)
    _print_plan(module, outlook, estimate, budget)
    if estimate.total > budget:
        raise IncompleteError(_explain_misfit(module, outlook, estimate, budget, precision))
    if device is None:
        print(f"no time estimate: there is no accelerator {trainer.accelerator!r} here to probe")
    elif cli.config.probe_steps > 0:
        cost = probe(module, outlook, device, precision, cli.config.probe_steps)
        _print_time(outlook, cost, cli.config.loss_curve, device)
    return 0


def suggest_batch(
    module: SFTModule, outlook: Outlook, precision: str, budget: float
) -> tuple[int, int] | None:
    """The largest batch that fits and divides the wanted one, and how many of it make a step.

    It is of so many rows, or tokens where `data.max_tokens` is set.
    """
    wanted = outlook.data.config.max_tokens or outlook.data.batch_size
    for size in outlook.smaller_sizes():
        shape = outlook.longest_of(size)
        needed = estimate_memory(module, shape, precision, outlook.devices, outlook.sharded)
        if needed.total <= budget:
            return size, outlook.accumulate * (wanted // size)
    return None


def probe(
    module: SFTModule, outlook: Outlook, device: torch.device, precision: str, steps: int
) -> Cost:
    """Time real steps on the longest batches; the first one only warms up."""
    module.weights = None  # random ones cost the same
    module.configure_model()
    module.to(device).train()
    optimizer: Any = None
    forward, train, update = [], [], []
    for place in range(steps + 1):
        rows = outlook.by_size[max(place - 1, 0) % len(outlook.by_size)]
        tokens = outlook.shape(rows).tokens
        batch = outlook.data.make_batch([outlook.rows[row] for row in rows])
        batch = {name: value.to(device) for name, value in batch.items()}
        optimizer = optimizer or make_optimizer(module)
        with _autocast(device, precision):
            with torch.no_grad():
                begun = _now(device)
                module.sum_loss(batch)
                forward.append((_now(device) - begun) / tokens)
            begun = _now(device)
            loss, count = module.sum_loss(batch)
        (loss / count).backward()
        train.append((_now(device) - begun) / tokens)
        begun = _now(device)
        optimizer.step()
        optimizer.zero_grad()
        update.append(_now(device) - begun)
    return Cost(*(sum(times[1:]) / steps for times in (forward, train, update)))


def make_optimizer(module: SFTModule) -> torch.optim.Optimizer:
    """The optimizer as `fit` makes it, without its schedule."""
    module.lr_scheduler = None
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def predict_seconds(outlook: Outlook, cost: Cost, loss_curve: Any) -> tuple[float, float]:
    """Seconds that the whole run trains, and that it spends on evaluation losses."""
    per_epoch = outlook.train_tokens() * cost.train
    share = outlook.steps / max(outlook.steps_per_epoch, 1)
    training = share * per_epoch + outlook.steps * cost.step
    evaluated = outlook.epochs * outlook.eval_tokens("val")
    if loss_curve.every_n_steps:
        points = 1 + -(-outlook.steps // loss_curve.every_n_steps)
        few = loss_curve.num_batches
        evaluated += points * (outlook.eval_tokens("train", few) + outlook.eval_tokens("val", few))
    return training, evaluated * cost.forward


def _parse(arguments: list[str]) -> PlanCLI:
    with command_line(allow_imports(arguments)):
        return PlanCLI(
            PlannedModule,
            InstructionDataModule,
            save_config_callback=None,
            run=False,
            seed_everything_default=123,
            auto_configure_optimizers=False,
            parser_kwargs={
                "exit_on_error": False,
                "default_env": False,
                "allow_abbrev": False,
                "prog": f"{PROGRAM} plan",
            },
        )


def _autocast(device: torch.device, precision: str) -> Any:
    if "mixed" in precision:
        dtype = torch.bfloat16 if "bf16" in precision else torch.float16
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _print_plan(module: PlannedModule, outlook: Outlook, memory: Memory, budget: float) -> None:
    total, trained = count_parameters(module)
    shape, data = outlook.longest, outlook.data
    print(f"parameters   {total:,}, {trained:,} of them trained")
    print(
        f"batches      {outlook.batches} an epoch of {_describe_size(data)} on each of "
        f"{outlook.devices} device(s); {outlook.steps_per_epoch} optimizer steps an epoch, "
        f"{outlook.steps} in all"
    )
    print(
        f"longest      {shape.rows} rows of up to {shape.width} tokens, {shape.tokens:,} computed"
    )
    if module.counts_by_stand_in:
        print(
            "             counted with GPT-2's tokenizer, as the model's own is not here; give its "
            "folder or GGUF as model.tokenizer"
        )
    print("memory       estimate for one device, in GB")
    for name in ("weights", "gradients", "optimizer", "activations", "head"):
        print(f"  {name:<11}{getattr(memory, name) / GB:8.3f}")
    print(f"  {'together':<11}{memory.total / GB:8.3f} of {budget / GB:.3f}")


def _explain_misfit(
    module: SFTModule, outlook: Outlook, memory: Memory, budget: float, precision: str
) -> str:
    message = (
        f"plan: a step of {_describe_size(outlook.data)} takes {memory.total / GB:.3g} GB, "
        f"{budget / GB:.3g} are there"
    )
    counts_tokens = outlook.data.config.max_tokens is not None
    pair = suggest_batch(module, outlook, precision, budget)
    if pair is None:
        least = f"{int(outlook.lengths.max())} tokens, the longest row," if counts_tokens else ""
        fixed = memory.weights + memory.gradients + memory.optimizer
        return (
            f"{message}; {least or 'one row'} does not fit either, weights, gradients and "
            f"optimizer alone take {fixed / GB:.3g} GB; take a smaller model or "
            "trainer.precision bf16-true"
        )
    option = "max_tokens" if counts_tokens else "batch_size"
    nearly = "nearly " if counts_tokens or outlook.data.config.group_by_length else ""
    return (
        f"{message}; use --data.{option} {pair[0]} --trainer.accumulate_grad_batches {pair[1]}"
        f", for {nearly}the same steps"
    )


def _describe_size(data: InstructionDataModule) -> str:
    """How much a micro-batch holds on one device."""
    tokens = data.config.max_tokens
    return f"{data.batch_size} rows" if tokens is None else f"at most {tokens:,} tokens"


def _print_time(outlook: Outlook, cost: Cost, loss_curve: Any, device: torch.device) -> None:
    training, evaluation = predict_seconds(outlook, cost, loss_curve)
    longest = outlook.longest.tokens * cost.train * outlook.accumulate + cost.step
    print(f"a step       {longest:.2f} s at most on this {device.type}, random weights")
    print(
        f"time         {_clock(training)} of training, {_clock(evaluation)} of evaluation losses; "
        "sampling and start-up come on top"
    )
    if device.type == "cuda":
        print(f"measured     {torch.cuda.max_memory_allocated(device) / GB:.3f} GB at the peak")


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
