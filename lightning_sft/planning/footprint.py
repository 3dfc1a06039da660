"""Memory of a training step, estimated; and what the devices of this machine offer.

Memory, in bytes, for P parameters of which T are trained, and a longest batch of N computed tokens
in B rows of width W:

    weights      4 P
    gradients    4 T, and as much again for DDP's buckets
    optimizer    what it keeps per parameter (AdamW: 8), measured on a small tensor, times T
    activations  a block keeps 16 numbers per token and dimension for its backward pass: the inputs
                 of its two norms, their outputs, query, key and value, attention's result and, four
                 wide each, the two sides of GELU. A packed batch keeps query, key, value and
                 attention's result for all B·W places and one more per computed token; dropout adds
                 masks, and attention weights where it rules out the fused kernel
    head         a chunk of logits, and the gradient of the head while chunks are added to it

With LoRA only adapters count as trained; each adds `rank` numbers per token to the activations, and
a frozen layer without one does not keep its input.

They are added up although they do not all peak at the same moment, so the sum errs on the safe
side. With `bf16-mixed` a block's activations count two thirds and bfloat16 copies of the weights
are added; `-true` precisions halve everything but the exact softmax. With activation checkpointing
one block's activations count and the inputs of all. A sharded strategy divides weights, gradients
and optimizer state among the devices; what is gathered at one time comes on top.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.lora import LoRALinear, add_lora
from lightning_sft.planning.outlook import BatchShape
from lightning_sft.training.loss import count_chunk_positions
from lightning_sft.training.module import SFTModule

# Autocast keeps the residual stream in float32 and one bfloat16 copy for each linear layer.
MIXED_SHARE = 0.65


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
    total, trained = count_parameters(module)
    config, packed = module.config, batch.tokens != batch.rows * batch.width
    places, tokens = batch.rows * batch.width, batch.tokens
    numbers: float = 13 * tokens + 4 * places if packed else 16 * tokens  # for each dimension
    model, blocks = skeleton(module), config.n_layers
    if module.lora is not None:
        blocks, more = count_adapter_numbers(model, module.lora.dropout)
        numbers += more * tokens
    per_block = numbers * config.emb_dim * 4.0
    dropout = 0.0  # of one block
    if config.drop_rate > 0:
        dropout = 2.0 * tokens * config.emb_dim + 12.0 * places * config.n_heads * batch.width
    stream = 3.0 * tokens * config.emb_dim * 4  # before and behind the blocks
    if module.activation_checkpointing:  # each block's input, and one block in full
        stream += blocks * tokens * config.emb_dim * 4.0
        blocks = min(blocks, 1)
    activations = blocks * (per_block + dropout) + stream
    mixed = blocks * (MIXED_SHARE * per_block + dropout) + stream
    head_trained = sum(p.numel() for p in model.out_head.parameters() if p.requires_grad)
    chunk = min(count_chunk_positions(config.vocab_size), tokens)
    head = chunk * config.vocab_size * 4.0 + head_trained * 4
    weights = 4.0 * total
    gradients = 4.0 * trained * (2 if devices > 1 and not sharded else 1)
    optimizer = trained * measure_optimizer(module)
    if sharded:
        in_blocks = sum(p.numel() for p in model.trf_blocks.parameters())
        # Gathered at once: what is outside of the blocks, and one of them.
        whole = 4.0 * (total - in_blocks + in_blocks / config.n_layers)
        weights, gradients = weights / devices + whole, gradients / devices + whole
        optimizer /= devices
    if "true" in precision and "16" in precision:
        return Memory(weights / 2, gradients / 2, optimizer / 2, activations / 2, head)
    if "16" in precision:
        # Half-precision products of the head beside the exact softmax.
        return Memory(1.5 * weights, gradients, optimizer, mixed, 2 * head)
    if "64" in precision:
        return Memory(2 * weights, 2 * gradients, 2 * optimizer, 2 * activations, 2 * head)
    return Memory(weights, gradients, optimizer, activations, head)


def count_parameters(module: SFTModule) -> tuple[int, int]:
    """All parameters and the trained ones, without giving any of them memory."""
    parameters = list(skeleton(module).parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), trained


def skeleton(module: SFTModule) -> GPTModel:
    """The module's model, adapters and all; one without memory where it is not made yet."""
    if module.model is not None:
        return module.model
    with torch.device("meta"):
        model = GPTModel(module.config)
    return add_lora(model, module.lora) if module.lora is not None else model


def count_adapter_numbers(model: GPTModel, dropout: float) -> tuple[int, float]:
    """The blocks that keep anything for the backward pass, and how much more each does with LoRA.

    Returns:
        How many blocks there are from the first adapter on; the numbers per token and dimension
        that one of them keeps beyond a trained block, fewer than none where frozen layers need not
        know their inputs again.
    """
    more, kept = 0.0, 0
    for block in model.trf_blocks:
        adapted = {n: part for n, part in block.named_modules() if isinstance(part, LoRALinear)}
        if not adapted and not kept:
            continue
        kept += 1
        more -= not adapted.keys() & {"att.W_query", "att.W_key", "att.W_value"}
        more -= "ff.layers.0" not in adapted
        more -= 4 * ("ff.layers.2" not in adapted)
        for part in adapted.values():
            more += part.lora_a.shape[0] / model.config.emb_dim
            more += 1.25 * (dropout > 0) * part.in_features / model.config.emb_dim  # and its mask
    return kept, more / max(kept, 1)


def measure_optimizer(module: SFTModule) -> float:
    """Bytes that the configured optimizer keeps per parameter, seen on a small tensor."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = module.optimizer([parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lambda: 0.0)
    state = optimizer.state[parameter].values()
    kept = [value for value in state if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in kept) / parameter.numel()


def find_device(accelerator: str) -> torch.device | None:
    """The device that a trainer of that accelerator would use, None if it is not here."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    wanted = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}
    for name in wanted.get(accelerator, (accelerator,)):
        if here.get(name):
            return torch.device(name)
    return None


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
    elif str(devices).lstrip("-").isdigit() and int(devices) > 0:
        count = int(devices)
    else:
        device = find_device(trainer.accelerator)
        count = torch.cuda.device_count() if device is not None and device.type == "cuda" else 1
    return max(count, 1) * trainer.num_nodes
