"""argv → one command. The commands, what they do, and where they live.

`fit`, `validate`, `test` and `predict` are LightningCLI's (`training_cli.py`). Every other command
is a plain function whose signature and docstring make its options and help page; its module is
imported only when it is asked for, so that those that need no torch start at once.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import typing
from pathlib import Path
from typing import Any, NamedTuple

from lightning_sft.common.config_files import read_config
from lightning_sft.common.errors import InputError
from lightning_sft.common.files import shipped_folder


class Command(NamedTuple):
    """The function behind a command line's first word, and its line on the help page.

    takes_arguments: The function reads the command line itself, because it takes `fit`'s options.
    """

    module: str
    function: str
    summary: str
    takes_arguments: bool = False


TRAINING = {
    "fit": "fine-tune a model",
    "validate": "loss and perplexity of the validation split",
    "test": "loss and perplexity of the test split",
    "predict": "answer the test split",
}
COMMANDS = {
    "compare": Command("reporting.compare", "compare", "weigh the answers of two or more runs"),
    "evaluate": Command("evaluating.evaluate", "evaluate", "run lm-eval's tasks on a model"),
    "export": Command(
        "exporting.export", "export", "write a model for transformers, llama.cpp or the book"
    ),
    "inspect": Command(
        "commands.inspect", "inspect", "show what the model will see of the data", True
    ),
    "plan": Command(
        "planning.plan", "plan", "estimate what a run will cost in memory and time", True
    ),
    "recipes": Command(
        "commands.recipes", "recipes", "run and compare the chapter's exercises", True
    ),
    "verify-resume": Command(
        "commands.verify_resume", "verify_resume", "show that a killed run goes on exactly", True
    ),
    "report": Command("reporting.report", "report", "make report.html of a run folder"),
    "score": Command("judging.score", "score", "have another model rate answers from 0 to 100"),
    "chat": Command("commands.chat", "chat", "answer instructions typed at a terminal"),
    "serve": Command("serving.serve", "serve", "answer over OpenAI's API, with a page to talk to"),
    "download": Command("models.files", "download_command", "fetch GPT-2's weights for later"),
}


def run_command(argv: list[str]) -> int:
    """Run `argv` (without the program's name) and return the exit code.

    Raises:
        LightningSFTError: The command failed in a way the user can act on.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help_page())
        return 0
    if argv[0] in ("-V", "--version"):
        from lightning_sft import __version__

        print(f"lightning_sft {__version__}")
        return 0
    name, arguments = argv[0], resolve_configs(argv[1:])
    if name in TRAINING:
        from lightning_sft.training.cli import run_training

        return run_training(name, arguments)
    if name in COMMANDS:
        command = COMMANDS[name]
        module = importlib.import_module(f"lightning_sft.{command.module}")
        function = getattr(module, command.function)
        return (
            function(arguments)
            if command.takes_arguments
            else _run_function(name, function, arguments)
        )
    known = [*TRAINING, *COMMANDS]
    hint = _nearest(name, known)
    raise InputError(f"unknown command {name!r}{hint}; allowed: {', '.join(known)}")


def resolve_configs(arguments: list[str]) -> list[str]:
    """Turn bare config names into paths: the working directory first, then the shipped configs.

    Raises:
        InputError: A config is a URL, or is in neither place.
    """
    resolved = list(arguments)
    for place, argument in enumerate(resolved):
        if argument in ("--config", "-c") and place + 1 < len(resolved):
            resolved[place + 1] = str(_find_config(resolved[place + 1]))
        elif argument.startswith("--config="):
            resolved[place] = f"--config={_find_config(argument.removeprefix('--config='))}"
    return resolved


def _find_config(name: str) -> Path:
    path = find_shipped(name, "config")
    read_config(path)  # what is no mapping of keys is refused here, by its own name and line
    return path


