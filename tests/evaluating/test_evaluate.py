"""`evaluate`: lm-eval on our model against lm-eval's own, and what is written of it.

The tests that run lm-eval need it (extra `eval`) and skip without; they use a task of local JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.evaluating import evaluate as evaluate_module
from lightning_sft.evaluating.evaluate import result_rows, write_alpaca_eval
from lightning_sft.reporting.report import collect, report
from lightning_sft.runs.evaluation_file import add_rows, read_evaluation
from support.lm_eval_tasks import compare_with_hf, write_tasks
from support.runs import newest_checkpoint, run, write_config

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is missing (extra eval)"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, model__optimizer__init_args={"lr": 2e-2}, trainer__max_epochs=1)
    assert run("fit", "--config", config) == 0
    return newest_checkpoint(folder / "runs" / "tiny" / "version_0")


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder with three tasks: choices, whole texts, writing."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return write_tasks(tmp_path / "tasks")


@needs_lm_eval
def test_the_command_end_to_end(checkpoint, tasks, capsys):
    folder = checkpoint.parent.parent
    options = ["--ckpt_path", checkpoint, "--include_path", tasks]
    assert run("evaluate", *options, "--tasks", "colours,writing") == 0
    assert "colours" in capsys.readouterr().out
    rows = read_evaluation(folder / "evaluation.json")
    assert {(row["task"], row["metric"]) for row in rows} == {
        ("colours", "acc"),
        ("colours", "acc_norm"),
        ("writing", "exact_match"),
    }
    assert {(row["model"], row["samples"], row["shots"]) for row in rows} == {
        (f"tiny, step {int(checkpoint.stem.split('-')[1])}", 22, 0)
    }
    # Other settings are other rows; the same again replaces.
    assert run("evaluate", *options, "--tasks", "colours", "--apply_chat_template") == 0
    assert run("evaluate", *options, "--tasks", "rolling", "--limit", 3) == 0
    assert run("evaluate", *options, "--tasks", "colours", "--batch_size", 1) == 0
    again = read_evaluation(folder / "evaluation.json")
    assert len(again) == 3 + 2 + 2
    by_key = {(row["task"], row["metric"], row["chat_template"]): row["value"] for row in again}
    for row in rows:
        assert by_key[row["task"], row["metric"], False] == pytest.approx(row["value"])
    report(folder)
    page = (folder / "report.html").read_text()
    assert "Benchmarks" in page
    assert "acc_norm" in page
    assert json.loads((folder / "report.json").read_text())["evaluation"] == again


@needs_lm_eval
def test_what_cannot_be_evaluated_is_one_line(checkpoint, tasks, tmp_path, capsys):
    bad = yaml.safe_load((tasks / "writing.yaml").read_text())
    bad["task"], bad["generation_kwargs"]["max_gen_toks"] = "endless", 4000
    (tasks / "endless.yaml").write_text(yaml.safe_dump(bad))
    bad["task"], bad["dataset_kwargs"] = "gone", {"data_files": {"test": str(tmp_path / "no.json")}}
    (tasks / "gone.yaml").write_text(yaml.safe_dump(bad))
    common = ["--ckpt_path", checkpoint, "--include_path", tasks]
    for options, code, says in (
        ([*common, "--tasks", "colors"], 2, "has no task 'colors'"),
        ([*common, "--tasks", "endless"], 2, "4000 new tokens leave no room"),
        ([*common, "--tasks", "gone"], 3, "data of gone could not be had"),
        (["--ckpt_path", checkpoint, "--tasks", "a", "--include_path", "none"], 2, "not a folder"),
        ([*common, "--tasks", "colours", "--batch_size", 0], 2, "batch_size: 0"),
        ([*common], 2, "give --ckpt_path and --tasks"),
    ):
        assert run("evaluate", *options) == code
        (said,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("error: "))
        assert says in said


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize("chat", [False, True])
def test_same_as_lm_evals_own_model_on_the_exported_folder(
    checkpoint, tasks, tmp_path, capsys, chat
):
    pytest.importorskip("transformers")
    from lightning_sft.decoding.answering import load_model

    out = tmp_path / "exported"
    assert run("export", "--ckpt_path", checkpoint, "--format", "hf", "--out", out) == 0
    largest = compare_with_hf(load_model(checkpoint, device="cpu"), out, tasks, chat)
    with capsys.disabled():
        print(f"\nchat template {chat}: largest difference of log-likelihoods {largest:.1e}")


# --- Without lm-eval ---


def test_without_lm_eval_it_is_said_what_to_install(monkeypatch, capsys):
    right = importlib.util.find_spec
    monkeypatch.setattr(
        evaluate_module.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "lm_eval" else right(name, *rest),
    )
    assert run("evaluate", "--ckpt_path", "any.ckpt", "--tasks", "arc_easy") == 2
    assert files.install_command("eval") in capsys.readouterr().err


def test_a_run_folder_and_a_base_that_moved(monkeypatch, tmp_path, capsys):
    """All of the command but lm-eval itself."""
    right = importlib.util.find_spec
    monkeypatch.setattr(
        evaluate_module.importlib.util,
        "find_spec",
        lambda name, *rest: True if name == "lm_eval" else right(name, *rest),
    )
    monkeypatch.setattr(evaluate_module.importlib.metadata, "version", lambda name: "0.4")
    monkeypatch.setattr(evaluate_module, "_find_tasks", lambda *_: "manager")
    rated = []

    def run_tasks(model: Any, *arguments: Any, **asked: Any) -> Any:
        rated.append((model, *arguments, asked))
        return FOUND

    monkeypatch.setattr(evaluate_module, "_run_tasks", run_tasks)
    stub = SimpleNamespace(EvalModel=lambda *arguments: arguments)
    monkeypatch.setitem(sys.modules, "lightning_sft.evaluating.lm_eval_model", stub)
    read = []
    monkeypatch.setattr(
        "lightning_sft.decoding.answering.load_model",
        lambda path, **settings: read.append((path, settings["weights"])) or "a model",
    )
    folder = tmp_path / "runs" / "mine" / "version_0"
    newest = folder / "checkpoints" / "step-000007.ckpt"
    newest.parent.mkdir(parents=True)
    newest.touch()
    (folder / "config.yaml").write_text("run: {name: mine}\n")
    origin = SimpleNamespace(run=folder, name="mine", step=7)
    monkeypatch.setattr("lightning_sft.models.origin.read_origin", lambda path: origin)
    options = ["--ckpt_path", folder, "--weights", "moved.pth", "--tasks", " arc, other,"]
    assert run("evaluate", *options, "--limit=3", "--batch_size=2", "--device=cpu") == 0
    assert read == [(str(newest), "moved.pth")]
    asked = {"num_fewshot": None, "limit": 3, "apply_chat_template": False}
    assert rated == [(("a model", 2), ["arc", "other"], "manager", asked)]
    rows = read_evaluation(folder / "evaluation.json")
    assert [(row["model"], row["metric"], row["limit"]) for row in rows] == [
        ("mine, step 7", "acc", 3),
        ("mine, step 7", "f1", 3),
    ]
    assert "acc              0.5000 ± 0.1000" in capsys.readouterr().out


FOUND = {
    "results": {
        "arc": {
            "alias": "arc",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "f1,strict": 1,
            "f1_stderr,strict": "N/A",
        }
    },
    "n-samples": {"arc": {"original": 9, "effective": 4}},
    "n-shot": {"arc": 5},
    "versions": {"arc": 1.0},
}


def test_rows_of_results(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate_module.importlib.metadata, "version", lambda name: "0.4")
    rows = result_rows(FOUND)
    common = {"task": "arc", "samples": 4, "shots": 5, "task_version": 1.0, "lm_eval": "0.4"}
    assert rows == [
        common | {"metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1},
        common | {"metric": "f1", "filter": "strict", "value": 1.0, "stderr": None},
    ]
    path = tmp_path / "evaluation.json"
    assert add_rows(path, rows) == rows
    path.write_text(json.dumps(rows))
    better = [rows[0] | {"value": 0.7}]
    assert add_rows(path, better) == [rows[1], *better]
    assert add_rows(path, [rows[0] | {"shots": 0}]) == [*rows, rows[0] | {"shots": 0}]


def test_a_report_shows_benchmarks_and_survives_a_broken_file(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module.importlib.metadata, "version", lambda name: "0.4")
    rows = [{"model": "tiny <b>"} | row for row in result_rows(FOUND)]
    (tmp_path / "evaluation.json").write_text(json.dumps(rows))
    monkeypatch.undo()
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Benchmarks" in page
    assert "0.5000 ± 0.1000" in page
    assert "tiny &lt;b&gt;" in page
    for text in ("[", '{"a": 1}', '[{"task": 1}]'):
        (tmp_path / "evaluation.json").write_text(text)
        (tmp_path / "metrics.csv").write_text("step,train_loss\n1,2.0\n")
        found = collect(tmp_path)
        assert found["evaluation"] == []
        assert "evaluation.json is left out" in found["notes"][0]


def test_alpaca_eval_file(tmp_path, capsys):
    folder = tmp_path / "my-run" / "version_3"
    folder.mkdir(parents=True)
    answers = [
        {"instruction": "Say it.", "input": "", "output": "It.", "model_response": "It!"},
        {"instruction": "Rewrite.", "input": "She é", "output": "", "model_response": ""},
    ]
    (folder / "instruction-data-with-response.json").write_text(json.dumps(answers))
    assert run("evaluate", "--alpaca_eval", folder) == 0
    assert json.loads((folder / "alpaca-eval.json").read_text()) == [
        {"instruction": "Say it.", "output": "It!", "generator": "my-run"},
        {"instruction": "Rewrite.\n\nShe é", "output": "", "generator": "my-run"},
    ]
    write_alpaca_eval(folder, "other", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[0]["generator"] == "other"
    with pytest.raises(InputError, match="no such file"):
        write_alpaca_eval(tmp_path, None, None)
    (tmp_path / "some.json").write_text(json.dumps([*answers, {"instruction": "x", "output": "y"}]))
    with pytest.raises(InputError, match="entry 2: 'model_response' is missing"):
        write_alpaca_eval(tmp_path / "some.json", None, None)
