"""GPT-2's weights: where they come from, and how they get into a `GPTModel`.

`load_weights` takes a name (`gpt2-medium`: the cache, else the Hugging Face hub, else OpenAI's own
files where tensorflow is installed), a folder (`model.safetensors`, its shards, or OpenAI's seven
files) or a file (`.safetensors`, `.pth`, `.pt`, `.ckpt`). All names and shapes are checked before
the model is touched. Files are memory-mapped and read tensor by tensor into parameters that own
their memory, so loading takes about one copy of the model; nothing in a file is run.

    python -m lightning_sft download gpt2-medium

Source: `load_weights_into_gpt` of chapter 5 of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import safetensors
import torch

from lightning_sft.errors import InputError, ServiceError
from lightning_sft.files import cache_dir, download, sha256_of
from lightning_sft.model import ARCHITECTURES, MODEL_SIZES, GPTConfig, GPTModel

HUB = "https://huggingface.co"  # $HF_ENDPOINT names a mirror
REPOSITORIES = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
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

# Hugging Face's names and ours, outside the blocks and in each of them.
_TOP_NAMES = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
_BLOCK_NAMES = {
    "ln_1.weight": ("norm1.scale",),
    "ln_1.bias": ("norm1.shift",),
    "attn.c_attn.weight": ("att.W_query.weight", "att.W_key.weight", "att.W_value.weight"),
    "attn.c_attn.bias": ("att.W_query.bias", "att.W_key.bias", "att.W_value.bias"),
    "attn.c_proj.weight": ("att.out_proj.weight",),
    "attn.c_proj.bias": ("att.out_proj.bias",),
    "ln_2.weight": ("norm2.scale",),
    "ln_2.bias": ("norm2.shift",),
    "mlp.c_fc.weight": ("ff.layers.0.weight",),
    "mlp.c_fc.bias": ("ff.layers.0.bias",),
    "mlp.c_proj.weight": ("ff.layers.2.weight",),
    "mlp.c_proj.bias": ("ff.layers.2.bias",),
}
# Causal masks that files carry along; they are no weights.
_HF_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_BOOK_MASK = re.compile(r"trf_blocks\.\d+\.att\.mask")

Tensors = Mapping[str, torch.Tensor]


def load_weights(model: GPTModel, source: str | None) -> Path | None:
    """Fill a model with pretrained or fine-tuned weights.

    Args:
        model: On the meta device (its parameters become real ones on the CPU) or any other.
        source: A name of `REPOSITORIES`, a folder or a file; None leaves the model as it is.

    Returns:
        Where the weights were read from.

    Raises:
        InputError: No such source, a damaged file, or tensors that do not fit this model.
        ServiceError: A named model is neither in the cache nor to be had.
    """
    if source is None:
        return None
    path = find_weights(source)
    state = _fit(read_tensors(path), model, path)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.materialize()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head is not named again
            parameter.copy_(state[name])
            if not all(torch.isfinite(bound) for bound in parameter.aminmax()):
                raise InputError(f"{path}: {name} holds NaN or infinity")
    return path


def from_hf(tensors: Tensors, config: GPTConfig) -> dict[str, torch.Tensor]:
    """Rename Hugging Face's GPT-2 tensors into a state dict of `GPTModel`; nothing is copied.

    Linear weights are transposed (`Conv1D` keeps them as (in, out)) and the fused query, key and
    value taken apart. What has no place in a model of `config.n_layers` keeps its name.
    """
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    rest = {name: stripped[name] for name in stripped if not _HF_MASK.fullmatch(name)}
    state: dict[str, torch.Tensor] = {}
    for hf_name, names in _name_pairs(config.n_layers):
        if hf_name not in rest or not rest[hf_name].ndim:
            continue
        tensor = rest.pop(hf_name)
        if hf_name.endswith("c_attn.bias") and not config.qkv_bias and not tensor.any():
            continue  # what `to_hf` writes for a model without these biases
        if _is_conv1d(hf_name, tensor):
            tensor = tensor.T
        state.update(zip(names, tensor.chunk(len(names)), strict=False))
    return state | rest


def to_hf(state_dict: Tensors) -> dict[str, torch.Tensor]:
    """Rename a state dict of `GPTModel` into Hugging Face's GPT-2 tensors, ready to be saved.

    `lm_head.weight` is left out where the head is the embedding itself, as with tied weights;
    where it is there, config.json must say `tie_word_embeddings: false`.
    """
    tensors = {}
    for hf_name, names in _name_pairs(_count_layers(state_dict)):
        if hf_name == "lm_head.weight":
            head, embedding = state_dict[names[0]], state_dict["tok_emb.weight"]
            if head.data_ptr() != embedding.data_ptr():
                tensors[hf_name] = head
            continue
        if hf_name.endswith("c_attn.bias") and names[0] not in state_dict:
            # GPT-2 always has these; in a model built without them they are zero.
            tensor = torch.zeros(3 * state_dict["tok_emb.weight"].shape[1])
        elif len(names) == 1:
            tensor = state_dict[names[0]]
        else:
            tensor = torch.cat([state_dict[name] for name in names])
        is_conv1d = _is_conv1d(hf_name, tensor)
        tensors[f"transformer.{hf_name}"] = tensor.T.contiguous() if is_conv1d else tensor
    return tensors


def book_state_dict(model: GPTModel) -> dict[str, torch.Tensor]:
    """The model's state dict with the causal masks that the book's `GPTModel` expects.

    All layers share one mask, which `torch.save` writes once.
    """
    length = model.config.context_length
    mask = torch.triu(torch.ones(length, length), diagonal=1)
    masks = {f"trf_blocks.{n}.att.mask": mask for n in range(model.config.n_layers)}
    return {**model.state_dict(), **masks}


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


def find_weights(source: str) -> Path:
    """The file or folder that a path or a name stands for; a name is downloaded when needed."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    names = {repository: name for name, repository in REPOSITORIES.items()}
    name = names.get(source, source)
    if name not in REPOSITORIES:
        raise InputError(
            f"weights: {source!r} is neither a file nor a folder nor one of "
            f"{', '.join(REPOSITORIES)}"
        )
    return fetch_weights(name)


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
        return download(url, target, check=_read_safetensors)
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


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file or folder under the names they have there, memory-mapped if possible.

    Raises:
        InputError: Not a weights file or folder, or a damaged one.
    """
    if path.is_dir():
        if (path / "model.safetensors").exists():
            return _read_safetensors(path / "model.safetensors")
        if (path / "model.safetensors.index.json").exists():
            return _read_shards(path / "model.safetensors.index.json")
        if (path / "model.ckpt.index").exists():
            return _read_openai(path)
        raise InputError(
            f"{path}: no weights in this folder; it must hold model.safetensors, "
            "model.safetensors.index.json or OpenAI's model.ckpt files"
        )
    readers: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
        ".safetensors": _read_safetensors,
        ".pth": _read_torch,
        ".pt": _read_torch,
        ".ckpt": _read_torch,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: not a weights file; allowed: a folder, {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return readers[path.suffix](path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({_one_line(error)})") from None


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: not an index of shards ({_one_line(error)})") from None
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors |= _read_safetensors(index.parent / Path(shard).name)
    return tensors


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    """A state dict, or the one inside a Lightning or chapter 5 checkpoint."""
    is_zip = zipfile.is_zipfile(path)  # the only form that can be memory-mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles: what matters is said below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception:  # a damaged pickle can fail in any way
        raise InputError(
            f"{path}: refused; it is damaged, or holds more than tensors (nothing in a file is run)"
        ) from None
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise InputError(f"{path}: holds no state dict of tensors")
    return {str(name): tensor for name, tensor in content.items()}


def _read_openai(folder: Path) -> dict[str, torch.Tensor]:
    """OpenAI's TensorFlow variables under Hugging Face's names, in which they differ in no more."""
    try:
        from tensorflow import train
    except ImportError:
        raise InputError(
            f"{folder}: OpenAI's checkpoint is read with tensorflow: "
            'pip install "lightning-sft[openai]"'
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


def _fit(tensors: Tensors, model: GPTModel, path: Path) -> dict[str, torch.Tensor]:
    """Tensors by the model's names, after checking that each is there and of the right shape."""
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    state = {name: stripped[name] for name in stripped if not _BOOK_MASK.fullmatch(name)}
    if "tok_emb.weight" not in state:
        state = from_hf(state, model.config)
    head = state.pop("out_head.weight", state.get("tok_emb.weight"))  # without one: the embedding
    if head is not None and not model.config.tie_embeddings:
        state["out_head.weight"] = head
    _check_names_and_shapes(state, model, path)
    embedding = state["tok_emb.weight"]
    if model.config.tie_embeddings and head is not None and head is not embedding:
        same_kind = _describe(head) == _describe(embedding)
        if not (same_kind and torch.equal(head.to(embedding.dtype), embedding)):
            raise InputError(
                f"{path}: its output head differs from its embedding and would be lost in a model "
                "that ties them; set tie_embeddings: false"
            )
    return state


