"""What `prepare` costs on 100,000 entries, and whether it finds all that brute force finds there.

Writes a made-up file of that size (`alpaca_scale.py` says of what kind) in which one entry in fifty
has a near-twin somewhere: the same with one word exchanged. Runs `prepare` on it in a process of
its own and prints seconds and peak memory. Then takes some entries by chance, compares each with
every other as the book does, and counts the pairs that the search of `prepare` found as well.

    python scripts/benchmark_prepare.py --out prepare-scale
    python scripts/benchmark_prepare.py --out prepare-scale --entries 5000     # a trial
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from alpaca_scale import SEED, WORDS, make_entries
from lightning_sft.data.entries import read_entries
from lightning_sft.data.near_duplicates import comparison_text, find_twins

ENTRIES, TWINS = 100_000, 50  # one entry in so many gets a twin
SAMPLE, AT_A_TIME = 1_000, 100  # entries that are compared with all others


def make_file(path: Path, count: int) -> None:
    """Entries in a random order, with planted near-twins among them."""
    rng = random.Random(SEED)
    entries = make_entries(count - count // TWINS, rng)
    for entry in rng.sample(entries, count // TWINS):
        words = entry["instruction"].split(" ")
        words[rng.randrange(1, len(words))] = rng.choice(WORDS)
        entries.append(entry | {"instruction": " ".join(words)})
    rng.shuffle(entries)
    path.write_text(json.dumps(entries, indent=4))


def run_measured(path: Path, threshold: float) -> None:
    """`prepare` in a process of its own."""
    command = [sys.executable, "-m", "lightning_sft", "prepare", "--data.path", str(path)]
    begun = time.time()
    process = subprocess.Popen([*command, f"--threshold={threshold}"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("prepare failed")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    processor = usage.ru_utime + usage.ru_stime  # of all threads
    print(f"\n{time.time() - begun:.1f} s, of the processor {processor:.1f} s; peak {peak:.2f} GB")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def measure_recall(path: Path, threshold: float) -> None:
    """Pairs of a sample of entries with all others: by brute force, and by the search."""
    texts = [comparison_text(entry) for entry in read_entries(path)]
    twins = find_twins(texts, threshold)
    found = set(zip(twins.first.tolist(), twins.second.tolist(), strict=True))
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit_transform(texts)
    sample = np.array(random.Random(SEED).sample(range(len(texts)), min(SAMPLE, len(texts))))
    wanted = set()
    for begin in range(0, len(sample), AT_A_TIME):
        places = sample[begin : begin + AT_A_TIME]
        cosines = (vectors[places] @ vectors.T).toarray()
        for row, other in zip(*np.nonzero(cosines >= threshold - 1e-9), strict=True):
            pair = sorted((int(twins.text_of[places[row]]), int(twins.text_of[other])))
            if pair[0] != pair[1]:
                wanted.add(tuple(pair))
    print(f"{len(sample):,} entries against all by brute force: {len(wanted):,} pairs, of which")
    print(f"the search found {len(wanted & found):,}; it found {len(found):,} in all")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure prepare on a large data set.")
    parser.add_argument("--out", type=Path, default=Path("prepare-scale"))
    parser.add_argument("--entries", type=int, default=ENTRIES)
    parser.add_argument("--threshold", type=float, default=0.9)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)
    path = Path("many.json")
    make_file(path, options.entries)
    print(f"{options.entries:,} entries, {path.stat().st_size / 1e6:.0f} MB")
    run_measured(path, options.threshold)
    measure_recall(path, options.threshold)


if __name__ == "__main__":
    main()
