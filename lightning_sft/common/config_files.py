"""Config files and dotted options → one mapping, for commands that must not import torch.

The rules are those of `fit`: several `--config` files compose, a later one wins key by key, and
options such as `--data.batch_size 4` win over files. A config is data that people download, so a
file is read with YAML's safe loader, and its size is bounded before anything is built from it.

    >>> read_config(Path("configs/mask-prompt.yaml"))
    {'data': {'mask_prompt': True}}

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_sft.common import files
from lightning_sft.common.errors import InputError

# The first words that an option or a key of a config may have; what they hold is checked by the
# command that uses it.
SECTIONS = (
    "check_device",
    "checkpoints",
    "ckpt_path",
    "data",
    "generation",
    "loss_curve",
    "model",
    "run",
    "samples",
    "seed_everything",
    "trainer",
    "weights_only",
)
MAX_BYTES = 1_000_000
PLAIN_SECTIONS = ("check_device", "ckpt_path", "seed_everything", "weights_only")
# Aliases let a kilobyte of YAML stand for gigabytes; a real config has a few hundred values.
MAX_VALUES = 100_000


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in one YAML file.

    Raises:
        InputError: Not readable, not UTF-8, not YAML of plain values, not a mapping, a key twice,
            or far too large; names the place.
    """
    node = _compose(_read_text(path), path)
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}: a config must be a mapping such as `data: {{batch_size: 8}}`")
    _check_keys(node, path)
    if _count_values(node, {}) > MAX_VALUES:
        raise InputError(f"{path}: stands for more than {MAX_VALUES:,} values; that is no config")
    loader = yaml.SafeLoader("")
    try:
        config = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: {_place(error)}; only plain values are allowed") from None
    for key, value in config.items():
        if key in SECTIONS and key not in PLAIN_SECTIONS and not isinstance(value, dict):
            raise InputError(f"{path}: {key} holds {value!r:.60}; it must be a mapping")
    return config


def merge(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Layers of a configuration, the later ones winning key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(merged.get(key), dict) and isinstance(value, Mapping)
            merged[key] = merge([merged[key], value]) if both else value
    return merged


def read_layers(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the `--config` files out of a command line.

    Args:
        arguments: What follows the command's name, config names already resolved to paths.

    Returns:
        The merged files, and the remaining arguments.

    Raises:
        InputError: A file is not a config, or has a section that no command knows.
    """
    layers, rest = [], []
    left = iter(arguments)
    for argument in left:
        name, _, value = argument.partition("=")
        if name not in ("--config", "-c"):
            rest.append(argument)
            continue
        path = Path(value or next(left, "")).expanduser()
        layer = read_config(path)
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


def _read_text(path: Path) -> str:
    try:
        content = files.read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"config: {path} cannot be read ({error.strerror})") from None
    if not content.strip():
        raise InputError(f"{path}: is empty; a config is a small YAML mapping")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not valid UTF-8") from None


def _compose(text: str, path: Path) -> yaml.Node | None:
    try:
        # Not yaml.CSafeLoader: deep nesting overflows its stack and ends the process.
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {_place(error)}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply for a config") from None


def _check_keys(node: yaml.MappingNode, path: Path, depth: int = 0) -> None:
    """A key written twice in one mapping: YAML would silently take the last."""
    seen = set()
    for key, value in node.value:
        if key.value.__hash__ and key.value in seen:
            line = key.start_mark.line + 1
            raise InputError(f"{path}: line {line}: the key {key.value!r} is there twice")
        if key.value.__hash__:
            seen.add(key.value)
        if isinstance(value, yaml.MappingNode) and depth < 20:
            _check_keys(value, path, depth + 1)


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a document stands for once its aliases are written out."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES  # until it is counted: an alias to its own parent is endless
        if isinstance(node, yaml.ScalarNode):
            parts = []
        else:
            parts = [part for item in node.value for part in _parts(item)]
        known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(node)]


def _parts(item: Any) -> tuple[yaml.Node, ...]:
    return item if isinstance(item, tuple) else (item,)


def _place(error: Exception) -> str:
    """A YAML error as one phrase that begins with line and column."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error) or type(error).__name__
    what = " ".join(str(what).split())[:150]
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what
