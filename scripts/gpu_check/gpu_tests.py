"""The tests marked `gpu`, by pytest, where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from gpu_check.notebook import Notebook, SkipError

ROOT = Path(__file__).resolve().parents[2]


def run_tests(notebook: Notebook) -> None:
    """`pytest -m gpu`; the tests' own names are in the part's log."""
    if notebook.setting.device != "cuda":
        raise SkipError("tests marked `gpu` need one")
    for package in ("pytest", "hypothesis"):  # the second one by tests/conftest.py
        if importlib.util.find_spec(package) is None:
            raise SkipError(f"{package} is not installed")
    # The project's own options name plugins that may not be here; the marker is all that counts.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-m", "gpu"]
    command += ["-p", "no:cacheprovider", "-rs", "-q", str(ROOT / "tests" / "gpu")]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    notebook.check("pytest's exit code", code, 0)
