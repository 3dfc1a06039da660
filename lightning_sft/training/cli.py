"""`fit`, `validate`, `test` and `predict`: LightningCLI with one owner for each value.

What a user writes once is linked to wherever it is needed. A run gets a fresh folder
`runs/<name>/version_N`; going on from a checkpoint writes into that checkpoint's own folder.

    python -m lightning_sft fit --config gpt2-medium.yaml --trainer.max_epochs 1
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_sft.common import files
from lightning_sft.common.arguments import explain, option_names
from lightning_sft.common.errors import InputError, LightningSFTError
from lightning_sft.data.prompts import get_style
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.models.lora import LoRAConfig
from lightning_sft.models.lora_checkpoint import saved_config
from lightning_sft.models.registry import get_config
from lightning_sft.runs.run_folder import RunClaim
from lightning_sft.training.callbacks import LossCurve, SampleResponses, Throughput
from lightning_sft.training.checkpoint import (
    STEP_METRICS,
    Checkpoints,
    DurableCheckpointIO,
    FinalWeights,
    find_checkpoint,
)
from lightning_sft.training.device_check import DeviceCheck
from lightning_sft.training.loggers import EventsLogger, MetricsFile, folder_of, rewind
from lightning_sft.training.response_writer import ResponseWriter
from lightning_sft.training.signals import StopOnSignal

# What a config's class_path may name. Anything else, importable or not, is refused: a config is
# something people download.
ALLOWED_CLASSES = [
    "lightning_sft",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.optim",
]
RUN_FOLDER_VARIABLE = "LIGHTNING_SFT_RUN_FOLDER"  # how a rank's child processes learn the folder


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes.

    Args:
        dir: The folder of all runs.
        name: This run's folder in it; the first config's name by default.
    """

    dir: str = "runs"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[\w][\w.+ -]*", self.name):
            raise InputError(
                f"run.name: {self.name!r} is not allowed; letters, digits, '_', '-', '.' and '+'"
            )


class SFTCLI(LightningCLI):
    """LightningCLI with the project's links, run folder and indispensable callbacks.

    Args:
        claim: Takes the run folder, and outlives this object.
    """

    def __init__(self, *args: Any, claim: RunClaim | None = None, **kwargs: Any) -> None:
        self.claim = claim or RunClaim()
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the one asked for: making all four parsers takes more than a second."""
        return {sys.argv[1]: LightningCLI.subcommands()[sys.argv[1]]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(GenerationConfig, "generation")
        parser.add_class_arguments(RunConfig, "run")
        parser.add_lightning_class_args(SampleResponses, "samples")
        parser.add_lightning_class_args(LossCurve, "loss_curve")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_argument(
            "--check_device",
            type=bool,
            default=True,
            help="compare a GPU's first logits with the CPU's, and refuse a device that is wrong",
        )
        for source, target in (
            ("data.prompt_style", "model.prompt_style"),
            ("data.header_in_prompt", "model.header_in_prompt"),
            ("data.max_length", "model.max_length"),
            ("generation", "model.generation"),
            ("generation.batch_size", "data.predict_batch_size"),
        ):
            parser.link_arguments(source, target)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.set_defaults({"trainer.max_epochs": 2, "trainer.log_every_n_steps": 1})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            subcommand = sys.argv[1]
            allowed = option_names(self._subcommand_parsers[subcommand])
            raise InputError(f"{subcommand}: {explain(str(error), allowed)}") from None

    def _set_seed(self) -> None:
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything: {seed} is outside 0 to {2**32 - 1}")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Resolve `last` and `best`. The config keeps its say; LightningCLI would overrule it."""
        config = self.config[self.config.subcommand]
        self.checkpoint: Path | None = None
        self._facts: dict[str, Any] | None = None
        if config.ckpt_path is not None:
            self.checkpoint = find_checkpoint(config.ckpt_path, _run_parent(config))
            config.ckpt_path = str(self.checkpoint)
            self._facts = _compare(self.checkpoint, config)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except LightningSFTError:
            raise
        except (MisconfigurationException, TypeError, ValueError) as error:
            # Whatever a class's constructor says of its arguments is the user's to mend.
            raise InputError(f"{self.subcommand or 'plan'}: {explain(str(error))}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        callbacks: list[Any] = []
        if self._get(self.config, "check_device"):
            callbacks.append(DeviceCheck())
        if self.checkpoint is not None and self.model.lora is None:
            # It holds all weights: those that training began with need not be there any more.
            self.model.weights = None
        if self.subcommand == "fit":
            folder = self._folder()
            checkpoints = self._get(self.config_init, "checkpoints")
            callbacks += [Throughput(), FinalWeights(), StopOnSignal(checkpoints)]
            if trainer.get("logger") in (None, True):
                kwargs["logger"] = [
                    EventsLogger(folder, self._facts["step"] if self._facts else None),
                    MetricsFile(folder),
                ]
        else:
            kwargs["logger"] = False
        if self.subcommand == "predict":
            if self.checkpoint is None:
                source = self.model.weights or "none, so they are random"
                rank_zero_only(print)(
                    "note: no checkpoint is loaded; the answers are those of the starting weights "
                    f"(model.weights: {source})"
                )
            callbacks += [ResponseWriter(self._folder()), StopOnSignal()]
            kwargs["enable_progress_bar"] = False  # the writer's own bar counts entries
        elif not sys.stdout.isatty() and trainer.get("enable_progress_bar") is not False:
            # rich, where it is installed, prints nothing at all into a file.
            callbacks.append(TQDMProgressBar(refresh_rate=20))
        plugins = trainer.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, DurableCheckpointIO()]
        kwargs["use_distributed_sampler"] = False  # the loaders deal their rows to ranks themselves
        self.trainer_defaults = {"callbacks": callbacks}
        self.save_config_kwargs = {"claim": self.claim, "facts": self._facts}
        return super().instantiate_trainer(**kwargs)

    def _folder(self) -> Path:
        """This run's folder, the same for all its processes; made by the first one."""
        if self.checkpoint is not None and self.checkpoint.parent.name == "checkpoints":
            return self.claim.reopen(self.checkpoint.parent.parent)
        known = os.environ.get(RUN_FOLDER_VARIABLE)
        if known:
            return Path(known)
        folder = self.claim.make(_run_parent(self.config[self.config.subcommand]))
        os.environ[RUN_FOLDER_VARIABLE] = str(folder)
        return folder


