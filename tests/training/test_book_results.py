"""The book's printed results, for whoever has a model hub and a quarter of an hour.

bash scripts/test.sh -m network tests/test_book_results.py
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from support.runs import run


@pytest.mark.network
@pytest.mark.timeout(7200)
def test_gpt2_medium_learns_the_chapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Section 7.6: losses 3.826 and 3.762 before, falling below 0.5 and 0.8; a passive sentence."""
    monkeypatch.chdir(tmp_path)
    assert run("fit", "--config", "gpt2-medium.yaml") == 0
    initial = re.search(
        r"Training loss: ([\d.]+)\s+Validation loss: ([\d.]+)", capsys.readouterr().out
    )
    assert initial is not None
    assert float(initial[1]) == pytest.approx(3.826, abs=0.01)
    assert float(initial[2]) == pytest.approx(3.762, abs=0.01)
    folder = tmp_path / "runs/gpt2-medium/version_0"
    with (folder / "metrics.csv").open() as file:
        curve = [row for row in csv.DictReader(file) if row["val_eval_loss"]]
    # The book's last line is 0.300 and 0.657; its evaluations shuffle, so ours differ a little.
    assert float(curve[-1]["train_eval_loss"]) < 0.5
    assert float(curve[-1]["val_eval_loss"]) < 0.8
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert re.match(r"The meal is \w+ .*by the chef", samples[-1]["response"])
    assert not re.match(r"The meal is \w+ .*by the chef", samples[0]["response"])
