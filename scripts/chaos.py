"""Kill training and prediction at random moments, many times, and count what was lost.

    python scripts/chaos.py                                  # 200 and 50 kills, about ten minutes
    python scripts/chaos.py --kills 20 --predict_kills 5     # a look

A tiny GPT is trained through the real command line: one process and two (gloo), 0 and 2 workers, 1
and 4 accumulated batches, each under another mix of Lightning's limits (max_epochs, max_steps,
max_time, limits on an epoch, a validation within it or over two) and checkpoint intervals; with
shuffling, dropout, a schedule, and $TMPDIR on another file system where there is one. SIGKILL comes
at a random moment, or as soon as a checkpoint begins to be written; then every checkpoint is read,
and the run goes on with `--ckpt_path last` until it ends. It must then equal a run that was never
disturbed, bit for bit. Prediction is killed and restarted likewise, and its file compared.

Each command runs in a process forked from this one, so that a kill costs a run's time and not that
of importing torch once more; the process, its files and the signal are as real as any other's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

# What a command would import first of all; a fork has it already.
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.utils import tensorboard  # noqa: F401

from lightning_sft.__main__ import main as run_command
from lightning_sft.commands import training  # noqa: F401
from lightning_sft.commands.verify_resume import compare_runs
from lightning_sft.common.errors import LightningSFTError
from lightning_sft.common.files import read_jsonl
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.runs.responses import RESPONSES_NAME

ORPHAN_SECONDS = 60.0


class Variant(NamedTuple):
    """One way to train the tiny model."""

    processes: int
    workers: int
    accumulate: int
    limits: str = "epochs"

    @property
    def name(self) -> str:
        return f"p{self.processes}-w{self.workers}-a{self.accumulate}-{self.limits}"


# Options of the trainer that decide where epochs, validations and the run end.
LIMITS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 2},
    "both": {"max_epochs": 2, "max_steps": 12},
    "far": {"max_epochs": 2, "max_steps": 1000},
    "steps": {"max_epochs": -1, "max_steps": 12},
    "time": {"max_epochs": 2, "max_time": "00:01:00:00"},
    "within": {"max_epochs": 2, "max_steps": 1000, "val_check_interval": 3},
    "across": {"max_epochs": 2, "val_check_interval": 5, "check_val_every_n_epoch": None},
    "seldom": {"max_epochs": 2, "max_steps": 1000, "check_val_every_n_epoch": 2},
    "limited": {"max_epochs": 3, "max_steps": 1000, "limit_train_batches": 5},
    "unvalidated": {"max_epochs": 2, "max_steps": 12, "limit_val_batches": 0},
}
# Every mix of limits in one process; two processes, which take longer, with some.
VARIANTS = [
    *(Variant(1, 2 * (n % 2), 1 + 3 * (n // 2 % 2), name) for n, name in enumerate(LIMITS)),
    *(Variant(1, 0, 3, name) for name in ("epochs", "both", "within", "limited")),
    Variant(2, 0, 1, "epochs"),
    Variant(2, 2, 4, "both"),
    Variant(2, 0, 4, "within"),
    Variant(2, 2, 1, "far"),
]


def main() -> int:
    """Run the experiment; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="of training")
    parser.add_argument("--predict_kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="where the counts go as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, rng = time.monotonic(), random.Random(options.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        Command.log = Path(folder) / "log.txt"
        # The short part first: Ctrl-C ends the experiment, and its counts until then hold.
        with contextlib.suppress(KeyboardInterrupt):
            torment_predict(Path(folder), options.predict_kills, rng, counts)
            torment_training(Path(folder), options.kills, rng, counts)
    counts["minutes"] = round((time.monotonic() - begun) / 60)
    for name, count in counts.items():
        print(f"{name:<52} {count}")
    if options.out is not None:
        options.out.write_text(json.dumps(counts, indent=4))
    return int(any(count for name, count in counts.items() if name.startswith("LOST")))


def torment_training(folder: Path, kills: int, rng: random.Random, counts: Counter[str]) -> None:
    """Kill and resume until `kills` are spent, going round the variants."""
    wholes: dict[Variant, tuple[Path, float]] = {}
    number = 0
    while counts["training: kills"] < kills:
        variant = VARIANTS[number % len(VARIANTS)]
        if variant not in wholes:
            wholes[variant] = _train_undisturbed(folder, variant)
            counts["training: variants"] += 1
        whole, seconds = wholes[variant]
        config = write_config(folder, f"{variant.name}-{number}", variant)
        run = folder / "runs" / f"{variant.name}-{number}" / "version_0"
        while True:
            resume = ["--ckpt_path", "last"] if any(run.glob("checkpoints/step-*.ckpt")) else []
            if not resume:  # killed before the first checkpoint: there is nothing to go on from
                shutil.rmtree(run.parent, ignore_errors=True)
            command = Command(["fit", f"--config={config}", *resume], variant.processes)
            at_a_write = rng.random() < 0.4
            moment = rng.uniform(0.0, 1.2) * seconds
            while command.is_running() and command.seconds() < moment:
                if at_a_write and any(run.glob("checkpoints/.step-*.tmp")):
                    break
                time.sleep(0.0005)
            if not command.is_running():
                counts["training: runs finished"] += 1
                counts["LOST: commands that failed"] += command.wait() != 0
                break
            counts["training: kills"] += 1
            # Ranks that have not met yet are their launcher's to stop; here there is none.
            have_met = _has_logged(run, command.began_at)
            left = command.kill(rng, spare_one=have_met and rng.random() < 0.5)
            counts["LOST: ranks alive a minute after the other's death"] += left
            now_torn = len(list(run.glob("checkpoints/.step-*.tmp")))
            counts["training: kills while a checkpoint was written"] += now_torn > 0
            seen, unreadable = _read_all(run)
            counts["training: checkpoints read after a kill"] += seen
            counts["LOST: checkpoints unreadable"] += unreadable
        counts["LOST: runs that differ from the undisturbed one"] += not _equal_runs(run, whole)
        message = f"{config.stem}: {counts['training: kills']} kills, whole run {seconds:.1f} s"
        print(message, file=sys.stderr, flush=True)
        shutil.rmtree(run.parent)
        number += 1


def torment_predict(folder: Path, kills: int, rng: random.Random, counts: Counter[str]) -> None:
    """Kill and restart `predict` until `kills` are spent."""
    variant = Variant(1, 0, 1)
    whole, _ = _train_undisturbed(folder, variant, name="predict")
    arguments = [
        "predict",
        f"--ckpt_path={_newest(whole)}",
        "--data.predict_split=train",
        "--generation.batch_size=1",
    ]
    command = Command(arguments)
    assert command.wait() == 0
    seconds, target = command.seconds(), whole / RESPONSES_NAME
    expected = target.read_bytes()
    while counts["predict: kills"] < kills:
        target.unlink()
        while True:
            command = Command(arguments)
            moment = rng.uniform(0.1, 1.1) * seconds
            while command.is_running() and command.seconds() < moment:
                time.sleep(0.0005)
            if not command.is_running():
                break
            counts["predict: kills"] += 1
            command.kill(rng)
            done = [r["index"] for p in whole.glob("responses.part-*") for r in read_jsonl(p)]
            counts["predict: answers on disk at the kills"] += len(done)
            counts["LOST: entries answered twice"] += len(done) - len(set(done))
        counts["predict: runs finished"] += 1
        counts["LOST: predict commands that failed"] += command.wait() != 0
        same = target.exists() and target.read_bytes() == expected
        counts["LOST: response files that differ"] += not same


class Command:
    """A command in forked processes of its own, one a rank."""

    log = Path(os.devnull)

    def __init__(self, arguments: list[str], processes: int = 1) -> None:
        self._begun = self._ended = time.monotonic()
        self.began_at = time.time()
        self.codes: dict[int, int | None] = {}
        port = _free_port()
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                _run_forked(arguments, rank, processes, port, self.log)
            self.codes[pid] = None

    def is_running(self) -> bool:
        """Whether any rank is."""
        for pid in [pid for pid, code in self.codes.items() if code is None]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                self._ended = time.monotonic()
        return None in self.codes.values()

    def seconds(self) -> float:
        """Since its start; once it has ended, of its whole life."""
        return (time.monotonic() if None in self.codes.values() else self._ended) - self._begun

    def wait(self, timeout: float = 300.0) -> int:
        """Wait for its end; an exit code other than 0, if a rank has one."""
        while self.is_running():
            if self.seconds() > timeout:
                raise TimeoutError(f"a command took more than {timeout} s; see {self.log}")
            time.sleep(0.002)
        return next((code for code in self.codes.values() if code), 0)

    def kill(self, rng: random.Random, spare_one: bool = False) -> int:
        """SIGKILL all ranks, or all but one; how many were alive a minute later."""
        alive = [pid for pid, code in self.codes.items() if code is None]
        rng.shuffle(alive)
        spared = int(spare_one and len(alive) > 1)
        for pid in alive[spared:]:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + ORPHAN_SECONDS
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.002)
        left = [pid for pid, code in self.codes.items() if code is None]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.wait()
        return len(left)


def _run_forked(arguments: list[str], rank: int, processes: int, port: int, log: Path) -> None:
    """In the child: become this rank, run the command, and be gone."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if Path("/dev/shm").is_dir():
            os.environ["TMPDIR"], tempfile.tempdir = "/dev/shm", None
        if processes > 1:  # as torchrun says it
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
            sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
            os.environ |= {name: str(value) for name, value in (ranks | sizes | place).items()}
            rank_zero_only.rank = rank  # was read from the environment when lightning was imported
        code = run_command(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def write_config(folder: Path, name: str, variant: Variant) -> Path:
    """A run of at most 16 micro-batches in two or three epochs."""
    entries = [
        {
            "instruction": f"Say the number {n}" + " again" * (n % 5),
            "input": f"in words {n}" if n % 3 == 0 else "",
            "output": f"It is {n}." + " Indeed." * (n % 4),
        }
        for n in range(40)
    ]
    data = folder / "data.json"
    if not data.exists():
        data.write_text(json.dumps(entries))
    model = {
        "architecture": {
            "emb_dim": 32,
            "n_heads": 4,
            "n_layers": 2,
            "context_length": 128,
            "drop_rate": 0.1,
        },
        "weights": None,
        "lr_scheduler": {"class_path": "lightning_sft.WarmupCosine", "init_args": {"warmup": 0.2}},
    }
    trainer = {
        "accelerator": "cpu",
        "devices": variant.processes,
        "strategy": "ddp" if variant.processes > 1 else "auto",
        "accumulate_grad_batches": variant.accumulate,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **LIMITS[variant.limits],
    }
    config = {
        "model": model,
        "trainer": trainer,
        "data": {
            "path": str(data),
            "max_length": 128,
            "batch_size": 4 // variant.processes,
            "num_workers": variant.workers,
        },
        "checkpoints": {"every_n_steps": 1 if variant.accumulate > 1 else 3, "keep_last": 2},
        "loss_curve": {"every_n_steps": 0},
        "generation": {"max_new_tokens": 8},
        "run": {"dir": str(folder / "runs"), "name": name},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _train_undisturbed(
    folder: Path, variant: Variant, name: str | None = None
) -> tuple[Path, float]:
    """The reference: its run folder, and how long it took."""
    config = write_config(folder, name or f"{variant.name}-whole", variant)
    command = Command(["fit", f"--config={config}"], variant.processes)
    if command.wait() != 0:
        raise RuntimeError(Command.log.read_text()[-2000:])
    return folder / "runs" / config.stem / "version_0", command.seconds()


def _read_all(run: Path) -> tuple[int, int]:
    """How many checkpoints have their final name, and how many of them cannot be read."""
    paths, unreadable = list(run.glob("checkpoints/step-*.ckpt")), 0
    for path in paths:
        try:
            read_checkpoint(path)
        except LightningSFTError as error:
            print(error, file=sys.stderr)
            unreadable += 1
    return len(paths), unreadable


def _equal_runs(run: Path, whole: Path) -> bool:
    """Bitwise: the newest checkpoints, what was logged, the samples; and the same files."""
    differing = compare_runs(run, whole)
    left, right = ({path.name for path in folder.glob("*.*")} for folder in (run, whole))
    own = {name for name in left ^ right if not name.startswith(("events.", "config-resumed"))}
    differing += sorted(own)
    samples = [(folder / "samples.jsonl").read_text() for folder in (run, whole)]
    differing += ["samples"] if samples[0] != samples[1] else []
    if differing:
        print(f"{run.parent.name} differs in {', '.join(differing)}", file=sys.stderr)
    return not differing


def _has_logged(run: Path, since: float) -> bool:
    """Whether a command that began then is training; a resumed one rewrites the file first."""
    metrics = run / "metrics.csv"
    return metrics.exists() and metrics.stat().st_mtime > since


def _newest(run: Path) -> Path:
    return max(run.glob("checkpoints/step-*.ckpt"))


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
