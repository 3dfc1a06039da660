"""The tokenizer that belongs to weights: their folder's, their GGUF's, or their run's.

    >>> read_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf").eos_token_id
    2

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_sft.common import files, hub
from lightning_sft.common.errors import InputError
from lightning_sft.common.gguf_header import read_gguf_header
from lightning_sft.common.repositories import GPT2
from lightning_sft.data.hf_tokenizer import HFTokenizer
from lightning_sft.data.tokenizer import Tokenizer, gpt2_tokenizer

FILE = "tokenizer.json"
# Fields of an architecture by which a Llama is known.
_LLAMA_FIELDS = {"hidden_dim", "n_kv_groups", "head_dim", "rope_base", "rope_freq", "qk_norm"}


def tokenizer_folder(source: str | Path) -> Path | None:
    """The folder with a tokenizer.json that a path belongs to: itself, around it, or its run's."""
    path = Path(source).expanduser()
    folders = [path] if path.is_dir() else []
    if path.is_file():
        folders = [path.parent]
        if path.parent.name == "checkpoints":
            folders.append(path.parent.parent)
    return next((folder for folder in folders if (folder / FILE).is_file()), None)


def read_tokenizer(source: str | Path | None) -> HFTokenizer:
    """The tokenizer of a folder, a tokenizer.json, a GGUF, or what has one beside it.

    Args:
        source: A path, or a name on the hub.

    Raises:
        InputError: There is none, or it cannot be read.
        ServiceError: The hub could not be asked.
    """
    if source is None:
        raise InputError(
            "model.tokenizer: random weights bring no tokenizer; give a folder with tokenizer.json "
            "or a GGUF"
        )
    path = hub.locate_source(str(source))
    if (folder := tokenizer_folder(path)) is not None:
        return HFTokenizer.from_folder(folder)
    if path.suffix == ".gguf" and path.is_file():
        return HFTokenizer.from_gguf(read_gguf_header(path).facts)
    raise InputError(
        f"model.tokenizer: there is no {FILE} in or beside {source}; give the folder that holds "
        "it, or a GGUF"
    )


def tokenizer_of_model(model: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a config's section `model`, as `SFTModule` finds it, without torch.

    Args:
        model: Its keys `architecture`, `weights` and `tokenizer`; what is missing is GPT-2's.

    Raises:
        InputError: The model brings its own, and there is none.
    """
    architecture, weights = model.get("architecture"), model.get("weights")
    if isinstance(architecture, Mapping):
        is_gpt2 = not {"family", *_LLAMA_FIELDS} & architecture.keys()
        is_gpt2 |= architecture.get("family") == "gpt2"
    elif architecture == "auto":
        is_gpt2 = weights is None or weights in GPT2 or not is_llama(weights)
    else:
        is_gpt2 = architecture is None or str(architecture).startswith("gpt2")
    return gpt2_tokenizer() if is_gpt2 else read_tokenizer(model.get("tokenizer") or weights)


def is_llama(weights: str) -> bool:
    """Whether a GGUF or a config.json, in a folder or on the hub, is of another kind than GPT-2."""
    path = hub.locate_source(weights)
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf_header(path).facts.get("general.architecture") != "gpt2"
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return False
    facts = files.read_json(file, files.MOST_SMALL)
    return isinstance(facts, dict) and facts.get("model_type") != "gpt2"
