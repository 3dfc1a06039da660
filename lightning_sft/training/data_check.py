"""Whether a module and the data that it meets in a trainer fit each other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lightning_sft.common.errors import InputError
from lightning_sft.data.datamodule import InstructionDataModule

if TYPE_CHECKING:
    from lightning_sft.training.module import SFTModule


def check_data(module: SFTModule, data: object, stage: str) -> None:
    """Refuse data that would train or ask the model in a way that it does not expect.

    Args:
        data: The trainer's data module, if it has one. Only ours says how it lays entries out.

    Raises:
        InputError: Prompt styles or tokenizers differ, or rows would share what dropout makes of
            a prefix.
    """
    if not isinstance(data, InstructionDataModule):
        return
    theirs, ours = dataclasses.asdict(data.style), dataclasses.asdict(module.style)
    differing = [
        f"{name} is {theirs[name]!r} in the data and {ours[name]!r} in the module"
        for name in ours
        if name != "name" and theirs[name] != ours[name]  # a name says nothing about the text
    ]
    if differing:
        raise InputError(
            f"prompt_style: {'; '.join(differing)}; give both the same prompt_style and "
            "header_in_prompt"
        )
    if data.tokenizer.name != module.tokenizer.name:
        raise InputError(
            f"tokenizer: the data is encoded with {data.tokenizer.name}, the model's is "
            f"{module.tokenizer.name}; set `tokenizer` of the data to the model's"
        )
    dropout = getattr(module.config, "drop_rate", 0.0) or (module.lora and module.lora.dropout)
    if stage == "fit" and dropout and data.config.share_prefix:
        raise InputError(
            f"data.share_prefix: rows that share a prefix would share its dropout of {dropout}; "
            "set data.share_prefix to false (data.padding_free may stay) or the dropout to 0"
        )
