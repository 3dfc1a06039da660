"""`recipes`: fit, answer and report one configuration with several overlays, and compare them.

    python -m lightning_sft recipes run baseline mask-prompt phi3 lora --config gpt2-small.yaml

A recipe is an overlay's name; `mask-prompt+lora` stands for two, `baseline` for none. What follows
the names goes to `fit`, `predict` and `validate`, each of which runs in a process of its own, so
that memory is counted per recipe. Everything is kept in `runs/recipes/<config>/<recipe>/`: the same
command again goes on where it was stopped and repeats nothing. It ends in `recipes.html`,
`recipes.json` and a table.

This module does not import torch; `recipes loss`, one of those processes, does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_sft.commands.recipes_page import LOSS_NAME, SESSIONS_NAME, summarize_recipes
from lightning_sft.common import files
from lightning_sft.common.arguments import (
    CONFIG,
    PROGRAM,
    find_option,
    find_shipped,
    option_values,
    read_layers,
    without_option,
)
from lightning_sft.common.config_files import read_config
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.runs.responses import RESPONSES_NAME
from lightning_sft.runs.run_folder import newest_run, saved_checkpoints

KNOWN = {
    "baseline": "the configuration as it is",
    "phi3": "exercise 7.1, the Phi-3 prompt",
    "mask-prompt": "exercise 7.2, loss on the answers alone",
    "alpaca-52k": "exercise 7.3, 52,002 entries",
    "lora": "exercise 7.4, adapters beside frozen weights",
}
USAGE = f"""usage: {PROGRAM} recipes run RECIPE ... --config FILE.yaml [OPTIONS]

recipes, joined by '+' for several at once:
{chr(10).join(f"  {name:<12} {summary}" for name, summary in KNOWN.items())}
or any other overlay's name. The first one is what the others are held against. OPTIONS are those
of fit and win over the overlays."""


class Study(NamedTuple):
    """What is compared: a folder for all runs, and the command line that they share."""

    folder: Path
    configs: list[Path]
    options: list[str]
    recipes: dict[str, list[Path]]  # name → overlays


class ChildEndedError(Exception):
    """A process ended with that exit code, or a signal asked for the end."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def recipes(arguments: list[str]) -> int:
    """Run `recipes run …`, or the inner `recipes loss …`.

    Returns:
        0; 128 + the signal's number when stopped; the code of a process that failed.

    Raises:
        InputError: The command line is wrong, or the folder holds runs of another one.
    """
    if not arguments or arguments[0] in ("-h", "--help") or {"-h", "--help"} & set(arguments[1:]):
        print(USAGE)
        return 0
    if arguments[0] == "loss":
        from lightning_sft.commands.training import measure_validation

        folder, measured = measure_validation(arguments[1:])
        if folder is not None:
            files.write_json(folder / LOSS_NAME, measured)
        return 0
    if arguments[0] != "run":
        raise InputError(f"recipes: unknown {arguments[0]!r}; allowed: run")
    study = read_study(arguments[1:])
    _claim(study)
    names = list(study.recipes)
    with forward_signals() as children:
        for number, name in enumerate(names, start=1):
            try:
                run_recipe(study, name, children)
            except ChildEndedError as stopped:
                print(
                    f"{name} ({number} of {len(names)}) was not finished; the same command goes on"
                )
                return stopped.code
    print(
        summarize_recipes(study.folder, {name: newest_run(study.folder / name) for name in names})
    )
    return 0


def read_study(arguments: list[str]) -> Study:
    """Recipes, configs and options of a command line.

    Raises:
        InputError: No recipe, no config, or an unknown recipe.
    """
    count = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    names, rest = list(dict.fromkeys(arguments[:count])), arguments[count:]
    if not names:
        raise InputError(f"recipes: none named; allowed: {', '.join(KNOWN)}, joined by '+'")
    overlays = {name: _find_overlays(name) for name in names}
    config, options = read_layers(rest)
    configs = [Path(path) for path in option_values(rest, *CONFIG)]
    if not configs:
        raise InputError("recipes: --config is missing; name the configuration to start from")
    folder, name = find_option(options, "--run.dir"), find_option(options, "--run.name")
    options = without_option(options, "--run.dir", "--run.name")
    named = config.get("run", {})
    parent = Path(folder or named.get("dir") or "runs") / "recipes"
    study_name = name or named.get("name") or configs[0].stem
    return Study(parent / study_name, configs, options, overlays)


