"""Where weights come from: a path or a name → tensors under the file's own names.

A name is a size (`gpt2-medium`, `smollm2-135m`) or a repository (`owner/name@revision`) of the
Hugging Face hub, whose cache `common/hub.py` looks into first; GPT-2's can also be OpenAI's own
files, where tensorflow is installed. A path is a folder (`model.safetensors`, its shards, or
OpenAI's seven files) or a file (`.safetensors`, `.pth`, `.pt`, `.ckpt`, `.gguf`). Files are
memory-mapped where possible, and nothing in a file is run.

    python -m lightning_sft download gpt2-medium
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from lightning_sft.common import files, hub
from lightning_sft.common.downloads import download
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.common.files import cache_dir, sha256_of
from lightning_sft.models.gguf_file import read_gguf
from lightning_sft.models.registry import GPT2, MODEL_SIZES, REPOSITORIES
from lightning_sft.models.tensor_files import (
    DamagedError,
    check_digest,
    read_safetensors,
    read_torch,
)

# The second is the copy that the book falls back to.
OPENAI = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
)
OPENAI_FILES = (
    "checkpoint",
    "encoder.json",
    "hparams.json",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
)


def find_weights(source: str) -> Path:
    """The file or folder that a path or a name stands for; a name is downloaded when needed.

    Raises:
        InputError: Neither is there, or access to the repository is not granted.
        ServiceError: A name is neither in the cache nor to be had.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if (kept := _find_kept(source)) is not None:
        return kept
    if hub.find_repository(source) is None:
        shown = [name for name in REPOSITORIES if not name.endswith("-instruct")]
        raise InputError(
            f"weights: {source!r} is neither a file nor a folder nor one of {', '.join(shown)} "
            "(the newer ones also with -instruct), nor owner/name on the hub"
        )
    return fetch_weights(source)


def locate(source: str | None) -> str | None:
    """A path that is there as an absolute one, so that it holds from any folder; else as it is."""
    path = Path(source or "").expanduser()
    return str(path.resolve()) if source and path.exists() else source


def fetch_weights(name: str, source: Literal["hub", "openai"] = "hub") -> Path:
    """Weights of a name, from the cache or else the network.

    Args:
        name: A size's, or `owner/name` on the hub.
        source: `hub`, which for GPT-2 falls back to OpenAI's files where tensorflow is installed,
            or `openai`.
    """
    size = _gpt2_size(name)
    if source == "openai":
        if size is None:
            raise InputError(f"openai: has no {name!r}; allowed: {', '.join(GPT2.sizes)}")
        return _fetch_openai(size)
    try:
        return hub.fetch(name)
    except (InputError, ServiceError) as error:
        if size is None or not can_read_openai():
            raise
        print(f"{error}; trying OpenAI's own files")
        return _fetch_openai(size)


def can_read_openai() -> bool:
    """Whether tensorflow is installed."""
    return importlib.util.find_spec("tensorflow") is not None


def _is_there(name: str, source: str) -> bool:
    """Whether nothing has to be fetched."""
    if source == "openai":
        folder = cache_dir() / "weights" / (_gpt2_size(name) or "") / "openai"
        return all((folder / part).exists() for part in OPENAI_FILES)
    repository = hub.find_repository(name)
    is_cached = repository is not None and hub.find_cached(repository) is not None
    return is_cached or _find_kept(name) is not None


def _gpt2_size(name: str) -> str | None:
    """`gpt2-medium` of this name, or of its repository's."""
    sizes = {repository: size for size, repository in GPT2.repositories.items()}
    size = sizes.get(name, name)
    return size if size in GPT2.sizes else None


def _find_kept(source: str) -> Path | None:
    """GPT-2's weights in our own cache: OpenAI's files, or what older versions fetched."""
    if (size := _gpt2_size(source)) is None:
        return None
    folder = cache_dir() / "weights" / size
    target, openai = folder / "model.safetensors", folder / "openai"
    if target.is_file():
        try:
            check_digest(target)
        except DamagedError:
            return None
        return target
    is_whole = all((openai / part).exists() for part in OPENAI_FILES)
    return openai if is_whole and can_read_openai() else None


