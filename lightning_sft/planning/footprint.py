"""Memory of a training step, estimated; and what the devices of this machine offer.

Memory, in bytes, for P parameters of which T are trained, and a longest batch of N computed tokens
in B rows of width W:

    weights      4 P
    gradients    4 T, and as much again for DDP's buckets
    optimizer    what it keeps per parameter (AdamW: 8), measured on a small tensor, times T
    activations  what the blocks keep for their backward passes (`activations.py`), the input and
                 output of the last norm, and the hidden states that the head sees
    head         a chunk of logits, and the gradient of the head while chunks are added to it

With LoRA only adapters count as trained.

They are added up, for a step peaks where its forward pass ends: there Lightning still holds the
gradients of the step before. With `bf16-mixed` the weights' bfloat16 copies are added; `-true`
precisions halve everything but the exact softmax. With activation checkpointing the inputs
of all blocks count, and what one block takes beyond the logits. A sharded strategy divides weights,
gradients and optimizer state among the devices; what is gathered at one time comes on top.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_sft.data.counting import BatchShape
from lightning_sft.models.decoder import Decoder
from lightning_sft.models.loading import make_model
from lightning_sft.models.lora import add_lora
from lightning_sft.models.ready import find_device
from lightning_sft.planning.activations import NumberSizes, measure_blocks
from lightning_sft.training.loss import count_chunk_positions
from lightning_sft.training.module import SFTModule

FLOAT32 = 4.0  # bytes of a number


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return sum(dataclasses.astuple(self))


def estimate_memory(
    module: SFTModule,
    batch: BatchShape,
    precision: str = "32-true",
    devices: int = 1,
    sharded: bool = False,
) -> Memory:
    """Bytes of one training step on one device, by the module docstring's formulas.

    Args:
        sharded: The model is divided among the devices; otherwise each has a copy.
    """
    model, (total, trained) = skeleton(module), count_parameters(module)
    sizes = NumberSizes.of(precision)
    weights, gradients = float(sizes.stream * total), float(sizes.stream * trained)
    optimizer = trained * measure_optimizer(module) * sizes.stream / FLOAT32
    if sharded:
        whole = sizes.stream * _count_gathered(model, total)
        weights, gradients = weights / devices + whole, gradients / devices + whole
        optimizer /= devices
    elif devices > 1:
        gradients *= 2  # DDP's buckets
    if sizes.product < sizes.stream:
        # Autocast's narrow copies, of a sharded model's gathered weights too: the backward pass
        # multiplies with them again.
        weights += sizes.product * total
    logits, head_gradient = _count_head(model, batch, sizes)
    activations = _count_activations(module, model, batch, sizes, logits)
    return Memory(weights, gradients, optimizer, activations, logits + head_gradient)


def _count_activations(
    module: SFTModule, model: Decoder, batch: BatchShape, sizes: NumberSizes, logits: float
) -> float:
    """Bytes kept until the backward pass, in all blocks and around them."""
    blocks = measure_blocks(model, batch, sizes)
    width = float(batch.tokens * module.config.emb_dim * sizes.stream)
    around = 3 * width  # the last norm's input and output, and the head's input
    if module.activation_checkpointing:
        # Each block's input, and one block in full, which is computed again when logits are gone.
        again = max(max(blocks, default=0.0) - logits, 0.0)
        return len(blocks) * width + again + around
    return sum(blocks) + around


def _count_head(model: Decoder, batch: BatchShape, sizes: NumberSizes) -> tuple[float, float]:
    """Bytes of a chunk of logits and of the head's gradient, while chunks are added to it."""
    vocabulary = model.config.vocab_size
    trained = sum(p.numel() for p in model.out_head.parameters() if p.requires_grad)
    exact = max(sizes.stream, int(FLOAT32))  # of softmax and sums, in every precision
    chunk = min(count_chunk_positions(vocabulary, exact), batch.tokens) * vocabulary
    # Products of a narrower type stand beside what they are put into.
    of_logits = exact + sizes.product if sizes.product < exact else exact
    of_gradient = sizes.stream + sizes.product if sizes.product < sizes.stream else sizes.stream
    return float(chunk * of_logits), float(trained * of_gradient)


def _count_gathered(model: Decoder, total: int) -> float:
    """Parameters that a sharded model holds whole at one time: one block, and what is in none."""
    in_blocks = sum(p.numel() for p in model.trf_blocks.parameters())
    return total - in_blocks + in_blocks / len(model.trf_blocks)


def count_parameters(module: SFTModule) -> tuple[int, int]:
    """All parameters and the trained ones, without giving any of them memory."""
    parameters = list(skeleton(module).parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), trained


def skeleton(module: SFTModule) -> Decoder:
    """The module's model, adapters and all; one without memory where it is not made yet."""
    if module.model is not None:
        return module.model
    model = make_model(module.config)
    return add_lora(model, module.lora) if module.lora is not None else model


def measure_optimizer(module: SFTModule) -> float:
    """Bytes that the configured optimizer keeps per parameter, seen on a small tensor."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = module.optimizer([parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lambda: 0.0)
    state = optimizer.state[parameter].values()
    kept = [value for value in state if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in kept) / parameter.numel()


def free_memory(device: torch.device) -> float:
    """Bytes that a new process may take on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return float(fields["MemAvailable"].split()[0]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def count_devices(trainer: Any) -> int:
    """Processes that share a batch; `auto` is what this machine has."""
    devices = trainer.devices
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices).lstrip("-").isdecimal() and int(devices) > 0:
        count = int(devices)
    else:
        device = find_device(trainer.accelerator)
        count = torch.cuda.device_count() if device is not None and device.type == "cuda" else 1
    return max(count, 1) * trainer.num_nodes
