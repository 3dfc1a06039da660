"""A checkpoint's file and its sidecar, read as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lightning_sft.common import files
from lightning_sft.common.errors import InputError

VERSION_KEY = "pytorch-lightning_version"


def sidecar(path: Path) -> Path:
    """Where a checkpoint's facts are: `step-000116.ckpt.json`."""
    return path.with_name(path.name + ".json")


def read_checkpoint(
    path: Path, map_location: Any | None = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Load a checkpoint as data; nothing in it is run.

    Args:
        mmap: Map the tensors instead of reading and checking them, where only the rest is wanted.

    Raises:
        InputError: Missing, damaged, or not a Lightning checkpoint.
    """
    if not path.is_file():
        raise InputError(f"ckpt_path: {path} is not a file")
    if not mmap:
        check_whole(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise InputError(f"ckpt_path: {path} is not a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"ckpt_path: {path} is not a Lightning checkpoint (no state_dict)")
    hparams = checkpoint.get("hyper_parameters")
    missing = [
        key for key in ("global_step", "epoch", "loops", VERSION_KEY) if key not in checkpoint
    ]
    if missing or not isinstance(hparams, dict) or "architecture" not in hparams:
        what = missing[0] if missing else "hyper_parameters with an architecture"
        raise InputError(f"ckpt_path: {path} is not a checkpoint of a run here (no {what})")
    return checkpoint


def check_whole(path: Path) -> None:
    """Read a checkpoint through and compare it with its sidecar, where there is one.

    Raises:
        InputError: They differ.
    """
    expected = _facts(path).get("sha256")
    if expected is not None and path.is_file() and files.sha256_of(path) != expected:
        raise InputError(f"ckpt_path: {path} is damaged (its sha256 differs from {sidecar(path)})")


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(sidecar(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
