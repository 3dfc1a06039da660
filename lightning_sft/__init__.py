"""Instruction fine-tuning of a from-scratch GPT-2 in PyTorch Lightning.

    >>> from lightning_sft import InstructionDataModule, SFTModule, generate

Names are loaded when they are first used, so that commands that need no torch do not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_sft.data.batching import collate
    from lightning_sft.data.conversation import Conversation, Message
    from lightning_sft.data.datamodule import InstructionDataModule
    from lightning_sft.data.entries import Entry, read_entries, split_entries
    from lightning_sft.decoding.answering import AnsweringModel, load_model
    from lightning_sft.decoding.generation import GenerationConfig, generate
    from lightning_sft.models.cache import KVCache
    from lightning_sft.models.gpt2 import GPTConfig, GPTModel
    from lightning_sft.models.llama import LlamaModel
    from lightning_sft.models.llama_config import LlamaConfig
    from lightning_sft.models.loading import load_pretrained
    from lightning_sft.training.callbacks import LossCurve, SampleResponses
    from lightning_sft.training.checkpoint import FinalWeights
    from lightning_sft.training.loggers import RunFolder
    from lightning_sft.training.module import SFTModule
    from lightning_sft.training.objectives import DPO
    from lightning_sft.training.schedule import WarmupCosine

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "AnsweringModel",
    "Conversation",
    "Entry",
    "FinalWeights",
    "GPTConfig",
    "GPTModel",
    "GenerationConfig",
    "InstructionDataModule",
    "KVCache",
    "LlamaConfig",
    "LlamaModel",
    "LossCurve",
    "Message",
    "RunFolder",
    "SFTModule",
    "SampleResponses",
    "ShardedStrategy",
    "WarmupCosine",
    "collate",
    "generate",
    "load_model",
    "load_pretrained",
    "read_entries",
    "split_entries",
]

_OWNERS = {
    "DPO": "training.objectives",
    "AnsweringModel": "decoding.answering",
    "Conversation": "data.conversation",
    "Message": "data.conversation",
    "Entry": "data.entries",
    "FinalWeights": "training.checkpoint",
    "GenerationConfig": "decoding.generation",
    "LossCurve": "training.callbacks",
    "SampleResponses": "training.callbacks",
    "load_model": "decoding.answering",
    "GPTConfig": "models.gpt2",
    "GPTModel": "models.gpt2",
    "InstructionDataModule": "data.datamodule",
    "KVCache": "models.cache",
    "LlamaConfig": "models.llama_config",
    "LlamaModel": "models.llama",
    "RunFolder": "training.loggers",
    "SFTModule": "training.module",
    "ShardedStrategy": "training.sharding",
    "WarmupCosine": "training.schedule",
    "collate": "data.batching",
    "load_pretrained": "models.loading",
    "generate": "decoding.generation",
    "read_entries": "data.entries",
    "split_entries": "data.entries",
}


def __getattr__(name: str) -> Any:
    if name in _OWNERS:
        return getattr(importlib.import_module(f"lightning_sft.{_OWNERS[name]}"), name)
    raise AttributeError(f"module 'lightning_sft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
