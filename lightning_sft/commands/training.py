"""`fit`, `validate`, `test` and `predict` at the command line.

python -m lightning_sft fit --config gpt2-medium.yaml --trainer.max_epochs 1
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sft.common.arguments import (
    CONFIG,
    PROGRAM,
    find_option,
    option_values,
    without_option,
)
from lightning_sft.common.config_files import read_config
from lightning_sft.common.errors import InputError, LightningSFTError, ServiceError
from lightning_sft.common.hub import find_repository
from lightning_sft.common.parser_messages import explain
from lightning_sft.data.datamodule import InstructionDataModule
from lightning_sft.data.find_tokenizer import tokenizer_folder
from lightning_sft.data.prompts import style_of_run
from lightning_sft.data.records import read_records
from lightning_sft.judging.metrics import exact_match, token_f1
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.models.lora import final_architecture
from lightning_sft.models.lora_checkpoint import saved_config
from lightning_sft.runs.run_folder import RunClaim, checkpoint_in, run_of
from lightning_sft.training.cli import RUN_FOLDER_VARIABLE, SFTCLI, SaveRunConfig, allow_imports
from lightning_sft.training.lightning_internals import (
    command_line,
    is_misuse,
    lost_peer,
    quieten,
)
from lightning_sft.training.module import SFTModule
from lightning_sft.training.response_writer import ResponseWriter
from lightning_sft.training.signals import die_with

LAUNCHER_VARIABLE = "LIGHTNING_SFT_LAUNCHER"  # whose death is to be that of its ranks


def run_training(subcommand: str, arguments: list[str]) -> int:
    """Parse `arguments` and run one of LightningCLI's subcommands.

    Raises:
        InputError: The command line or a config is wrong.
    """
    cli = _run(subcommand, arguments)
    if subcommand == "predict" and cli.trainer.is_global_zero:
        _print_likeness(cli.trainer)
    return 0


def measure_validation(arguments: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """`validate`, with what it found as values.

    Args:
        arguments: As for `validate`; `--ckpt_path` among them.

    Returns:
        The run folder of the checkpoint (None but on the first rank); loss and perplexity, the
        checkpoint's step, and how many parameters there are and are trained.
    """
    cli = _run("validate", arguments)
    if cli.checkpoint is None:
        raise InputError("recipes loss: --ckpt_path is missing")
    parameters = list(cli.model.parameters())
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    found["step"] = cli.facts["step"] if cli.facts else 0
    found["parameters"] = sum(p.numel() for p in parameters)
    found["trained"] = sum(p.numel() for p in parameters if p.requires_grad)
    return (cli.checkpoint.parent.parent if cli.trainer.is_global_zero else None), found


def _run(subcommand: str, arguments: list[str]) -> SFTCLI:
    quieten()
    known = os.environ.get(RUN_FOLDER_VARIABLE)
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None:  # this is a rank that Lightning started
        die_with(int(launcher))
    arguments = allow_imports(arguments)
    paths = option_values(arguments, *CONFIG)
    arguments = use_checkpoint_config(arguments)
    if paths and find_option(arguments, "--run.name") is None:
        arguments = [f"--run.name={Path(paths[0]).stem}", *arguments]
    settings: dict[str, Any] = {"exit_on_error": False, "default_env": False}
    settings |= {"allow_abbrev": False, "prog": f"{PROGRAM} {subcommand}"}
    try:
        os.environ.setdefault(LAUNCHER_VARIABLE, str(os.getpid()))
        with command_line([subcommand, *arguments]), RunClaim() as claim:
            return SFTCLI(
                SFTModule,
                InstructionDataModule,
                claim=claim,
                save_config_callback=SaveRunConfig,
                seed_everything_default=123,
                auto_configure_optimizers=False,
                parser_kwargs={**settings, subcommand: settings},
            )
    except LightningSFTError:
        raise
    except (MisconfigurationException, ValueError) as error:
        if not isinstance(error, MisconfigurationException) and not is_misuse(error):
            raise
        raise InputError(f"{subcommand}: {explain(str(error))}") from None
    except RuntimeError as error:
        reason = lost_peer(error)
        if reason is None:
            raise
        raise ServiceError(
            f"{subcommand}: another process of this run is gone ({reason}); its own output says "
            "why; go on with --ckpt_path last"
        ) from error
    finally:
        if known is None:
            os.environ.pop(RUN_FOLDER_VARIABLE, None)
        if launcher is None:
            os.environ.pop(LAUNCHER_VARIABLE, None)


def use_checkpoint_config(arguments: list[str]) -> list[str]:
    """Without `--config`, take the configuration of the run that a checkpoint belongs to.

    A checkpoint away from its run folder brings its own hyperparameters. Explicit options come
    behind and win. A `.pth` given as checkpoint becomes the model's weights, and so does a name of
    the hub.
    """
    path = find_option(arguments, "--ckpt_path")
    if path is None or path in ("last", "best") or "://" in path:
        return arguments
    if find_repository(path) is not None:
        is_said = bool(option_values(arguments, "--model.architecture"))
        arguments = [*without_option(arguments, "--ckpt_path"), f"--model.weights={path}"]
        return arguments if is_said else [*arguments, "--model.architecture=auto"]
    checkpoint = checkpoint_in(path).resolve()
    if not checkpoint.is_file():
        return arguments
    is_checkpoint = checkpoint.suffix == ".ckpt"
    what = "--ckpt_path" if is_checkpoint else "--model.weights"
    arguments = [*without_option(arguments, "--ckpt_path"), f"{what}={checkpoint}"]
    if option_values(arguments, *CONFIG):
        return arguments
    if (run := run_of(checkpoint)) is not None:
        merged = [] if is_checkpoint else _describe_merged(run / "config.yaml")
        if tokenizer_folder(checkpoint) == run:
            merged.append(f"--model.tokenizer={run}")
        return [f"--config={run / 'config.yaml'}", *merged, *arguments]
    if not is_checkpoint:
        raise InputError(f"ckpt_path: {path} does not say its architecture; give --config")
    hparams = read_checkpoint(checkpoint)["hyper_parameters"]
    source = hparams.get("tokenizer")
    base = [f"--model.tokenizer={source}"] if source else []
    if (adapted := saved_config(hparams)) is not None:
        base += [
            f"--model.lora={json.dumps(adapted.as_dict())}",
            f"--model.weights={hparams.get('weights') or 'null'}",
            f"--seed_everything={hparams.get('seed', 123)}",
        ]
    return [
        *base,
        f"--model.architecture={json.dumps(hparams['architecture'])}",
        f"--data.prompt_style={json.dumps(hparams['prompt_style'])}",
        f"--data.header_in_prompt={json.dumps(hparams['header_in_prompt'])}",
        *arguments,
    ]


def _describe_merged(config: Path) -> list[str]:
    """Options for a run's `.pth`: the style it learned; of LoRA, adapters merged, its own head."""
    settings = read_config(config)
    model, style = settings.get("model", {}), style_of_run(settings.get("data", {}))
    options = [f"--data.prompt_style={json.dumps(style)}"] if isinstance(style, dict) else []
    if not model.get("lora"):
        return options
    architecture = json.dumps(dataclasses.asdict(final_architecture(model)))
    return [*options, "--model.lora=null", f"--model.architecture={architecture}"]


def _print_likeness(trainer: Trainer) -> None:
    """How near the answers are to the wanted ones, for a first look; `report` says more."""
    writer = next(c for c in trainer.callbacks if isinstance(c, ResponseWriter))  # type: ignore[attr-defined]
    records = read_records(writer.path)
    pairs = [(record["model_response"], record["output"]) for record in records]
    if not all(wanted for _, wanted in pairs):
        return
    identical = sum(answer == wanted for answer, wanted in pairs)
    exact, f1 = (
        sum(metric(answer, wanted) for answer, wanted in pairs) / len(pairs)
        for metric in (exact_match, token_f1)
    )
    share = 100 * identical / len(pairs)
    print(
        f"  identical     {share:5.1f} %  ({identical} of {len(pairs)})\n"
        f"  exact match   {exact:5.1f} %  (but for case, stops, articles)\n"
        f"  token F1      {f1:5.1f} %"
    )
