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
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_sft.common import files
from lightning_sft.common.arguments import option_values, without_option
from lightning_sft.common.errors import InputError, LightningSFTError
from lightning_sft.common.parser_messages import explain, option_names
from lightning_sft.data.find_tokenizer import tokenizer_folder
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.prompts import get_style
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.models.found_config import AUTO, settle_config
from lightning_sft.models.lora import LoRAConfig
from lightning_sft.models.lora_checkpoint import saved_config
from lightning_sft.models.registry import get_config
from lightning_sft.runs.run_folder import RunClaim, checkpoint_in
from lightning_sft.training.callbacks import LossCurve, SampleResponses, Throughput
from lightning_sft.training.checkpoint import (
    STEP_METRICS,
    Checkpoints,
    DurableCheckpointIO,
    FinalWeights,
    find_checkpoint,
)
from lightning_sft.training.device_check import DeviceCheck, check_devices
from lightning_sft.training.lightning_internals import OpenCLI, restrict_imports
from lightning_sft.training.loggers import (
    COLUMNS,
    PREFERENCE_COLUMNS,
    EventsLogger,
    MetricsFile,
    RunFolder,
    folder_of,
    rewind,
)
from lightning_sft.training.progress_bar import ProgressBar, Summary
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
ALLOW_IMPORT_VARIABLE = "LIGHTNING_SFT_ALLOW_IMPORT"  # more of them, separated by commas
RUN_FOLDER_VARIABLE = "LIGHTNING_SFT_RUN_FOLDER"  # how a rank's child processes learn the folder


def allow_imports(arguments: list[str]) -> list[str]:
    """Let configs name the project's classes, and those of `--allow_import MODULE`.

    The option is the command line's alone: a config that could open the door would be no door. The
    environment takes it on to the processes that Lightning starts as ranks.

    Returns:
        The arguments without the option.

    Raises:
        InputError: It names no module.
    """
    given = os.environ.get(ALLOW_IMPORT_VARIABLE, "").split(",")
    given += option_values(arguments, "--allow_import")
    extra = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    for name in extra:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            raise InputError(f"allow_import: {name!r} is not a module's name, such as my_package")
    if extra:
        os.environ[ALLOW_IMPORT_VARIABLE] = ",".join(extra)
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; an installed script does not
    try:
        restrict_imports([*ALLOWED_CLASSES, *extra])
    except ValueError as error:
        raise InputError(f"allow_import: {error}") from None
    return without_option(arguments, "--allow_import")


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


class SFTCLI(OpenCLI):
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
        except (jsonargparse.ArgumentError, TypeError, ValueError, OverflowError) as error:
            allowed = option_names(self.option_parser())
            raise InputError(f"{sys.argv[1]}: {explain(str(error), allowed)}") from None
        config = self.config.get(self.config.get("subcommand"), self.config)
        check_numbers(config.trainer.as_dict(), "trainer")
        for section in ("model", "data", "generation", "samples", "loss_curve", "checkpoints"):
            check_numbers(config[section].as_dict(), section)

    def set_seed(self) -> None:
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything: {seed} is outside 0 to {2**32 - 1}")
        super().set_seed()

    def resolve_checkpoint(self) -> None:
        """Find out what `last`, `best`, a run folder or a path means; the config stays as it is."""
        config = self.config[self.config.subcommand]
        self.checkpoint: Path | None = None
        self.facts: dict[str, Any] | None = None
        wanted = config.ckpt_path
        if wanted is not None:
            if wanted not in ("last", "best") and "://" not in wanted:
                wanted = str(checkpoint_in(wanted))
            self.checkpoint = find_checkpoint(wanted, _run_parent(config))
            config.ckpt_path = str(self.checkpoint)
            self.facts = _compare(self.checkpoint, config)
            _use_saved_tokenizer(self.checkpoint, config)
        elif config.model.architecture == AUTO:
            # Spelt out, so that the run's own config says it when the weights are gone.
            found = settle_config(AUTO, config.model.weights)
            config.model.architecture = dataclasses.asdict(found)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except LightningSFTError:
            raise
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            # Whatever a class's constructor says of its arguments is the user's to mend.
            raise InputError(f"{self.subcommand or 'plan'}: {explain(str(error))}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer of this command, with what a run cannot do without."""
        wanted = self.built("trainer").as_dict()
        check_devices(wanted.get("devices"), wanted.get("num_nodes"))
        plugins = wanted.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, DurableCheckpointIO()]
        kwargs["use_distributed_sampler"] = False  # the loaders deal their rows to ranks themselves
        kwargs["logger"] = False
        callbacks: list[Any] = [DeviceCheck()] if self.setting("check_device") else []
        is_compared = self.model.needs_reference and self.subcommand != "predict"
        if self.checkpoint is not None and self.model.lora is None and not is_compared:
            # It holds all weights: those that training began with need not be there any more.
            self.model.weights = None
        if self.subcommand == "fit":
            folder = self._folder()
            stop = StopOnSignal(self.built("checkpoints"))
            callbacks += [RunFolder(folder), Throughput(), FinalWeights(), stop]
            kwargs["logger"] = self._loggers(wanted.get("logger"), folder)
        elif self.subcommand == "predict":
            if self.checkpoint is None:
                source = self.model.weights or "none, so they are random"
                rank_zero_only(print)(
                    "note: no checkpoint is loaded; the answers are those of the starting weights "
                    f"(model.weights: {source})"
                )
            callbacks += [ResponseWriter(self._folder()), StopOnSignal()]
            kwargs["enable_progress_bar"] = False  # the writer's own bar counts entries
        callbacks += self._displays(wanted | kwargs)
        self.trainer_defaults = {"callbacks": callbacks}
        self.save_config_kwargs = {"claim": self.claim, "facts": self.facts}
        return super().instantiate_trainer(**kwargs)

    def _loggers(self, wanted: Any, folder: Path) -> list[Any]:
        """`metrics.csv` always, TensorBoard unless `logger: false`, a user's own beside them."""
        columns = COLUMNS if self.model.objective is None else PREFERENCE_COLUMNS
        loggers: list[Any] = [MetricsFile(folder, columns)]
        if wanted is not False:
            loggers.insert(0, EventsLogger(folder, self.facts["step"] if self.facts else 0))
        if isinstance(wanted, bool | None):
            return loggers
        return [*loggers, *(wanted if isinstance(wanted, list) else [wanted])]

    def _displays(self, wanted: dict[str, Any]) -> list[Any]:
        """A progress bar and a summary, where they are wanted and the config names no others."""
        given = wanted.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        return [
            ours()
            for ours, kind, option in (
                (ProgressBar, lightning_callbacks.ProgressBar, "enable_progress_bar"),
                (Summary, lightning_callbacks.ModelSummary, "enable_model_summary"),
            )
            if wanted.get(option) is not False and not any(isinstance(c, kind) for c in given)
        ]

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
        if isinstance(pl_module.tokenizer, HFTokenizer) and tokenizer_folder(folder) is None:
            pl_module.tokenizer.save(folder)
        text = self.parser.dump(self.config, skip_none=False, skip_link_targets=True)
        with files.atomic_write(path) as file:
            file.write(text)