class SaveRunConfig(SaveConfigCallback):
    """When a run really begins: writes `config.yaml`, or a numbered one when it goes on.

    Args:
        claim: Told that the run has begun.
        facts: `step`, `epoch` and metrics of the checkpoint that the run goes on from; what lay
            behind it is taken back.
    """

    def __init__(
        self, parser: Any, config: Any, claim: RunClaim, facts: dict[str, Any] | None
    ) -> None:
        super().__init__(parser, config)
        self.claim, self.facts = claim, facts

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Not yet: weights and checkpoint are still to be read, and may be refused."""

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.claim.begun = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.claim.begun = True
        folder = folder_of(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        if self.facts is not None and not rewind(folder, self.facts["step"]):
            row = {name: self.facts[name] for name in STEP_METRICS if name in self.facts}
            for logger in trainer.loggers:
                logger.log_metrics(row | {"epoch": self.facts["epoch"]}, self.facts["step"] - 1)
        path, number = folder / "config.yaml", 1
        while path.exists():
            path, number = folder / f"config-resumed-{number}.yaml", number + 1
        text = self.parser.dump(self.config, skip_none=False, skip_link_targets=True)
        with files.atomic_write(path) as file:
            file.write(text)


def _compare(checkpoint: Path, config: Any) -> dict[str, Any]:
    """Refuse another architecture; print what else a checkpoint was trained with differently.

    Returns:
        `step` (optimizer steps that the checkpoint has behind it), `epoch`, and its metrics.
    """
    content = read_checkpoint(checkpoint, mmap=True)
    hparams = content.get("hyper_parameters", {})
    architecture = dataclasses.asdict(get_config(_plain(config.model.architecture)))
    for field, saved in hparams.get("architecture", {}).items():
        if architecture.get(field) != saved:
            raise InputError(
                f"ckpt_path: {checkpoint} has {field} {saved}, the configuration has "
                f"{architecture.get(field)}; give the architecture it was trained with"
            )
    _compare_lora(checkpoint, saved_config(hparams), _plain(config.model.lora))
    saved = hparams.get("prompt_style", {})
    if config.data.prompt_style == saved.get("name"):
        # The texts behind a name may have changed since; the checkpoint holds those it learned.
        config.data.prompt_style = config.model.prompt_style = dict(saved)
    style = get_style(_plain(config.data.prompt_style), config.data.header_in_prompt)
    trained = saved | {"header_in_prompt": hparams.get("header_in_prompt")}
    if dataclasses.asdict(style) != trained:
        print(
            f"note: prompt_style is {style.name}, header_in_prompt {style.header_in_prompt}; the "
            f"checkpoint was trained with {trained.get('name')}, {trained['header_in_prompt']}"
        )
    place = {"step": int(content["global_step"]), "epoch": int(content["epoch"])}
    return content.get("metrics", {}) | place


def _compare_lora(checkpoint: Path, trained: LoRAConfig | None, wanted: Any) -> None:
    """Refuse whole weights where adapters are wanted, the reverse, and other adapters."""
    saved = dataclasses.asdict(trained) | {"targets": list(trained.targets)} if trained else None
    if saved and not wanted:
        raise InputError(
            f"ckpt_path: {checkpoint} holds LoRA adapters; add --config "
            f"{'lora' if saved['scaling'] == 'alpha' else 'lora-peft'}.yaml, or --model.lora "
            f"'{json.dumps(saved)}'"
        )
    if wanted and not saved:
        raise InputError(
            f"ckpt_path: {checkpoint} holds whole weights and no adapters; leave model.lora out, "
            "or give it as model.weights to train adapters beside them"
        )
    for field in ("rank", "alpha", "targets", "scaling"):
        ours = list(wanted[field]) if wanted and field == "targets" else (wanted or {}).get(field)
        if saved and ours != saved[field]:
            raise InputError(
                f"ckpt_path: {checkpoint} was trained with model.lora.{field} {saved[field]}, the "
                f"configuration has {ours}"
            )


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, jsonargparse.Namespace) else value


def _run_parent(config: Any) -> Path:
    return Path(config.run.dir) / (config.run.name or "run")
