"""Command lines before they are parsed: config names, option names, and what was probably meant.

This module does not import torch.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from lightning_sft.common.config_files import read_config
from lightning_sft.common.errors import InputError
from lightning_sft.common.files import shipped_folder


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
        f"{what}: {name} is not a file here{nearest(name, names)}; shipped: {', '.join(names)}"
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
        text += nearest(name, allowed) if name not in allowed else ""
    return text


def option_names(parser: Any) -> list[str]:
    """All option names of a parser, without dashes, as they stand in a config."""
    options = [option for action in parser._actions for option in action.option_strings]
    return [option.removeprefix("--") for option in options if option.startswith("--")]


def nearest(name: str, allowed: list[str]) -> str:
    best = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    if not best:  # the right last part under the wrong group
        last = name.rsplit(".", 1)[-1]
        best = [option for option in allowed if option.rsplit(".", 1)[-1] == last][:1]
    return f" (did you mean {best[0]!r}?)" if best else ""


def find_option(arguments: list[str], name: str) -> str | None:
    """The first value given for an option, in either of its two spellings."""
    for place, argument in enumerate(arguments):
        if argument == name and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}=")
    return None


def without_option(arguments: list[str], name: str) -> list[str]:
    kept = [argument for argument in arguments if not argument.startswith(f"{name}=")]
    if name in kept:
        place = kept.index(name)
        kept[place : place + 2] = []
    return kept
