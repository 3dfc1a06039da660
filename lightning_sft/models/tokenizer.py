"""The tokenizer a model is trained and asked with: its family's own, or what its weights bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_sft.common.errors import InputError
from lightning_sft.data.find_tokenizer import read_tokenizer, tokenizer_folder
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.models.checkpoint_file import read_checkpoint
from lightning_sft.models.files import find_weights
from lightning_sft.models.registry import family_of


def find_tokenizer(config: Any, source: str | None, weights: str | None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        config: The model's.
        source: A folder with tokenizer.json, a GGUF or a name, where it is not with the weights.
        weights: What the model starts from.

    Raises:
        InputError: There is none, or one for a family that has its own.
    """
    if (own := family_of(config).tokenizer) is not None:
        if source is not None:
            raise InputError("model.tokenizer: GPT-2 has its own tokenizer; leave it out")
        return own()
    if source is None and weights is not None:
        find_weights(weights)  # that these are not there comes first
    return read_tokenizer(source if source is not None else weights)


def find_answer_tokenizer(config: Any, path: str) -> Tokenizer:
    """The tokenizer of a model that is to answer: of its run, or where training had it from.

    Args:
        path: The checkpoint, or weights.

    Raises:
        InputError: There is none, or another than the model was trained with.
    """
    if (own := family_of(config).tokenizer) is not None:
        return own()
    if not path.endswith(".ckpt"):
        return read_tokenizer(path)
    checkpoint = read_checkpoint(Path(path), mmap=True)
    source = path
    if tokenizer_folder(path) is None:
        source = checkpoint["hyper_parameters"].get("tokenizer") or path
    tokenizer = read_tokenizer(source)
    check_tokenizer(tokenizer, checkpoint)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that a checkpoint was not trained with.

    Raises:
        InputError: Theirs is another vocabulary.
    """
    trained = checkpoint.get("tokenizer")
    if trained not in (None, tokenizer.name):
        raise InputError(
            f"model.tokenizer: this is {tokenizer.name}, and the checkpoint was trained with "
            f"{trained}; give that one"
        )