def find_shipped(name: str, what: str) -> Path:
    """A file by path, or by bare name among the files in `configs/` that the package ships.

    Raises:
        InputError: It is a URL, missing, or not a file.
    """
    if "://" in name:
        raise InputError(f"{what}: {name} is a URL; download it, read it, and give its path")
    local, shipped = Path(name).expanduser(), shipped_folder() / name
    if local.is_file():
        return local
    if Path(name).name == name and shipped.is_file():
        return shipped
    names = sorted(path.name for path in shipped_folder().glob("*" + (local.suffix or ".yaml")))
    raise InputError(
        f"{what}: {name} is not a file here{_nearest(name, names)}; shipped: {', '.join(names)}"
    )


def explain(message: str, allowed: list[str] | None = None) -> str:
    """A parser's message as one line, with the nearest allowed name where one is unknown."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split()).removeprefix("error: ")
    # Of a group that may be null, the parser also says why it is not null.
    text = re.sub(
        r"Does not validate against any of the Union subtypes.*Problem with given class_path "
        r"'[\w.]+': (.+?) - Expected a <class 'NoneType'>.*",
        r"\1",
        text,
    )
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|[Kk]ey '?\"?([\w.]+)", text)
    unknown = unknown or re.search(r"()option '([\w.]+)'", text)
    if allowed and unknown:
        name = unknown.group(1) or unknown.group(2)
        text += _nearest(name, allowed) if name not in allowed else ""
    return text


def _run_function(name: str, function: Any, arguments: list[str]) -> int:
    """Parse `arguments` by a function's signature and call it; its int is the exit code."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"lightning_sft {name}", exit_on_error=False, description=COMMANDS[name].summary
    )
    parser.add_argument("--config", action="config", help="YAML file with these options")
    # As in Python: what may be given by place becomes a positional, keyword-only an option.
    parameters = inspect.signature(function).parameters.values()
    by_name = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    by_place = {p.name for p in parameters} - by_name
    lists = _list_parameters(function)
    for parameter, item in lists.items():
        parser.add_argument(parameter, nargs="+", type=item)
    parser.add_function_arguments(
        function, as_group=False, as_positional=True, skip={*by_name, *lists}
    )
    parser.add_function_arguments(function, as_group=False, skip={*by_place})
    try:
        config = parser.parse_args(_write_out_flags(function, arguments))
    except ArgumentError as error:
        raise InputError(f"{name}: {explain(str(error), option_names(parser))}") from None
    settings = parser.instantiate_classes(config)
    settings.pop("config", None)
    return function(**settings) or 0


def _list_parameters(function: Any) -> dict[str, Any]:
    """Required parameters that are lists, with their items' type: `compare A B C`."""
    hints = typing.get_type_hints(function)
    return {
        p.name: typing.get_args(hints[p.name])[0]
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and typing.get_origin(hints[p.name]) is list
    }


def _write_out_flags(function: Any, arguments: list[str]) -> list[str]:
    """`--verify` alone as `--verify=true`: options that are false unless named need no value."""
    parameters = inspect.signature(function).parameters.values()
    flags = {f"--{p.name}" for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is False}
    following = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in flags and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def option_names(parser: Any) -> list[str]:
    """All option names of a parser, without dashes, as they stand in a config."""
    options = [option for action in parser._actions for option in action.option_strings]
    return [option.removeprefix("--") for option in options if option.startswith("--")]


def _nearest(name: str, allowed: list[str]) -> str:
    best = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    if not best:  # the right last part under the wrong group
        last = name.rsplit(".", 1)[-1]
        best = [option for option in allowed if option.rsplit(".", 1)[-1] == last][:1]
    return f" (did you mean {best[0]!r}?)" if best else ""


def _help_page() -> str:
    lines = [
        "usage: python -m lightning_sft COMMAND [--config FILE.yaml ...] [OPTIONS]",
        "",
        "Instruction fine-tuning of a from-scratch GPT-2 in PyTorch Lightning.",
        "",
        "commands:",
        *(f"  {name:<14} {summary}" for name, summary in TRAINING.items()),
        *(f"  {name:<14} {command.summary}" for name, command in sorted(COMMANDS.items())),
        "",
        "COMMAND --help lists the options of a command. --debug shows an error's traceback.",
        f"shipped configs: {', '.join(sorted(p.name for p in shipped_folder().glob('*.yaml')))}",
    ]
    return os.linesep.join(lines)
