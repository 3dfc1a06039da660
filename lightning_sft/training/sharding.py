"""One model divided among several devices, and made whole again where it must be.

`ShardedStrategy`, `sharded` in a configuration, is fully sharded data parallelism (FSDP2): every
device holds a slice of each block's weights, gradients and optimizer state, gathers a block's
weights when it computes with them, and sees its own rows. Embeddings, final norm and head are one
unit of their own, so a head that is tied to the embedding stays tied. Checkpoints are single files
of whole tensors, which load on one device, and on another number of devices as `model.weights`.

    python -m lightning_sft fit --config gpt2-xl.yaml --config fsdp.yaml

Source: Zhao et al. 2023, "PyTorch FSDP" (arXiv 2304.11277), and torch's `fully_shard`.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lightning_sft.common.errors import InputError
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.loading import make_model


class ShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all devices of all nodes; any accelerator, also CPUs."""

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Of the mesh's two dimensions all devices go to the data, none to the tensors."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Refuse what needs the whole model on each device.

        Raises:
            InputError: `predict`, or adapters.
        """
        if trainer.state.fn == "predict":
            raise InputError(
                "trainer.strategy: predict needs the whole model on each device; give "
                "--trainer.strategy ddp or --trainer.devices 1, the checkpoint loads there"
            )
        if getattr(self.lightning_module, "lora", None) is not None:
            raise InputError(
                "trainer.strategy: LoRA is not trained on a sharded model; its frozen weights need "
                "no optimizer state, so that multi-gpu.yaml (DDP) will do"
            )
        super().setup(trainer)


StrategyRegistry.register("sharded", ShardedStrategy, description="FSDP2 over all devices")


def shard(model: GPTModel, mesh: DeviceMesh) -> GPTModel:
    """Divide a model's parameters among the devices of a mesh, in place, block by block.

    Args:
        mesh: As Lightning makes it, with a dimension `data_parallel`.
    """
    data_parallel = mesh["data_parallel"]
    for block in model.trf_blocks:
        fully_shard(block, mesh=data_parallel)
    # The outermost unit stays gathered until its backward pass is done: the loss multiplies with
    # the head's weight outside of the model's own methods.
    fully_shard(model, mesh=data_parallel)
    register_fsdp_forward_method(model, "hidden_states")
    return model


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether a trainer divides the model among its devices."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def gather_model(trainer: L.Trainer, config: GPTConfig) -> GPTModel | None:
    """A sharded run's model as one process can use it, on the CPU. All ranks must call this.

    Returns:
        On the first rank a copy; None on the others.
    """
    state: dict[str, Any] = trainer.strategy.lightning_module_state_dict()
    if not trainer.is_global_zero:
        return None
    model = make_model(config)
    model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in state.items()}, assign=True
    )
    if config.tie_embeddings:
        model.out_head.weight = model.tok_emb.weight
    return model
