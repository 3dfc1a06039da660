"""`recipes`: several runs by one command, stopped and gone on with, and what it says at last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.commands.recipes import KNOWN, is_trained, read_study
from lightning_sft.commands.recipes_page import (
    count_training_seconds,
    show_time,
    summarize_recipes,
)
from lightning_sft.common.errors import InputError
from lightning_sft.common.files import shipped_folder, write_json
from lightning_sft.runs.responses import RESPONSES_NAME
from support.runs import read_metrics, run, spawn, wait_for, write_config, write_data


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert run("recipes", *arguments) == 2
    return capsys.readouterr().err.strip()


def test_stopped_in_the_second_recipe_it_goes_on_there_and_ends_in_table_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data.json", 80)
    config = write_config(
        tmp_path, data__path=str(data), data__batch_size=4, loss_curve__every_n_steps=4,
        trainer__max_epochs=1, data__mask_prompt=False, checkpoints__every_n_steps=3,
    )  # fmt: skip
    command = ["recipes", "run", "baseline", "mask-prompt+lora", "--config", config]
    command += ["--model.optimizer.init_args.lr", "0.01"]
    process = spawn(*command, cwd=tmp_path)
    wait_for(process, "mask-prompt+lora: training")
    wait_for(process, "(Step 000004)")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "mask-prompt+lora (2 of 2) was not finished; the same command goes on" in out
    assert "stopped after step" in err  # the step was finished and saved
    study = tmp_path / "runs/recipes/tiny"
    first, second = study / "baseline/version_0", study / "mask-prompt+lora/version_0"
    assert {p.name for p in first.iterdir()} >= {RESPONSES_NAME, "report.html", "sessions.jsonl"}
    assert not (second / RESPONSES_NAME).exists()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}

    process = spawn(*command, cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "mask-prompt+lora: going on" in out
    assert "baseline: " not in out  # nothing was done twice
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert [path.name for path in second.parent.iterdir()] == ["version_0"]
    for folder in (first, second):
        assert read_metrics(folder, "step")[-1] == 16

    found = json.loads((study / "recipes.json").read_text())["recipes"]
    assert list(found) == ["baseline", "mask-prompt+lora"]
    assert found["baseline"]["starts"] == 1
    assert found["mask-prompt+lora"]["starts"] == 2
    assert found["mask-prompt+lora"]["trained"] < found["baseline"]["trained"] == 3_246_016
    # The loss on the answers alone: not what a run with the prompt in its loss logs as val_loss.
    assert found["mask-prompt+lora"]["val_loss"] == pytest.approx(
        read_metrics(second, "val_loss")[-1], abs=1e-5
    )
    assert abs(found["baseline"]["val_loss"] - read_metrics(first, "val_loss")[-1]) > 1e-3
    for figures in found.values():
        assert 0.2 < figures["peak_gb"] < 5
        assert 0 < figures["training_seconds"] < figures["fit_seconds"]
    table = out[out.index("Recipe  ") :].splitlines()
    assert table[0].split()[:3] == ["Recipe", "Val", "loss"]
    assert [line.split()[0] for line in table[1:3]] == ["baseline", "mask-prompt+lora"]
    page = (study / "recipes.html").read_text()
    assert f"{found['baseline']['val_loss']:.3f}" in page
    for target in ("baseline/version_0/report.html", "comparison/comparison.html"):
        assert f'href="{target}"' in page
        assert (study / target).exists()

    # Another configuration does not mix with these runs.
    error = refused(capsys, *map(str, command[1:]), "--data.batch_size=4")
    assert "holds recipes of another configuration or other options" in error


def test_what_fails_is_said_once_and_keeps_its_code(tmp_path: Path) -> None:
    config = write_config(tmp_path, data__path=str(tmp_path / "missing.json"))
    process = spawn("recipes", "run", "baseline", "phi3", "--config", config, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    (error,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "missing.json" in error
    assert "baseline (1 of 2) was not finished" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "recipes: unknown 'walk'; allowed: run"),
        (["run", "--config", "quickstart.yaml"], "recipes: none named; allowed: baseline, phi3"),
        (["run", "baseline", "fi3", "--config", "quickstart.yaml"], "'fi3' is no recipe; allowed:"),
        (["run", "lora+../x", "--config", "quickstart.yaml"], "'lora+../x' is no recipe"),
        (["run", "baseline"], "recipes: --config is missing"),
    ],
)
def test_a_wrong_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *(arguments or ["walk"]))


def test_every_known_recipe_is_an_overlay_or_the_configuration_itself() -> None:
    config = f"--config={shipped_folder() / 'quickstart.yaml'}"
    options = ["--trainer.max_epochs", "3", "--run.dir=elsewhere", "--run.name", "mine"]
    study = read_study([*KNOWN, "phi3+lora", "baseline", config, *options])
    assert study.folder == Path("elsewhere/recipes/mine")
    assert study.options == ["--trainer.max_epochs", "3"]
    assert list(study.recipes) == [*KNOWN, "phi3+lora"]
    assert study.recipes["baseline"] == []
    names = [path.name for path in study.recipes["phi3+lora"]]
    assert names == ["phi3.yaml", "lora.yaml"]
    with pytest.raises(InputError, match="is no recipe"):
        read_study(["", "--config=x.yaml"])


def make_run(folder: Path, answers: list[str], **figures: Any) -> Path:
    """A run folder with what `recipes` would find in it."""
    folder.mkdir(parents=True)
    records = [
        {"instruction": f"Say {n}", "input": "", "output": f"It is {n}.", "model_response": text}
        for n, text in enumerate(answers)
    ]
    write_json(folder / RESPONSES_NAME, records)
    if figures:
        write_json(folder / "response-loss.json", figures)
    (folder / "report.html").write_text("")
    return folder


def test_the_table_holds_what_there_is_and_dashes_for_the_rest(tmp_path: Path) -> None:
    runs: dict[str, Path | None] = {
        "baseline": make_run(
            tmp_path / "baseline/version_0",
            ["It is 0.", "It is 2."],
            val_loss=1.25,
            trained=10_000,
            parameters=20_000,
        ),
        "lora": make_run(tmp_path / "lora/version_0", ["It is 0.", "It is 1."]),
        "alpaca-52k": make_run(tmp_path / "alpaca-52k/version_0", ["a", "b", "c"]),
    }
    text = summarize_recipes(tmp_path, runs)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["baseline"][1:3] == ["1.250", "50.0"]
    assert lines["baseline"][-4:] == ["–", "10,000", "–", "–"]
    assert lines["lora"][1:3] == ["–", "100.0"]
    assert "alpaca-52k: answers other entries than baseline; its figures do not compare" in text
    page = (tmp_path / "recipes.html").read_text()
    assert "its figures do not compare" in page
    comparison = json.loads((tmp_path / "recipes.json").read_text())["comparison"]
    assert [one["second"] for one in comparison["comparisons"]] == ["lora/version_0"]


def test_training_time_is_that_of_the_steps_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,train_loss,tokens_per_second,tokens_seen,val_loss\n"
        "0,3.0,100.0,200.0,\n1,2.5,50.0,300.0,\n2,,,,2.4\n3,2.0,200.0,500.0,\n"
    )
    assert count_training_seconds(path) == pytest.approx(2.0 + 2.0 + 1.0)
    assert count_training_seconds(tmp_path / "none.csv") is None
    assert (show_time(119.94), show_time(150.0), show_time(None)) == ("119.9 s", "2.5 min", "–")


def test_a_run_is_trained_when_its_fit_came_to_the_end(tmp_path: Path) -> None:
    assert not is_trained(None)
    folder = tmp_path / "version_0"
    folder.mkdir()
    assert not is_trained(folder)
    (folder / "sessions.jsonl").write_text('{"exit": 130, "seconds": 1, "peak_gb": 1}\n')
    assert not is_trained(folder)
    (folder / "gpt2-2M-sft.pth").touch()
    assert is_trained(folder)


def test_the_command_itself_stays_small() -> None:
    """A parent's memory counts into its child's peak, so it must not hold torch."""
    code = "import sys, lightning_sft.commands.recipes; print({'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in KNOWN)
