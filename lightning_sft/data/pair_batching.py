"""Pairs → batches: both rows of each pair, side by side, in one batch.

>>> make = PairBatchMaker(BatchMaker(1024, True, False, True), "train")
>>> make([rows[0], rows[1]])["gather"].shape  # chosen, rejected, chosen, rejected
torch.Size([4, 97])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_sft.data.batching import BatchMaker
from lightning_sft.data.loader import Batch
from lightning_sft.data.pair_rows import PairRow


@dataclass(frozen=True)
class PairBatchMaker:
    """Pairs → one batch whose rows 2k and 2k + 1 are the answers of pair k.

    Args:
        make_rows: Lays the rows out, with `mask_prompt`.
        split: The name of their split, by which precomputed numbers of a pair are found.
    """

    make_rows: BatchMaker
    split: str = ""

    def __call__(self, pairs: list[PairRow]) -> Batch:
        """As `BatchMaker`, with (2P, T) targets, and `index` (P,): the pairs' places; `split`."""
        # A repeat's rows are repeats: the same tokens, no targets.
        rows = [
            row if pair.index >= 0 else row._replace(index=-1)
            for pair in pairs
            for row in (pair.chosen, pair.rejected)
        ]
        index = torch.tensor([pair.index for pair in pairs])
        return self.make_rows(rows) | {"index": index, "split": self.split}