# The least that an option may be, where Lightning would divide by it.
AT_LEAST_1 = ("trainer.check_val_every_n_epoch", "trainer.accumulate_grad_batches")
MOST = 2**53  # a larger number overflows somewhere, and nobody means it


def check_numbers(settings: Any, name: str) -> None:
    """Refuse numbers that no run could be meant to have, wherever they stand.

    Args:
        name: Of the option that holds them.

    Raises:
        InputError: Names the option, and what is allowed.
    """
    if isinstance(settings, dict):
        for key, value in settings.items():
            check_numbers(value, f"{name}.{key}")
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_numbers(value, name)
    elif isinstance(settings, str) and re.fullmatch("-?[0-9]+", settings):  # `devices` may be text
        check_numbers(int(settings[:400]), name)
    elif isinstance(settings, int | float) and not isinstance(settings, bool):
        if isinstance(settings, int) and abs(settings) > MOST:
            raise InputError(f"{name}: a number over {MOST:,} is not allowed")
        if name in AT_LEAST_1 and settings < 1:
            raise InputError(f"{name}: {settings} is not allowed; it must be >= 1")
        if name == "trainer.val_check_interval" and settings == 0:
            raise InputError(
                f"{name}: 0 is not allowed; to leave out validation: --trainer.limit_val_batches 0"
            )


def _compare(checkpoint: Path, config: Any) -> dict[str, Any]:
    """Refuse another architecture; print what else a checkpoint was trained with differently.

    Returns:
        `step` (optimizer steps that the checkpoint has behind it), `epoch`, and its metrics.
    """
    content = read_checkpoint(checkpoint, mmap=True)
    hparams = content.get("hyper_parameters", {})
    if config.model.architecture == AUTO:
        config.model.architecture = dict(hparams["architecture"])
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
    ours = dataclasses.asdict(style)
    # Fields that a style has had since are the same for both.
    if any(ours.get(field) != value for field, value in trained.items()):
        print(
            f"note: prompt_style is {style.name}, header_in_prompt {style.header_in_prompt}; the "
            f"checkpoint was trained with {trained.get('name')}, {trained['header_in_prompt']}"
        )
    place = {"step": int(content["global_step"]), "epoch": int(content["epoch"])}
    return content.get("metrics", {}) | place


def _use_saved_tokenizer(checkpoint: Path, config: Any) -> None:
    """The run's own copy: the folder that it came from may be gone."""
    if (folder := tokenizer_folder(checkpoint)) is not None:
        config.model.tokenizer = str(folder)


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
    return files.expand_user(config.run.dir, "run.dir") / (config.run.name or "run")
