"""What 52,002 entries cost before the first step: `inspect`, tokenizing, and the cache.

Writes a made-up file of Stanford Alpaca's size and of its lengths, where the real one cannot be
downloaded: answers of 270 characters on average with a long tail, two entries in five with an
input. Its texts are words by chance, so nothing can be learned from it. Then it runs, each in a
process of its own, `inspect`, `fit` with nothing in the cache, and `fit` again, for a few steps of
a toy model with `alpaca-52k.yaml`, and prints seconds per 1,000 entries and the most memory held.

    python scripts/alpaca_scale.py --out alpaca-scale
    python scripts/alpaca_scale.py --out alpaca-scale --entries 2000     # a trial
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ENTRIES, SEED = 52_002, 123
MEAN_ANSWER, LONGEST_ANSWER, SPREAD = 270, 4_200, 1.1  # characters; SPREAD of the logarithm
TEXT = """
the of and to in a is that for it as was with be by on not he his but at are this have from
or had an they which one you were her all she there would their we him been has when who will
more no if out so said what up its about into than them can only other new some could time
these two may then do first any my now such like our over man me even most made after also
did many before must through back years where much your way well down should because each
just those people how too little state good very make world still own see men work long get
here between both life being under never day same another know while last might great old
year off come since against go came right used take three states himself few house use during
without again place American around however home small found thought went say part once
general high upon school every different important example system energy process computer
language environment temperature photosynthesis development government technology information
"""
WORDS = TEXT.split()
ARCHITECTURE = {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "context_length": 512}


def make_entries(count: int, rng: random.Random, first: int = 0) -> list[dict[str, str]]:
    """Entries whose answers have the wanted mean length and a log-normal tail.

    Args:
        first: The number that the first one carries in its text, so that none is there twice.
    """
    raw = [rng.lognormvariate(0.0, SPREAD) for _ in range(count)]
    scale = MEAN_ANSWER * count / sum(raw)
    for _ in range(20):  # cutting the tail lowers the mean; scale until it is right again
        lengths = [min(max(value * scale, 2.0), LONGEST_ANSWER) for value in raw]
        scale *= MEAN_ANSWER * count / sum(lengths)
    return [
        {
            "instruction": f"{number}: {make_text(rng.gauss(60, 20), rng)}",
            "input": make_text(rng.expovariate(1 / 65), rng) if rng.random() < 0.4 else "",
            "output": make_text(length, rng),
        }
        for number, length in enumerate(lengths, first)
    ]


def make_text(length: float, rng: random.Random) -> str:
    """Words, frequent ones first, of about that many characters."""
    words: list[str] = []
    left = max(length, 5.0)
    while left > 0:
        words.append(WORDS[min(int(rng.expovariate(4 / len(WORDS))), len(WORDS) - 1)])
        left -= len(words[-1]) + 1
    return " ".join(words)


def write_data(path: Path, count: int) -> None:
    """The entries as the chapter's file is laid out or, for any number of them, as JSONL."""
    rng = random.Random(SEED)
    if path.suffix == ".json":
        path.write_text(json.dumps(make_entries(count, rng), indent=4))
        return
    with path.open("w") as file:
        for begin in range(0, count, ENTRIES):
            for entry in make_entries(min(ENTRIES, count - begin), rng, begin):
                file.write(json.dumps(entry) + "\n")


def run_measured(name: str, count: int, *arguments: str, **environment: str) -> str:
    """A command of the package: a row of the table."""
    begun = time.time()
    command = [sys.executable, "-m", "lightning_sft", *arguments]
    log = Path(f"{name.replace(' ', '-').replace(',', '')}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed:\n{log.read_text()[-2000:]}")
    seconds = time.time() - begun
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    row = f"| {name} | {seconds:.1f} | {1000 * seconds / count:.2f} | {peak:.2f} |"
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a data set of Alpaca's size.")
    parser.add_argument("--out", type=Path, default=Path("alpaca-scale"))
    parser.add_argument("--entries", type=int, default=ENTRIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jsonl", action="store_true", help="write JSONL, which is not held")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)
    shutil.rmtree("cache", ignore_errors=True)
    path = Path("alpaca-like.jsonl" if options.jsonl else "alpaca-like.json")
    write_data(path, options.entries)
    size, load = path.stat().st_size / 1e6, os.getloadavg()[0]
    print(f"{options.entries:,} entries, {size:.0f} MB; load {load:.1f}\n")
    configs = Path(__file__).resolve().parent.parent / "configs"
    data = [f"--config={configs / 'gpt2-small.yaml'}", f"--config={configs / 'alpaca-52k.yaml'}"]
    data += [f"--data.path={path}"]
    few = ["--model.weights=null", f"--model.architecture={json.dumps(ARCHITECTURE)}"]
    few += [
        "--trainer.max_steps=3",
        "--trainer.limit_val_batches=0",
        "--loss_curve.every_n_steps=0",
    ]
    few += ["--samples.indices=[]", "--run.dir=runs", "--trainer.accelerator=cpu"]
    settings = {"LIGHTNING_SFT_CACHE": str(Path("cache").resolve())}
    settings["OMP_NUM_THREADS"] = str(options.threads)
    rows = ["| | seconds | per 1,000 entries | peak GB |", "|---|---|---|---|"]
    print("\n".join(rows))
    count = options.entries
    rows.append(run_measured("fit, tokenizing", count, "fit", *data, *few, **settings))
    rows.append(run_measured("fit, from the cache", count, "fit", *data, *few, **settings))
    shutil.rmtree("cache", ignore_errors=True)
    rows.append(run_measured("inspect, tokenizing", count, "inspect", *data, **settings))
    rows.append(run_measured("inspect, from the cache", count, "inspect", *data, **settings))
    Path("results.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