def run_recipe(study: Study, name: str, children: Children) -> None:
    """Whatever is still missing of one recipe: training, answers, loss, report.

    Raises:
        ChildEndedError: One of the processes did not reach its end.
    """
    shared = [f"--config={path}" for path in (*study.configs, *study.recipes[name])]
    shared += [*study.options, f"--run.dir={study.folder}", f"--run.name={name}"]
    run = newest_run(study.folder / name)
    if not is_trained(run):
        saved = run is not None and bool(saved_checkpoints(run))
        print(f"\n{name}: {'going on' if saved else 'training'}", flush=True)
        code, session = children.run("fit", *shared, *(["--ckpt_path=last"] if saved else []))
        run = newest_run(study.folder / name)
        if run is not None:
            files.append_line(run / SESSIONS_NAME, json.dumps(session))
        if code:
            raise ChildEndedError(code)
    assert run is not None
    checked = [*shared, "--ckpt_path=last"]
    whole = ["--data.mask_prompt=true", "--trainer.limit_val_batches=1.0"]
    steps = {
        RESPONSES_NAME: ["predict", *checked],
        LOSS_NAME: ["recipes", "loss", *checked, *whole],
        "report.html": ["report", str(run)],
    }
    for result, command in steps.items():
        if not (run / result).exists() and (code := children.run(*command)[0]):
            raise ChildEndedError(code)


def is_trained(run: Path | None) -> bool:
    """Whether a `fit` that wrote there came to its end."""
    if run is None:
        return False
    sessions = files.read_jsonl(run / SESSIONS_NAME) if (run / SESSIONS_NAME).exists() else []
    return any(run.glob("*-sft.pth")) or any(session["exit"] == 0 for session in sessions)


class Children:
    """Processes, one at a time, that get the signals which this one gets."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.received = 0

    def forward(self, signum: int, frame: object) -> None:
        """Hand a signal on to the child, and remember it."""
        self.received = signum
        if self.child is not None:
            self.child.send_signal(signum)

    def run(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """A command of this program to its end: exit code, and what it took.

        Raises:
            ChildEndedError: A signal came before it began.
        """
        if self.received:
            raise ChildEndedError(128 + self.received)
        begun = time.time()
        # A session of its own: Ctrl-C at a terminal would reach it twice, and twice means at once.
        command = [sys.executable, "-m", "lightning_sft", *arguments]
        self.child = subprocess.Popen(command, start_new_session=True)
        if self.received:
            self.child.send_signal(self.received)
        _, status, usage = os.wait4(self.child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.child.returncode, self.child = code, None
        if code and self.received:
            code = 128 + self.received
        session = {"exit": code, "seconds": time.time() - begun, "peak_gb": _peak_gb(usage)}
        return (code if code >= 0 else 128 - code), session


@contextlib.contextmanager
def forward_signals() -> Iterator[Children]:
    """SIGINT and SIGTERM go to the running child, which ends in order; this process then does."""
    children = Children()
    before = {s: signal.signal(s, children.forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield children
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _peak_gb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _find_overlays(name: str) -> list[Path]:
    """The files behind a recipe's name.

    Raises:
        InputError: A part is no overlay that is here or shipped.
    """
    parts = [part for part in name.split("+") if part != "baseline"]
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise InputError(
            f"recipes: {name!r} is no recipe; allowed: {', '.join(KNOWN)}, or overlays"
        )
    try:
        found = [find_shipped(f"{part}.yaml", "recipe") for part in parts]
    except InputError:
        raise InputError(
            f"recipes: {name!r} is no recipe; allowed: {', '.join(KNOWN)}, joined by '+', or the "
            "name of a .yaml overlay here"
        ) from None
    for path in found:
        read_config(path)
    return found


def _claim(study: Study) -> None:
    """Keep what the runs share, and refuse to mix them with runs of something else."""
    config, _ = read_layers([f"--config={path}" for path in study.configs])
    now = json.loads(json.dumps({"config": config, "options": study.options}, default=str))
    path = study.folder / "study.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, now)
        return
    try:
        before = files.read_json(path)
    except ValueError:
        raise ServiceError(f"{path}: is damaged; remove {study.folder}") from None
    if before != now:
        raise InputError(
            f"{study.folder}: holds recipes of another configuration or other options; give "
            "another --run.name, or remove it"
        )
