"""What autograd really keeps of a forward pass."""

from __future__ import annotations

import contextlib

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from lightning_sft import SFTModule
from lightning_sft.data.batching import collate, pack
from lightning_sft.data.tokenizer import END_OF_TEXT
from lightning_sft.models.layers import PackedLayout
from lightning_sft.planning.outlook import BatchShape


def make_batch(layout: str, eos: int = END_OF_TEXT) -> tuple[dict[str, torch.Tensor], BatchShape]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 500, (n,), generator=generator).tolist() for n in (200, 150, 100, 240)]
    if layout == "share_prefix":
        rows = [list(range(60)) + row[60:] for row in rows]
    packed = layout != "padded"
    if packed:
        batch = pack(rows, share_prefix=layout == "share_prefix", eos_token_id=eos)
    else:
        batch = collate(rows, eos_token_id=eos, pad_token_id=eos)
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


def measure_peak(module: SFTModule, batch: dict[str, torch.Tensor], mixed: bool = False) -> int:
    """Most bytes of tensors that a step holds, taken in Lightning's order.

    That lets the gradients of the step before go only when the forward pass is done.
    """
    module.lr_scheduler = None
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            loss, count = module.sum_loss(batch)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()

    step()  # makes the optimizer's state
    held: list[torch.Tensor] = list(module.network.parameters())
    held += [p.grad for p in held if p.grad is not None]
    held += [t for state in optimizer.state.values() for t in state.values()]
    begun = sum(tensor.nbytes for tensor in held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return begun + peak
