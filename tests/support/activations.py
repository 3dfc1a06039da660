"""What autograd really keeps of a forward pass."""

from __future__ import annotations

import contextlib

import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_sft import SFTModule
from lightning_sft.data.batching import collate, pack
from lightning_sft.models.layers import PackedLayout
from lightning_sft.planning.outlook import BatchShape


def make_batch(layout: str) -> tuple[dict[str, torch.Tensor], BatchShape]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 500, (n,), generator=generator).tolist() for n in (200, 150, 100, 240)]
    if layout == "share_prefix":
        rows = [list(range(60)) + row[60:] for row in rows]
    packed = layout != "padded"
    batch = pack(rows, share_prefix=layout == "share_prefix") if packed else collate(rows)
    return batch, BatchShape(batch["input_ids"].numel(), len(rows), batch["targets"].shape[1])


def layout_of(batch: dict[str, torch.Tensor]) -> PackedLayout | None:
    if "gather" not in batch:
        return None
    return PackedLayout(batch["positions"], batch["gather"], batch["scatter"])


def measure_activations(module: SFTModule, batch: dict[str, torch.Tensor], mixed: bool) -> int:
    """Bytes that autograd really keeps for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in module.network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.dtype != torch.int64 and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        module.network.hidden_states(batch["input_ids"], layout=layout_of(batch))
    return sum(storage.nbytes() for storage in kept.values())
