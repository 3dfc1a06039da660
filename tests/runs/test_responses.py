"""Responses files with entries that have no wanted answer: refused, or left out as the run says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_sft.common.errors import InputError
from lightning_sft.runs.responses import RESPONSES_NAME, read_responses


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with five answers, to two of which no output is known."""
    records = [
        {"instruction": f"Do {n}", "output": "" if n in (1, 4) else "x", "model_response": "y"}
        for n in range(5)
    ]
    (tmp_path / RESPONSES_NAME).write_text(json.dumps(records))
    return tmp_path


def test_blank_outputs_are_refused_or_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="entry 1: 'output' is blank; a score needs"):
        read_responses(folder)
    answers = read_responses(folder, empty_output="skip")
    assert [answer.entry.instruction for answer in answers] == ["Do 0", "Do 2", "Do 3"]
    path = folder / RESPONSES_NAME
    said = f"{path}: 2 entries with an empty output are left out: 1, 4\n"
    assert capsys.readouterr().out == said
    (folder / RESPONSES_NAME).write_text(path.read_text().replace('"x"', '""'))
    with pytest.raises(InputError, match="the 'output' of every entry is blank"):
        read_responses(folder, empty_output="skip")


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ("data: {empty_output: skip}", 3),
        ("data: {empty_output: error}", None),
        ("data: {}", None),
        ("data: 5", None),
        ("[", None),
        ("", None),
    ],
)
def test_the_runs_own_config_decides(folder: Path, config: str, count: int | None) -> None:
    (folder / "config.yaml").write_text(config)
    if count is None:
        with pytest.raises(InputError, match="entry 1: 'output' is blank"):
            read_responses(folder)
    else:
        assert len(read_responses(folder)) == count
        with pytest.raises(InputError, match="entry 1: 'output' is blank"):
            read_responses(folder, empty_output="error")
