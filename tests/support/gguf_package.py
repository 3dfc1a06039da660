"""A GGUF file as the package gguf reads it: slower than our own reader, and nobody's of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors, under the names they have there, as float32."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return fields, {
        name: torch.from_numpy(np.array(values, np.float32)) for name, values in found.items()
    }
