"""What a block keeps from its forward pass for its backward pass, tensor by tensor.

Autograd keeps what the derivative of each operation asks for: a product of two activations keeps
both, a linear layer its input (for the gradient of its weight), a sum nothing. Here that is written
down for each family, in numbers a token, so that `plan` can say what a step takes before it is run.

    >>> sum(tensor.numbers for tensor in gpt2_activations(GPTConfig(), packed=False))
    12288

Source: read off the models' forward passes; `torch.autograd.graph.saved_tensors_hooks` finds the
same, which tests hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_sft.models.gpt2 import GPTConfig
from lightning_sft.models.llama_config import LlamaConfig


@dataclass(frozen=True)
class KeptTensor:
    """One tensor that a block keeps.

    Args:
        numbers: How many of each token.
        kind: Its type under autocast. `stream` stays as wide as the weights, as the residual
            stream and the norms do; `product` has the narrow type of the matrix products; a
            `copy` is what autocast makes of a wide tensor, for each layer that multiplies it.
        needed_by: Modules of the block without whose gradient it is not kept: layers whose input
            it is, or a norm whose gain it was multiplied with. None: it is kept in any case.
        in_rows: Kept for each place of the gathered rows, not for each computed token.
    """

    numbers: int
    kind: Literal["stream", "product", "copy"]
    needed_by: tuple[str, ...] = ()
    in_rows: bool = False


def gpt2_activations(config: GPTConfig, packed: bool) -> list[KeptTensor]:
    """Of a block of GPT-2; D is the width.

    Args:
        packed: Whether attention gathers rows and takes one copy back.
    """
    width = config.emb_dim
    tensors = [
        KeptTensor(width, "stream"),  # what norm1 normalises
        KeptTensor(width, "copy", ("att.W_query", "att.W_key", "att.W_value")),
        KeptTensor(4 * width, "product", in_rows=True),  # queries, keys, values, their result
        KeptTensor(width, "stream"),  # what norm2 normalises
        KeptTensor(width, "copy", ("ff.layers.0",)),
        KeptTensor(4 * width, "product"),  # before GELU
        KeptTensor(4 * width, "product", ("ff.layers.2",)),
    ]
    if packed:  # else the projection's input is attention's result itself
        tensors.append(KeptTensor(width, "product", ("att.out_proj",)))
    return tensors


def llama_activations(config: LlamaConfig, packed: bool) -> list[KeptTensor]:
    """Of a block of the Llama family.

    Args:
        packed: Whether attention gathers rows and takes one copy back.
    """
    width, hidden = config.emb_dim, config.hidden_dim
    queries = config.n_heads * config.head_dim  # H·E, which need not be the width
    keys = config.n_kv_groups * config.head_dim  # G·E: groups are kept once, not for each head
    tensors = [
        KeptTensor(width, "stream"),  # what norm1 normalises
        KeptTensor(width, "stream", ("norm1",)),  # normalised, before the gain
        KeptTensor(width, "copy", ("att.W_query", "att.W_key", "att.W_value")),
        # Rotated queries and keys, values, and attention's result. The rotation itself keeps
        # nothing of a token: its other factors are the angles, which need no gradient.
        KeptTensor(queries + 2 * keys + queries, "product", in_rows=True),
        KeptTensor(width, "stream"),  # what norm2 normalises
        KeptTensor(width, "stream", ("norm2",)),
        KeptTensor(width, "copy", ("ff.fc1", "ff.fc2")),
        KeptTensor(3 * hidden, "product"),  # fc1's output, SiLU of it, fc2's output
        KeptTensor(hidden, "product", ("ff.fc3",)),  # the product of the last two
    ]
    if config.qk_norm:
        for name, numbers in (("att.q_norm", queries), ("att.k_norm", keys)):
            tensors.append(KeptTensor(numbers, "stream"))
            tensors.append(KeptTensor(numbers, "stream", (name,)))
    if packed:  # else the projection's input is attention's result itself
        tensors.append(KeptTensor(queries, "product", ("att.out_proj",)))
    return tensors
