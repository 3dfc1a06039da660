"""How a training step grows with row length and batch size, padded and packed.

    python scripts/benchmark_layouts.py                          # gpt2-small's width, 4 blocks
    python scripts/benchmark_layouts.py --layers 12 --lengths 1024 --batches 8

Rows of random tokens, with nothing in common, of the given length or ragged: evenly from half of it
to all of it. Each cell is the median time of a forward and a backward pass; `packed` also computes
what attention gathers and scatters, `padded` also computes the padding. Equal rows without padding
are the packed layout's worst case.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from statistics import median

import numpy as np
import torch

from lightning_sft.data.batching import BatchMaker
from lightning_sft.data.rows import Row
from lightning_sft.training.module import SFTModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    architecture = {"emb_dim": 768, "n_heads": 12, "n_layers": options.layers}
    module = SFTModule(architecture, weights=None)
    module.configure_model()
    print("| rows | padded, s | packed, s | packed / padded |\n| --- | --- | --- | --- |")
    for batch_size in options.batches:
        for length in options.lengths:
            for ragged in (False, True) if batch_size > 1 else (False,):
                batches = make_batches(batch_size, length, ragged)
                times = {name: [time_step(module, batch)] for name, batch in batches.items()}
                for _ in range(options.repeats):  # the first one warmed up
                    for name, batch in batches.items():
                        times[name].append(time_step(module, batch))
                padded, packed = (median(times[name][1:]) for name in ("padded", "packed"))
                shape = f"{batch_size} × {length // 2}–{length}" if ragged else None
                cells = [shape or f"{batch_size} × {length}", f"{padded:.2f}", f"{packed:.2f}"]
                print(f"| {' | '.join(cells)} | {packed / padded:.2f} |", flush=True)
    print(f"\npeak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def make_batches(batch_size: int, length: int, ragged: bool) -> dict[str, dict[str, torch.Tensor]]:
    """The same rows in both layouts."""
    rng = np.random.default_rng(0)
    shortest = length // 2 if ragged else length
    lengths = np.linspace(shortest, length, batch_size).astype(int)
    rows = [Row(rng.integers(0, 50_000, size).tolist(), 0) for size in lengths]
    return {
        "padded": BatchMaker(1024, False, False, False)(rows),
        "packed": BatchMaker(1024, False, True, True)(rows),
    }


def time_step(module: SFTModule, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward and backward pass; the optimizer costs both the same."""
    module.zero_grad(set_to_none=True)
    begun = time.perf_counter()
    loss, count = module.sum_loss(batch)
    (loss / count).backward()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