def _fetch_openai(size: str) -> Path:
    folder = cache_dir() / "weights" / size / "openai"
    *first_hosts, last_host = OPENAI
    for host in first_hosts:
        try:
            return _fetch_openai_from(host, size, folder)
        except ServiceError:
            continue
    return _fetch_openai_from(last_host, size, folder)


def _fetch_openai_from(host: str, size: str, folder: Path) -> Path:
    for part in OPENAI_FILES:
        download(f"{host}/{MODEL_SIZES[size]}/{part}", folder / part)
    return folder


def download_command(name: str, source: Literal["hub", "openai"] = "hub") -> None:
    """Fetch a model into the cache, for a machine that has no network later.

    Args:
        name: A size (gpt2-medium, smollm2-135m-instruct, …), or a repository of the hub: owner/name
            or owner/name@revision.
        source: The Hugging Face hub, or for GPT-2 OpenAI's TensorFlow checkpoint.
    """
    is_there = _is_there(name, source)
    path = _find_kept(name) if source == "hub" else None
    path = path or fetch_weights(name, source)
    found = [path] if path.is_file() else hub.model_files(path)
    for file in found or [path / part for part in OPENAI_FILES]:
        print(f"{'already there' if is_there else 'downloaded'}: {file}")
        print(f"  {file.stat().st_size:,} bytes, sha256 {sha256_of(file)}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file or folder under the names they have there, memory-mapped if possible.

    Raises:
        InputError: Not a weights file or folder, or a damaged one.
    """
    if path.is_dir():
        if (path / "model.safetensors").exists():
            return read_safetensors(path / "model.safetensors")
        if (path / "model.safetensors.index.json").exists():
            return _read_shards(path / "model.safetensors.index.json")
        if (path / "model.ckpt.index").exists():
            return _read_openai(path)
        raise InputError(
            f"{path}: no weights in this folder; it must hold model.safetensors, "
            "model.safetensors.index.json or OpenAI's model.ckpt files"
        )
    readers: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
        ".safetensors": read_safetensors,
        ".pth": _read_state_dict,
        ".pt": _read_state_dict,
        ".ckpt": _read_state_dict,
        ".gguf": lambda path: read_gguf(path)[1],
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: not a weights file; allowed: a folder, {', '.join(readers)}")
    return readers[path.suffix](path)


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in hub.shard_names(index):
        tensors |= read_safetensors(index.parent / shard)
    return tensors


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """A state dict, or the one inside a Lightning or chapter 5 checkpoint."""
    content = read_torch(path)
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise InputError(f"{path}: holds no state dict of tensors")
    return {str(name): tensor for name, tensor in content.items()}


def _read_openai(folder: Path) -> dict[str, torch.Tensor]:
    """OpenAI's TensorFlow variables under Hugging Face's names; only the names differ."""
    try:
        from tensorflow import train
    except ImportError:
        raise InputError(
            f"{folder}: OpenAI's checkpoint is read with tensorflow: "
            f"{files.install_command('openai')}"
        ) from None
    endings = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    tensors = {}
    try:
        reader = train.load_checkpoint(str(folder / "model.ckpt"))
        for name in reader.get_variable_to_shape_map():
            *parents, last = re.sub(r"^h(\d)", r"h/\1", name.removeprefix("model/")).split("/")
            tensor = torch.from_numpy(reader.get_tensor(name))
            # Convolution kernels of width one: (1, in, out).
            tensor = tensor[0] if tensor.ndim == 3 else tensor
            tensors[".".join([*parents, endings.get(last, last)])] = tensor
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise InputError(f"{folder}: not a whole checkpoint ({_one_line(error)})") from None
    return tensors


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
