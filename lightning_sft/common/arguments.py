"""Command lines before they are parsed: options taken out, configs found and merged, and what a
misspelt name was probably meant to be.

This module does not import torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sft.common.config_files import SECTIONS, merge, read_config
from lightning_sft.common.errors import InputError
from lightning_sft.common.files import expand_user, shipped_folder

PROGRAM = "python -m lightning_sft"  # what help pages and printed commands call this program
CONFIG = ("--config", "-c")


def resolve_configs(arguments: list[str]) -> list[str]:
    """Turn bare config names into paths: the working directory first, then the shipped configs.

    Names before the first option are configs too: `fit quickstart.yaml --trainer.max_steps 5`.

    Raises:
        InputError: A config is a URL, or is in neither place.
    """
    resolved, expected, named = [], False, True
    for argument in arguments:
        option, equals, value = argument.partition("=")
        named = named and not argument.startswith("-")
        if expected or (named and argument.endswith((".yaml", ".yml"))):
            path = str(_find_config(argument))
            resolved.append(path if expected else f"{CONFIG[0]}={path}")
        elif option in CONFIG and equals:
            resolved.append(f"{option}={_find_config(value)}")
        else:
            resolved.append(argument)
        expected = argument in CONFIG
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
    local, shipped = expand_user(name, what), shipped_folder() / name
    if local.is_file():
        return local
    if Path(name).name == name and shipped.is_file():
        return shipped
    names = sorted(path.name for path in shipped_folder().glob("*" + (local.suffix or ".yaml")))
    raise InputError(
        f"{what}: {name} is not a file here{nearest(name, names)}; shipped: {', '.join(names)}"
    )


def nearest(name: str, allowed: list[str]) -> str:
    """(did you mean …?) for a name that is not allowed, or nothing where none is near."""
    best = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    if not best:  # the right last part under the wrong group
        last = name.rsplit(".", 1)[-1]
        best = [option for option in allowed if option.rsplit(".", 1)[-1] == last][:1]
    return f" (did you mean {best[0]!r}?)" if best else ""


def option_values(arguments: Sequence[str], *names: str) -> list[str]:
    """All values given for an option, in order; `names` are its spellings.

    >>> option_values(["--config", "a.yaml", "-c=b.yaml"], "--config", "-c")
    ['a.yaml', 'b.yaml']
    """
    return _take(arguments, names)[0]


def find_option(arguments: Sequence[str], *names: str) -> str | None:
    """The last value given for an option, which is the one that counts; None without any."""
    values = option_values(arguments, *names)
    return values[-1] if values else None


def without_option(arguments: Sequence[str], *names: str) -> list[str]:
    """The arguments without an option and its values, wherever it stands."""
    return _take(arguments, names)[1]


def _take(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """An option's values, in its two forms `--name value` and `--name=value`, and what is left.

    Raises:
        InputError: It stands at the end, without its value.
    """
    values, rest, left = [], [], iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
        elif equals:
            values.append(value)
        elif (following := next(left, None)) is not None:
            values.append(following)
        else:
            raise InputError(f"{name}: expected one argument")
    return values, rest


def read_layers(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the `--config` files out of a command line.

    Args:
        arguments: What follows the command's name, config names already resolved to paths.

    Returns:
        The merged files, and the remaining arguments.

    Raises:
        InputError: A file is not a config, or has a section that no command knows.
    """
    paths, rest = _take(arguments, CONFIG)
    layers = []
    for path in map(Path, paths):
        layer = read_config(expand_user(path, "config"))
        unknown = [str(key) for key in layer if key not in SECTIONS]
        if unknown:
            raise InputError(f"{path}: unknown key {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
        layers.append(layer)
    return merge(layers), rest


def drop_options(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """Leave out options, with their values, that are `fit`'s and not among the `known` ones.

    An option of no section stays, for the parser to complain about.
    """
    kept: list[str] = []
    dropping = False
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            section = name.partition(".")[0]
            dropping = section in SECTIONS and section not in known and name not in known
        if not dropping:
            kept.append(argument)
    return kept