def _check_names_and_shapes(state: Tensors, model: GPTModel, path: Path) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [f"{name} is missing" for name in wanted if name not in state]
    extra = [f"{name} has no place" for name in state if name not in wanted]
    other = [
        f"{name} is {_describe(state[name])} instead of {shape}"
        for name, shape in wanted.items()
        if name in state and _describe(state[name]) != str(shape)
    ]
    if faults := missing + extra + other:
        raise InputError(
            f"{path}: {len(faults)} tensors do not fit the model ({len(missing)} missing, "
            f"{len(extra)} without a place, {len(other)} of another shape)"
            f"{_guess_size(state, model.config)}: {', '.join(faults[:5])}"
        )


def _describe(tensor: torch.Tensor) -> str:
    is_plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return str(tuple(tensor.shape)) if is_plain else f"{tensor.type()} {tuple(tensor.shape)}"


def _guess_size(state: Tensors, config: GPTConfig) -> str:
    width = state["tok_emb.weight"].shape[-1:] if "tok_emb.weight" in state else ()
    for name, known in ARCHITECTURES.items():
        is_it = (known.emb_dim,) == tuple(width) and known.n_layers == _count_layers(state)
        if is_it and (known.emb_dim, known.n_layers) != (config.emb_dim, config.n_layers):
            return f", it looks like {name} ({MODEL_SIZES[name]})"
    return ""


def _count_layers(names: Iterable[str]) -> int:
    found = (re.match(r"(?:h|trf_blocks)\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _name_pairs(n_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of Hugging Face's names with ours: one, or three for the fused projection."""
    for hf_name, name in _TOP_NAMES.items():
        yield hf_name, (name,)
    for layer in range(n_layers):
        for hf_name, names in _BLOCK_NAMES.items():
            yield f"h.{layer}.{hf_name}", tuple(f"trf_blocks.{layer}.{name}" for name in names)


def _is_conv1d(hf_name: str, tensor: torch.Tensor) -> bool:
    return hf_name.startswith("h.") and tensor.ndim == 2


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
