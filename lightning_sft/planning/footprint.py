"""Memory of a training step, estimated; and what the devices of this machine offer.

Memory, in bytes, for P parameters of which T are trained, and a longest batch of N computed tokens
in B rows of width W:

    weights      4 P
    gradients    4 T, and as much again for DDP's buckets
    optimizer    what it keeps per parameter (AdamW: 8), measured on a small tensor, times T
    activations  what a block keeps per token and dimension for its backward pass, as the model's
                 family says (GPT-2: 16 numbers). A packed batch keeps those of attention for all
                 B·W places and one more per computed token; dropout adds masks, and attention
                 weights where it rules out the fused kernel
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

from lightning_sft.common.errors import InputError
from lightning_sft.data.counting import BatchShape
from lightning_sft.models.decoder import KeptNumbers
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.loading import make_model
from lightning_sft.models.lora import LoRALinear, add_lora
from lightning_sft.models.ready import find_device
from lightning_sft.models.registry import family_of
from lightning_sft.training.loss import count_chunk_positions
from lightning_sft.training.module import SFTModule

FLOAT32, MASK = 4.0, 1.0  # bytes of a number, and of dropout's mask for one
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
    blocks, per_block, dropout = _measure_block(module, model, batch)
    stream = 3.0 * batch.tokens * module.config.emb_dim * FLOAT32  # before and behind the blocks
    if module.activation_checkpointing:  # each block's input, and one block in full
        stream += blocks * batch.tokens * module.config.emb_dim * FLOAT32
        blocks = min(blocks, 1)
    activations = blocks * (per_block + dropout) + stream
    mixed = blocks * (MIXED_SHARE * per_block + dropout) + stream
    head_trained = sum(p.numel() for p in model.out_head.parameters() if p.requires_grad)
    chunk = min(count_chunk_positions(module.config.vocab_size), batch.tokens)
    head = FLOAT32 * (chunk * module.config.vocab_size + head_trained)
    weights, gradients = FLOAT32 * total, FLOAT32 * trained
    optimizer = trained * measure_optimizer(module)
    if sharded:
        whole = FLOAT32 * _count_gathered(model, total)
        weights, gradients = weights / devices + whole, gradients / devices + whole
        optimizer /= devices
    elif devices > 1:
        gradients *= 2  # DDP's buckets
    if "true" in precision and "16" in precision:
        return Memory(weights / 2, gradients / 2, optimizer / 2, activations / 2, head)
    if "16" in precision:
        # Half-precision copies of the weights, and products of the head beside the exact softmax.
        return Memory(1.5 * weights, gradients, optimizer, mixed, 2 * head)
    if "64" in precision:
        return Memory(2 * weights, 2 * gradients, 2 * optimizer, 2 * activations, 2 * head)
    return Memory(weights, gradients, optimizer, activations, head)


def _measure_block(
    module: SFTModule, model: GPTModel, batch: BatchShape
) -> tuple[int, float, float]:
    """How many blocks keep anything, the bytes that one keeps, and those of its dropout."""
    config, kept = module.config, _kept(module.config)
    places = batch.rows * batch.width  # in attention: B rows of width W
    by_token = kept.residual + kept.normed + kept.feed_forward
    numbers: float = by_token * batch.tokens + kept.attention * places
    if batch.tokens != places:  # packed: attention's result is taken back to the computed tokens
        numbers += batch.tokens
    blocks = config.n_layers
    if module.lora is not None:
        blocks, more = count_adapter_numbers(model, module.lora.dropout)
        numbers += more * batch.tokens
    dropout = 0.0
    if config.drop_rate > 0:
        # A mask for each of the two shortcuts. Dropout rules out the fused kernel, so there are
        # attention weights, W for each place and head: as softmax made them, the mask (numbers
        # too), and their product.
        of_shortcuts = 2 * MASK * batch.tokens * config.emb_dim
        of_weights = 3 * FLOAT32 * places * config.n_heads * batch.width
        dropout = of_shortcuts + of_weights
    return blocks, numbers * config.emb_dim * FLOAT32, dropout


def _kept(config: Any) -> KeptNumbers:
    family = family_of(config)
    if family.kept is None:
        raise InputError(f"plan: memory is estimated for GPT-2 only so far, not for {family.name}")
    return family.kept


def _count_gathered(model: GPTModel, total: int) -> float:
    """Parameters that a sharded model holds whole at one time: one block, and what is in none."""
    in_blocks = sum(p.numel() for p in model.trf_blocks.parameters())
    return total - in_blocks + in_blocks / len(model.trf_blocks)


def count_parameters(module: SFTModule) -> tuple[int, int]:
    """All parameters and the trained ones, without giving any of them memory."""
    parameters = list(skeleton(module).parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), trained


def skeleton(module: SFTModule) -> GPTModel:
    """The module's model, adapters and all; one without memory where it is not made yet."""
    if module.model is not None:
        return module.model
    model = make_model(module.config)
    return add_lora(model, module.lora) if module.lora is not None else model


def count_adapter_numbers(model: GPTModel, dropout: float) -> tuple[int, float]:
    """The blocks that keep anything for the backward pass, and how much more each does with LoRA.

    Returns:
        How many blocks there are from the first adapter on; the numbers per token and dimension
        that one of them keeps beyond a trained block, fewer than none where frozen layers need not
        know their inputs again.
    """
    inputs = _kept(model.config).inputs
    more, kept = 0.0, 0
    for block in model.trf_blocks:
        adapted = {n: part for n, part in block.named_modules() if isinstance(part, LoRALinear)}
        if not adapted and not kept:
            continue
        kept += 1
        more -= sum(width for names, width in inputs if not adapted.keys() & set(names))
        for part in adapted.values():
            more += part.lora_a.shape[0] / model.config.emb_dim  # A's output
            if dropout > 0:  # the dropped input, and its mask of one byte a number
                more += (1 + MASK / FLOAT32) * part.in_features / model.config.emb_dim
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
