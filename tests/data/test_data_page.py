"""The examples of docs/data.md are what they say: files that are read, settings that are taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lightning_sft.data.config import DataConfig
from lightning_sft.data.entries import read_entry_file

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"```(json|yaml)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "json"])
def test_files_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "example.json"
    path.write_text(text)
    assert len(read_entry_file(path, format="auto").entries) == 1


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "yaml"])
def test_settings_are_taken(text: str) -> None:
    DataConfig(**yaml.safe_load(text)["data"])


def test_there_are_some_of_both() -> None:
    assert {kind for kind, _ in BLOCKS} == {"json", "yaml"}
    assert len(BLOCKS) > 8
