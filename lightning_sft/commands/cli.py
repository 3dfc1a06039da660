"""argv → one command. The commands, what they do, and where they live.

`fit`, `validate`, `test` and `predict` are LightningCLI's (`training_cli.py`). Every other command
is a plain function whose signature and docstring make its options and help page; its module is
imported only when it is asked for, so that those that need no torch start at once.
"""

from __future__ import annotations

import importlib
import inspect
import os
import typing
from typing import Any, NamedTuple

from lightning_sft.commands.fit_options import check_options, option_page
from lightning_sft.common.arguments import PROGRAM, nearest, resolve_configs
from lightning_sft.common.errors import InputError
from lightning_sft.common.files import shipped_folder
from lightning_sft.common.parser_messages import explain, option_names


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
    "compare": Command(
        "reporting.compare", "compare_answers", "weigh the answers of two or more runs"
    ),
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
    "score": Command(
        "judging.score", "score_responses", "have another model rate answers from 0 to 100"
    ),
    "chat": Command("commands.chat", "chat", "answer instructions typed at a terminal"),
    "serve": Command("serving.serve", "serve", "answer over OpenAI's API, with a page to talk to"),
    "download": Command("models.files", "download_command", "fetch a model for later"),
}

# Take all options of `fit` besides their own.
FIT_LIKE = ("plan", "verify-resume")


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
    if name in TRAINING or name in FIT_LIKE:
        if {"-h", "--help"} & set(arguments):
            print(option_page(name, TRAINING.get(name) or COMMANDS[name].summary))
            return 0
        check_options(name, arguments)
        arguments = ["--help" if argument == "--help=all" else argument for argument in arguments]
    if name in TRAINING:
        from lightning_sft.commands.training import run_training

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
    hint = nearest(name, known)
    raise InputError(f"unknown command {name!r}{hint}; allowed: {', '.join(known)}")


def _run_function(name: str, function: Any, arguments: list[str]) -> int:
    """Parse `arguments` by a function's signature and call it; its int is the exit code."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"{PROGRAM} {name}", exit_on_error=False, description=COMMANDS[name].summary
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
    settings = parser.instantiate(config)
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


def _help_page() -> str:
    lines = [
        f"usage: {PROGRAM} COMMAND [--config FILE.yaml ...] [OPTIONS]",
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
