"""A checkpoint's file and its sidecar, read as data.

How its tensors are read, and what is checked before, is `tensor_files.py`'s business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.models.tensor_files import DamagedError, check_finite, check_torch, read_torch

VERSION_KEY = "pytorch-lightning_version"
# What Lightning and this package write into every checkpoint, and of which type.
KINDS: dict[str, type | tuple[type, ...]] = {
    "global_step": int,
    "epoch": int,
    "loops": dict,
    VERSION_KEY: str,
    "state_dict": dict,
}
SETTING_KINDS: dict[str, type | tuple[type, ...]] = {
    "architecture": (str, dict),
    "prompt_style": (str, dict),
    "header_in_prompt": bool,
    "weights": (str, type(None)),
    "generation": (dict, type(None)),
    "seed": int,
    "tokenizer": (str, type(None)),
}


def sidecar(path: Path) -> Path:
    """Where a checkpoint's facts are: `step-000116.ckpt.json`."""
    return path.with_name(path.name + ".json")


def read_checkpoint(
    path: Path, map_location: Any | None = "cpu", mmap: bool = False, check: bool | None = None
) -> dict[str, Any]:
    """Load a checkpoint as data; nothing in it is run.

    Args:
        mmap: Map the tensors instead of reading them.
        check: Compare the content with its sidecar, or its own CRCs, and look for NaN in the
            weights; by default only where the tensors are read.

    Raises:
        InputError: Missing, damaged, or not a checkpoint of a run here.
    """
    check = not mmap if check is None else check
    if not path.is_file():
        raise InputError(f"ckpt_path: {path} is not a file")
    try:
        checkpoint = read_torch(path, map_location, check=check, mmap=mmap)
    except DamagedError as error:
        raise InputError(f"ckpt_path: {error}") from None
    except InputError as error:
        reason = str(error).removeprefix(f"{path}").strip(": ")
        raise InputError(f"ckpt_path: {path} is not a checkpoint ({reason})") from None
    _check_kinds(checkpoint, path)
    if check:
        check_finite(checkpoint["state_dict"].items(), f"ckpt_path: {path}")
    return checkpoint


def check_whole(path: Path) -> None:
    """Read a checkpoint through and compare it with its sidecar, else with its own CRCs.

    Raises:
        InputError: They differ.
    """
    try:
        check_torch(path)
    except InputError as error:
        raise InputError(f"ckpt_path: {error}") from None


def _check_kinds(checkpoint: Any, path: Path) -> None:
    """Whole is not yet sound: names and types of what others will rely on."""
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"ckpt_path: {path} is not a Lightning checkpoint (no state_dict)")
    settings = checkpoint.get("hyper_parameters")
    missing = [key for key in KINDS if key not in checkpoint]
    if missing or not isinstance(settings, dict) or "architecture" not in settings:
        what = missing[0] if missing else "hyper_parameters with an architecture"
        raise InputError(f"ckpt_path: {path} is not a checkpoint of a run here (no {what})")
    for values, kinds in ((checkpoint, KINDS), (settings, SETTING_KINDS)):
        for key, kind in kinds.items():
            if key in values and not isinstance(values[key], kind):
                found = type(values[key]).__name__
                raise InputError(f"ckpt_path: {path}: its {key} is of type {found}, which is none")


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = files.read_json(sidecar(path), files.MOST_SMALL)
    except (OSError, InputError):
        return {}
    return facts if isinstance(facts, dict) else {}
