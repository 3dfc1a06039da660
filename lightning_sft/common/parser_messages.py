"""What jsonargparse says, as one line that a person can act on, and the names of its options.

The patterns are of messages that jsonargparse 4.53 and argparse write; a test provokes each.
This module does not import torch.
"""

from __future__ import annotations

import re
from typing import Any

from lightning_sft.common.arguments import nearest

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Of a group that may also be null, the parser says at length why the value is not null.
NOT_NULL = re.compile(
    r"Does not validate against any of the Union subtypes.*Problem with given class_path "
    r"'[\w.]+': (.+?) - Expected a <class 'NoneType'>.*"
)
UNKNOWN = re.compile(
    r"unrecognized arguments: --(?P<option>[\w.]+)|[Kk]ey '?\"?(?P<key>[\w.]+)|"
    r"option '(?P<other>[\w.]+)'"
)
REFUSED_IMPORT = re.compile(
    r"Importing '(?P<path>[\w.]+)' is not allowed, denied by .*? in set_parsing_settings "
    r"to allow it\.?"
)


def explain(message: str, allowed: list[str] | None = None) -> str:
    """A parser's message as one line, with the nearest allowed name where one is unknown."""
    text = " ".join(COLOUR.sub("", message).split()).removeprefix("error: ")
    text = NOT_NULL.sub(r"\1", text)
    text = REFUSED_IMPORT.sub(_explain_refusal, text)
    unknown = UNKNOWN.search(text)
    if allowed and unknown and unknown[unknown.lastgroup or 0] not in allowed:
        text += nearest(unknown[unknown.lastgroup or 0], allowed)
    return text


def _explain_refusal(match: re.Match[str]) -> str:
    module = match["path"].partition(".")[0]
    return (
        f"{match['path']} is not among the classes that a config may name; if you trust it: "
        f"--allow_import {module}"
    )


def option_names(parser: Any) -> list[str]:
    """All option names of a parser, without dashes, as they stand in a config."""
    options = [option for action in parser._actions for option in action.option_strings]
    return [option.removeprefix("--") for option in options if option.startswith("--")]
