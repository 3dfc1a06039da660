"""Tokenizing beside `datasets.map`: the same entries, the same tokenizer, as many processes.

Both sides begin with the entries read, and end with the rows on disk: ours in the token cache,
theirs in an arrow file. Both encode prompt and answer apart with GPT-2's tokenizer; that the ids
are the same is checked. The sides take turns. `cpu` are seconds of processor time, the processes'
own start included; on a machine that has other work to do it says more than `wall` does.

    python scripts/benchmark_tokenizing.py --entries 52002 --processes 2

Needs `datasets`, which comes with the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alpaca_scale import ENTRIES, SEED, make_entries
from lightning_sft.data import tokenizing
from lightning_sft.data.conversation import Entry
from lightning_sft.data.encoding import encode_prompt, encode_response
from lightning_sft.data.prompts import get_style
from lightning_sft.data.token_cache import tokenize_entries
from lightning_sft.data.tokenizer import gpt2_tokenizer


def tokenize_ours(records: list[dict[str, str]], processes: int) -> np.ndarray:
    """All ids, one row behind the other."""
    tokenizing.PROCESSES_FROM_ENTRIES = 0 if processes > 1 else len(records) + 1
    tokenizing.count_cores = lambda: processes
    entries = [Entry(**record) for record in records]
    return tokenize_entries(entries, get_style("alpaca"), gpt2_tokenizer()).ids


def encode(record: dict[str, str]) -> dict[str, list[int]]:
    """What `datasets.map` calls for each record."""
    entry, style, tokenizer = Entry(**record), get_style("alpaca"), gpt2_tokenizer()
    prompt = encode_prompt(entry, style, tokenizer)
    return {"input_ids": prompt + encode_response(entry, style, tokenizer)}


def tokenize_theirs(data: Any, processes: int, file: Path) -> np.ndarray:
    """The same through `datasets.map`."""
    mapped = data.map(
        encode,
        num_proc=processes if processes > 1 else None,
        remove_columns=data.column_names,
        cache_file_name=str(file),
    )
    return mapped.data.column("input_ids").combine_chunks().flatten().to_numpy()


def measure(work: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
    """Seconds by the clock and of processors, those of finished children included."""
    begun, used = time.time(), processor_seconds()
    ids = work()
    return time.time() - begun, processor_seconds() - used, ids


def processor_seconds() -> float:
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure tokenizing beside datasets.map.")
    parser.add_argument("--entries", type=int, default=ENTRIES)
    parser.add_argument("--processes", type=int, default=tokenizing.count_cores())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import datasets

    datasets.disable_progress_bars()
    records = make_entries(options.entries, random.Random(SEED))
    print(f"{len(records):,} entries, {options.processes} processes")
    print("| | wall s | cpu s | load |\n|---|---|---|---|")
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "data.jsonl")
            path.write_text("\n".join(map(json.dumps, records)))
            os.environ["LIGHTNING_SFT_CACHE"] = folder
            data = datasets.load_dataset("json", data_files=str(path), cache_dir=folder)["train"]
            sides: dict[str, Callable[[], np.ndarray]] = {
                "ours": lambda: tokenize_ours(records, options.processes),
                "datasets.map": lambda data=data, folder=folder: tokenize_theirs(
                    data, options.processes, Path(folder, "mapped.arrow")
                ),
            }
            found = []
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                wall, cpu, ids = measure(sides[name])
                print(f"| {name} | {wall:.1f} | {cpu:.1f} | {os.getloadavg()[0]:.1f} |", flush=True)
                found.append(np.array(ids))
            if not np.array_equal(*found):
                raise SystemExit("the ids differ")


if __name__ == "__main__":
    main()
