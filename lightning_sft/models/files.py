"""Where GPT-2's weights come from: a path or a name → tensors under the file's own names.

A name (`gpt2-medium`) means the cache, else the Hugging Face hub, else OpenAI's own files where
tensorflow is installed; a path is a folder (`model.safetensors`, its shards, or OpenAI's seven
files) or a file (`.safetensors`, `.pth`, `.pt`, `.ckpt`). Files are memory-mapped where possible,
and nothing in a file is run.

    python -m lightning_sft download gpt2-medium
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from lightning_sft.common import files
from lightning_sft.common.downloads import download
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.common.files import MOST_SMALL, cache_dir, read_json, sha256_of
from lightning_sft.models.gguf_file import read_gguf
from lightning_sft.models.registry import FAMILIES, MODEL_SIZES, REPOSITORIES
from lightning_sft.models.tensor_files import map_safetensors, read_safetensors, read_torch

HUB = "https://huggingface.co"  # $HF_ENDPOINT names a mirror
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
    """The file or folder that a path or a name stands for; a name is downloaded when needed."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    names = {repository: name for name, repository in REPOSITORIES.items()}
    name = names.get(source, source)
    _refuse_unfetched(source)
    if name not in REPOSITORIES:
        raise InputError(
            f"weights: {source!r} is neither a file nor a folder nor one of "
            f"{', '.join(REPOSITORIES)}"
        )
    return fetch_weights(name)


def _refuse_unfetched(source: str) -> None:
    for family in FAMILIES:
        for name, repository in family.repositories.items():
            if source in (name, repository) and name not in REPOSITORIES:
                raise InputError(
                    f"weights: {source!r} is not fetched by its name yet; download the repository "
                    f"{repository} and give its folder, or a GGUF of it"
                )


def locate(source: str | None) -> str | None:
    """A path that is there as an absolute one, so that it holds from any folder; else as it is."""
    path = Path(source or "").expanduser()
    return str(path.resolve()) if source and path.exists() else source


def fetch_weights(name: str, source: str = "hub") -> Path:
    """Weights of a name in `REPOSITORIES`, from the cache or else the network.

    Args:
        source: `hub`, which falls back to OpenAI's files where tensorflow is installed, or
            `openai`.
    """
    folder = cache_dir() / "weights" / name
    target, openai = folder / "model.safetensors", folder / "openai"
    can_read_openai = importlib.util.find_spec("tensorflow") is not None
    if source == "openai":
        return _fetch_openai(name, openai)
    if can_read_openai and not target.exists() and all((openai / f).exists() for f in OPENAI_FILES):
        return openai
    host = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    url = f"{host}/{REPOSITORIES[name]}/resolve/main/model.safetensors"
    try:
        return download(url, target, check=map_safetensors)
    except ServiceError as error:
        if not can_read_openai:
            raise
        print(f"{error}; trying OpenAI's own files")
        return _fetch_openai(name, openai)


def _fetch_openai(name: str, folder: Path) -> Path:
    *first_hosts, last_host = OPENAI
    for host in first_hosts:
        try:
            return _fetch_openai_from(host, name, folder)
        except ServiceError:
            continue
    return _fetch_openai_from(last_host, name, folder)


def _fetch_openai_from(host: str, name: str, folder: Path) -> Path:
    for part in OPENAI_FILES:
        download(f"{host}/{MODEL_SIZES[name]}/{part}", folder / part)
    return folder


def download_command(
    name: Literal["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"],
    source: Literal["hub", "openai"] = "hub",
) -> None:
    """Fetch pretrained weights into the cache, for a machine that has no network later.

    Args:
        name: Which GPT-2.
        source: The Hugging Face hub's safetensors, or OpenAI's TensorFlow checkpoint.
    """
    folder = cache_dir() / "weights" / name
    known = {path: path.stat().st_mtime_ns for path in folder.glob("**/*")}
    path = fetch_weights(name, source)
    for file in [path] if path.is_file() else [path / part for part in OPENAI_FILES]:
        is_new = known.get(file) != file.stat().st_mtime_ns
        print(f"{'downloaded' if is_new else 'already there'}: {file}")
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
    try:
        names = set(read_json(index, MOST_SMALL)["weight_map"].values())
        shards = [index.parent / Path(name).name for name in sorted(names)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: not an index of shards ({_one_line(error)})") from None
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors |= read_safetensors(shard)
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
