"""What weights say of their own architecture: config.json in their folder, or a GGUF's facts.

>>> found_config("SmolLM2-135M-Instruct.Q4_1.gguf").n_layers
30
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_sft.common import files, hub
from lightning_sft.common.errors import InputError
from lightning_sft.models.gguf_file import read_gguf_config
from lightning_sft.models.registry import FAMILIES, GPT2, get_config

AUTO = "auto"  # the architecture that asks for it


def found_config(source: str | None) -> Any | None:
    """The configuration in a folder's config.json or a GGUF; None where neither says it.

    Of a name on the hub, config.json and tokenizer are fetched, and nothing of GPT-2's own sizes.

    Raises:
        InputError: It is damaged, or an architecture that is not built here.
        ServiceError: The hub could not be asked.
    """
    if source is not None and source in GPT2.sizes and hub.find_repository(source) is not None:
        return GPT2.sizes[source]
    path = hub.locate_source(source or "")
    if source and path.suffix == ".gguf" and path.is_file():
        return read_gguf_config(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not source or not path.exists() or not file.is_file():
        return None
    try:
        facts = files.read_json(file, files.MOST_SMALL)
        kind = facts.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: no JSON mapping ({error})") from None
    known = [family for family in FAMILIES if kind in family.model_types]
    if not known:
        allowed = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise InputError(f"{file}: model_type {kind!r} is not one of {allowed}")
    return known[0].from_hf_config(facts)


def settle_config(architecture: str | Mapping[str, object], weights: str | None) -> Any:
    """`get_config`, with `auto` standing for what the weights say of themselves.

    Raises:
        InputError: They do not say it; or they say that they are of another model, whose numbers
            would load and compute something else.
    """
    if architecture != AUTO:
        return get_config(architecture)
    if (found := found_config(weights)) is None:
        raise InputError(
            f"model.architecture: auto: {weights} has no config.json and is no GGUF; give a name "
            "or the fields"
        )
    return found


def check_config(config: Any, weights: str | None) -> None:
    """Refuse weights that say they are of another architecture, even one of the same shapes.

    Only the newer families are asked: GPT-2's shapes leave nothing open.

    Raises:
        InputError: Names the first field that differs.
    """
    if not hasattr(config, "rope_base"):
        return
    found = found_config(weights)
    if found is None or type(found) is not type(config):
        return
    for field in dataclasses.fields(found):
        wanted, theirs = getattr(config, field.name), getattr(found, field.name)
        if wanted != theirs and field.name != "context_length":
            raise InputError(
                f"model.weights: {weights} has {field.name} {theirs}, the architecture has "
                f"{wanted}; give architecture: auto to take what the weights say"
            )
