"""`evaluate`: benchmarks of lm-eval on a model, and answers in AlpacaEval's format.

    python -m lightning_sft evaluate --ckpt_path STEP.ckpt --tasks arc_easy,hellaswag
    python -m lightning_sft evaluate --alpaca_eval runs/gpt2-medium/version_0

The first needs the extra `eval` and the tasks' own data, which lm-eval fetches from the Hugging
Face hub; tasks of one's own lie in a folder (`--include_path`). Results go into the run folder as
`evaluation.json`, beside earlier ones of other tasks, and into the report. The second writes what
`predict` answered as AlpacaEval reads it: it is at home here because both hand a model to somebody
else's evaluator, and needs neither the model nor lm-eval.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, LightningSFTError, ServiceError
from lightning_sft.data.entries import read_entries, read_records
from lightning_sft.runs.evaluation_file import EVALUATION_NAME, add_rows
from lightning_sft.runs.responses import responses_path
from lightning_sft.runs.run_folder import checkpoint_in

ALPACA_EVAL_NAME = "alpaca-eval.json"
# Who fails when a task's data cannot be had; lm-eval hands their errors on as they are.
_DATA_PACKAGES = ("datasets", "huggingface_hub", "requests", "httpx", "httpx2", "fsspec")


def evaluate(
    *,
    ckpt_path: str | None = None,
    tasks: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    apply_chat_template: bool = False,
    include_path: Path | None = None,
    output: Path | None = None,
    device: str = "auto",
    architecture: str | dict[str, Any] | None = None,
    prompt_style: str | dict[str, str] | None = None,
    header_in_prompt: bool | None = None,
    weights: str | None = None,
    alpaca_eval: Path | None = None,
    generator: str | None = None,
) -> None:
    """Measure a model on lm-eval's tasks, or write its answers for AlpacaEval.

    Args:
        ckpt_path: A checkpoint, a run folder, or weights (.pth, .safetensors, folder, or a name
            such as gpt2-medium or the hub's owner/name).
        tasks: Names of lm-eval's tasks, with commas between.
        num_fewshot: Solved examples before each question; the task's own number by default.
        limit: Only the first so many questions of each task, to try things out.
        batch_size: Requests computed side by side.
        apply_chat_template: Ask in the model's prompt style instead of as plain text.
        include_path: A folder with tasks of your own. Their files may hold code, which is run.
        output: The file for the results; by default evaluation.json in the run folder, or in the
            working directory for a model without one.
        device: auto, cpu, cuda or mps.
        architecture: For weights that do not say it themselves.
        prompt_style: For weights away from their run folder; alpaca by default.
        header_in_prompt: Likewise.
        weights: Where the base of a LoRA checkpoint is now, if it was moved.
        alpaca_eval: A responses file of predict, or its run folder: write it for AlpacaEval.
        generator: The model's name there; the run's by default.

    Raises:
        InputError: No such model or task, or lm-eval is not installed.
        ServiceError: A task's data could not be had.
    """
    if alpaca_eval is not None:
        write_alpaca_eval(Path(alpaca_eval), generator, output)
        return
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if ckpt_path is None or not names:
        raise InputError("evaluate: give --ckpt_path and --tasks, or --alpaca_eval")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"evaluate: lm-eval is missing: {files.install_command('eval')}")
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} is not allowed; it must be >= 1")
    # Imported here: a refusal, and AlpacaEval's file, need no torch.
    from lightning_sft.decoding.answering import load_model
    from lightning_sft.evaluating.lm_eval_model import EvalModel
    from lightning_sft.models.origin import read_origin

    path = str(checkpoint_in(ckpt_path))
    manager = _find_tasks(names, include_path)
    origin = read_origin(path)
    model = load_model(
        path,
        device=device,
        architecture=architecture,
        prompt_style=prompt_style,
        header_in_prompt=header_in_prompt,
        weights=weights,
    )
    asked = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template}
    found = _run_tasks(EvalModel(model, batch_size), names, manager, **asked)

    step = f", step {origin.step}" if origin.step is not None else ""
    same = {"chat_template": apply_chat_template, "limit": limit}
    rows = [{"model": origin.name + step} | row | same for row in result_rows(found)]
    target = Path(output or (origin.run or Path()) / EVALUATION_NAME).expanduser()
    files.write_json(target, add_rows(target, rows))
    for row in rows:
        error = f" ± {row['stderr']:.4f}" if row["stderr"] is not None else ""
        print(f"  {row['task']:<28} {row['metric']:<16} {row['value']:.4f}{error}")
    print(f"Results: {target}")


def _run_tasks(model: Any, names: list[str], manager: Any, **asked: Any) -> dict[str, Any]:
    """lm-eval's own results; an error of fetching a task's data is one line.

    Args:
        asked: Of the command's options, those that are lm-eval's.

    Raises:
        ServiceError: A task's data could not be had.
    """
    from lm_eval.evaluator import simple_evaluate

    try:
        return simple_evaluate(
            model,
            tasks=names,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,  # its 100,000 take minutes, for standard errors alone
            verbosity="WARNING",
            **asked,
        )
    except LightningSFTError:
        raise
    except Exception as error:
        package = type(error).__module__.split(".")[0]
        if package in _DATA_PACKAGES or isinstance(error, (ConnectionError, FileNotFoundError)):
            reason = " ".join(str(error).split())[:200]
            raise ServiceError(
                f"tasks: data of {', '.join(names)} could not be had ({reason})"
            ) from None
        raise


def result_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """lm-eval's results, one row for each task (or group) and metric.

    lm-eval calls a figure `acc,none`: the metric, and the filter that the answers went through.
    """
    version = importlib.metadata.version("lm_eval")
    rows = []
    for task, figures in (found["results"] | found.get("groups", {})).items():
        for key, value in figures.items():
            metric, _, given_filter = key.partition(",")
            if (
                metric.endswith("_stderr")
                or not isinstance(value, (int, float))
                or not given_filter
            ):
                continue
            stderr = figures.get(f"{metric}_stderr,{given_filter}")
            is_number = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": given_filter,
                    "value": float(value),
                    "stderr": float(stderr) if is_number else None,
                    "samples": found.get("n-samples", {}).get(task, {}).get("effective"),
                    "shots": found.get("n-shot", {}).get(task),
                    "task_version": found.get("versions", {}).get(task),
                    "lm_eval": version,
                }
            )
    return rows


def write_alpaca_eval(source: Path, generator: str | None, output: Path | None) -> None:
    """Write a responses file as AlpacaEval reads it: instruction, output, generator.

    AlpacaEval's questions have no input; one that is there goes behind its instruction. Wanted
    outputs may be missing, as AlpacaEval compares with another model's.

    Raises:
        InputError: The file is missing, or an answer is.
    """
    path = responses_path(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file; `lightning_sft predict` writes responses")
    entries = read_entries(path, require_output=False)
    answers = [record.get("model_response") for record in read_records(path)]
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise InputError(f"{path}: entry {index}: 'model_response' is missing or no text")
    folder = path.resolve().parent
    name = generator or (folder.parent.name if folder.name.startswith("version_") else folder.name)
    records = [
        {
            "instruction": "\n\n".join(filter(None, (entry.instruction, entry.input))),
            "output": answer,
            "generator": name,
        }
        for entry, answer in zip(entries, answers, strict=True)
    ]
    target = Path(output or path.parent / ALPACA_EVAL_NAME).expanduser()
    files.write_json(target, records)
    print(f"{len(records)} answers of {name!r} for AlpacaEval: {target}")


def _find_tasks(names: list[str], include_path: Path | None) -> Any:
    """lm-eval's task manager, after checking that it knows all names."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"include_path: {include_path} is not a folder")
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InputError(
            f"tasks: lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and "
            "--include_path adds your own"
        )
    return manager
