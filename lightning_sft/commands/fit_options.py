"""The options of `fit` and its kin: the help page that shows the usual ones, and a check of names.

Both come before torch is imported, so that a misspelt option is answered at once. The names are
read off the source of the classes that take them, Lightning's Trainer included, as a list would be
right for one version only; whether they are all is for the parser to say, which comes later.

    python -m lightning_sft fit --help        # about fifty options
    python -m lightning_sft fit --help=all    # all, with types and the Trainer's own descriptions

This module does not import torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.arguments import CONFIG, PROGRAM, nearest, option_values
from lightning_sft.common.config_files import read_config
from lightning_sft.common.errors import InputError

PLAIN = ("allow_import", "check_device", "config", "help", "print_config", "seed_everything")
# Section of a config → the classes that take what is in it; the Trainer's methods take the rest.
TAKERS = {
    "checkpoints": [("lightning_sft", "training/checkpoint.py", "Checkpoints")],
    "data": [
        ("lightning_sft", "data/datamodule.py", "InstructionDataModule"),
        ("lightning_sft", "data/config.py", "DataConfig"),
    ],
    "generation": [("lightning_sft", "decoding/settings.py", "GenerationConfig")],
    "loss_curve": [("lightning_sft", "training/callbacks.py", "LossCurve")],
    "model": [("lightning_sft", "training/module.py", "SFTModule")],
    "run": [("lightning_sft", "training/cli.py", "RunConfig")],
    "samples": [("lightning_sft", "training/callbacks.py", "SampleResponses")],
    "trainer": [("lightning", "pytorch/trainer/trainer.py", "Trainer")],
}
METHODS = ("fit", "validate", "test", "predict")  # of the Trainer, with options of their own
OF_COMMAND = {
    "plan": {
        "memory_gb": "budget in GB; by default what is free",
        "probe_steps": "steps to time; 0 for none",
    }
}
SHOWN = {
    "what to run": {
        "config": "YAML file, here or shipped; later ones win key by key",
        "ckpt_path": "checkpoint or run folder; last; best",
        "run.dir": "folder of all runs",
        "run.name": "its folder in it; default: the first config's name",
        "seed_everything": "decides order, dropout and random weights",
        "allow_import": "let configs name this module's classes; repeatable",
    },
    "model": {
        "model.architecture": "a name such as gpt2-small, or a mapping",
        "model.weights": "a name, file or folder to begin with; null: random",
        "model.lora": "{rank, alpha, dropout, targets}: adapters beside frozen weights",
        "model.objective": "lightning_sft.DPO learns from preferences",
        "model.optimizer": "class of torch.optim; its options: model.optimizer.lr …",
        "model.lr_scheduler": "class, such as lightning_sft.WarmupCosine",
        "model.activation_checkpointing": "compute activations twice and keep few",
        "model.compile": "torch.compile each block",
    },
    "data": {
        "data.path": "JSON, CSV, Parquet …, folder or URL; default: the chapter's",
        "data.format": "instruction, messages, sharegpt …; auto: by its fields",
        "data.mixture": "several files, each {path, weight} or {path, share}",
        "data.val_path": "validation entries from a file of their own",
        "data.test_path": "test entries likewise",
        "data.fractions": "shares of train, test, validation",
        "data.field_names": "the file's names where they differ: {input: context}",
        "data.prompt_style": "alpaca, phi3, chatml, template …, or a mapping",
        "data.mask_prompt": "loss on the answers alone",
        "data.train_on": "of these all, the last, or what other roles say",
        "data.max_length": "most tokens of a row",
        "data.overlong": "longer rows: truncate, drop or error",
        "data.batch_size": "rows a micro-batch on one device",
        "data.max_tokens": "instead, its most tokens",
        "data.num_workers": "processes that batch ahead",
        "data.share_prefix": "compute once what rows have in common",
    },
    "training": {
        "trainer.max_epochs": "passes over the data",
        "trainer.max_steps": "optimizer steps, if they are fewer",
        "trainer.max_time": "DD:HH:MM:SS, if it is over first",
        "trainer.accumulate_grad_batches": "micro-batches an optimizer step",
        "trainer.gradient_clip_val": "greatest norm of the gradient",
        "trainer.precision": "32-true, bf16-mixed, bf16-true …",
        "trainer.accelerator": "auto, cpu, gpu, mps",
        "trainer.devices": "how many, or which",
        "trainer.strategy": "auto, ddp, sharded …",
        "trainer.limit_train_batches": "part or number of an epoch's micro-batches",
        "trainer.val_check_interval": "validate within the epoch: its part, or micro-batches",
        "trainer.callbacks": "further ones; trainer.callbacks+=CLASS adds one",
        "trainer.logger": "further ones beside metrics.csv; false: no TensorBoard",
        "trainer.fast_dev_run": "try a few micro-batches, write nothing",
    },
    "what is kept and shown": {
        "checkpoints.every_n_steps": "save in between, too; each epoch's end is",
        "checkpoints.keep_last": "how many of the newest stay",
        "loss_curve.every_n_steps": "the chapter's evaluation; 0 for none",
        "loss_curve.num_batches": "of how many batches",
        "samples.indices": "validation entries answered after each epoch",
    },
    "answers": {
        "generation.max_new_tokens": "most tokens of an answer",
        "generation.temperature": "0 is greedy",
        "generation.top_k": "of the likeliest tokens",
        "generation.top_p": "of the likeliest tokens that make up this part",
        "generation.batch_size": "prompts at once",
    },
}


def option_page(command: str, summary: str) -> str:
    """The help page of `fit` or a command that takes its options."""
    defaults = known_options()
    groups = {command: OF_COMMAND[command]} if command in OF_COMMAND else {}
    lines = [f"usage: {PROGRAM} {command} [CONFIG.yaml ...] [--OPTION VALUE ...]", "", summary]
    for title, options in (groups | SHOWN).items():
        lines += ["", f"{title}:"]
        for name, text in options.items():
            section, _, key = name.rpartition(".")
            default = _plain(defaults.get(section, {}).get(key))
            lines.append(f"  --{name:<32}{text}" + (f" [{default}]" if default else ""))
    return "\n".join([*lines, "", f"all options: {PROGRAM} {command} --help=all"])


def _plain(default: str | None) -> str:
    """A default as one would type it; empty where there is none, or no plain value."""
    try:
        value = ast.literal_eval(default or "None")
    except ValueError:
        return ""
    return "" if value is None else str(value).strip("()").rstrip(",")


def check_options(command: str, arguments: list[str]) -> None:
    """Refuse options and keys of configs that nobody takes.

    Args:
        arguments: What follows the command's name, config names already resolved to paths.

    Raises:
        InputError: Names the option or key, and the nearest there is.
    """
    known = known_options()
    plain = {*PLAIN, *known[""], *OF_COMMAND.get(command, {})}
    names = [*plain, *(f"{section}.{key}" for section in known for key in known[section])]

    def is_known(name: str) -> bool:
        section, *keys = name.split(".")
        key = keys[0].rstrip("+") if keys else ""
        if section in TAKERS:  # not found in the source: for the parser to decide
            return not keys or not known[section] or key in known[section] or key == "help"
        return section in plain

    for argument in arguments:
        name = argument[2:].partition("=")[0].rstrip("+")
        if argument.startswith("--") and name and not is_known(name):
            raise InputError(f"{command}: unknown option --{name}{nearest(name, names)}")
    for path in option_values(arguments, *CONFIG):
        for name in _keys(read_config(Path(path).expanduser())):
            if not is_known(name):
                raise InputError(f"{path}: unknown key {name!r}{nearest(name, names)}")


@functools.cache
def known_options() -> dict[str, dict[str, str | None]]:
    """Section → what it may hold, with its default as source text; "" holds what has no section."""
    known: dict[str, dict[str, str | None]] = {}
    for section, takers in TAKERS.items():
        known[section] = {}
        for place in takers:
            known[section] |= _parameters(*place)
    trainer = TAKERS["trainer"][0]
    known[""] = {name: None for method in METHODS for name in _parameters(*trainer, method)}
    known["trainer"] |= {"max_epochs": "2", "log_every_n_steps": "1"}  # as SFTCLI sets them
    return known


def _parameters(
    package: str, file: str, owner: str, method: str = "__init__"
) -> dict[str, str | None]:
    """What a class takes: a method's arguments, or the fields of a dataclass."""
    found = importlib.util.find_spec(package)  # of a top-level package: imports nothing
    places = found.submodule_search_locations if found else None
    path = Path(places[0]) / file if places else Path()
    if not path.is_file():
        return {}
    for node in ast.walk(ast.parse(files.read_text(path))):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == method:
                    return dict(_arguments(part.args))
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return {
                ast.unparse(field.target): ast.unparse(field.value) if field.value else None
                for field in fields
            }
    return {}


def _arguments(arguments: ast.arguments) -> Iterator[tuple[str, str | None]]:
    by_place = [*arguments.posonlyargs, *arguments.args][1:]  # without self
    defaults = [*arguments.defaults]
    missing: list[Any] = [None] * (len(by_place) - len(defaults))
    for one, default in zip(by_place, [*missing, *defaults], strict=True):
        yield one.arg, ast.unparse(default) if default else None
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield one.arg, ast.unparse(default) if default else None


def _keys(config: dict[str, Any]) -> Iterator[str]:
    """The first two words of each key, with a dot: what `--data.path` would be."""
    for section, settings in config.items():
        if isinstance(settings, dict) and settings and section in TAKERS:
            yield from (f"{section}.{key}" for key in settings)
        else:
            yield str(section)
