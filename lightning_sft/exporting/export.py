"""`export`: a trained model as files that other programs load.

    python -m lightning_sft export --ckpt_path STEP.ckpt --format hf --out exported --verify

`pth` is the book's own file, `hf` a folder for transformers, `gguf` a file for llama.cpp. The
folder appears whole or not at all: it is written beside its final name, checked if asked to, and
renamed. An older export is replaced; any other folder that holds something is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.prompts import PromptStyle
from lightning_sft.decoding.generation import GenerationConfig
from lightning_sft.exporting.export_gguf import GGUFType, load_gguf, modelfile, write_gguf
from lightning_sft.exporting.export_hf import write_hf
from lightning_sft.exporting.exported_program import our_program
from lightning_sft.exporting.model_card import model_card
from lightning_sft.exporting.verify_export import ask, check, compare, make_prompts, round_model
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.loading import book_state_dict
from lightning_sft.models.origin import Origin, read_origin
from lightning_sft.models.ready import load_for_answers
from lightning_sft.models.registry import model_name
from lightning_sft.models.tensor_files import EXPORT_MARK
from lightning_sft.runs.run_folder import checkpoint_in

Format = Literal["pth", "hf", "gguf"]
MARK = EXPORT_MARK  # says that a folder is an export, and of which files it consists
# All that is ever written into an export, and so all that is ever replaced.
WRITTEN = (
    MARK,
    "README.md",
    "*-sft.pth",
    "config.json",
    "model.safetensors",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "*.gguf",
    "Modelfile",
)


def export(
    *,
    ckpt_path: str,
    format: Format,
    out: Path,
    verify: bool = False,
    gguf_type: GGUFType = "f32",
    weights: str | None = None,
    architecture: str | dict[str, Any] | None = None,
    prompt_style: str | dict[str, str] | None = None,
    header_in_prompt: bool | None = None,
) -> None:
    """Write a trained model for other programs.

    Args:
        ckpt_path: A checkpoint, a run folder, or weights (.pth, .safetensors, folder, or a name
            such as gpt2-medium or the hub's owner/name).
        format: pth (the book's code), hf (transformers) or gguf (llama.cpp).
        out: The folder to make; an earlier export in it is replaced.
        verify: Load the export again and compare its greedy tokens and logits with the model's.
        gguf_type: How a GGUF keeps matrices; f16 and q8_0 are smaller and round.
        weights: Where the base of a LoRA checkpoint is now, if it was moved.
        architecture: For weights that do not say it themselves.
        prompt_style: For weights away from their run folder; alpaca by default.
        header_in_prompt: Likewise.

    Raises:
        InputError: No such model, or `out` holds something else.
        ServiceError: The disk failed, or the export is not the model it was made from.
    """
    out = Path(out).expanduser().resolve()
    check_target(out)
    if format == "gguf":
        load_gguf()  # not after a minute's work
    elif gguf_type != "f32":
        raise InputError(f"export: --gguf_type {gguf_type} is for --format gguf only")
    ckpt_path = str(checkpoint_in(ckpt_path))
    origin = read_origin(ckpt_path)
    model, style = load_for_answers(
        ckpt_path, architecture, prompt_style, header_in_prompt, weights
    )
    if not isinstance(model.config, GPTConfig):
        raise InputError(
            "export: only GPT-2 is exported so far; the .pth in a run's folder is this model as "
            "the book saves it"
        )
    with new_folder(out) as folder:
        file = _write(model, style, origin, format, gguf_type, folder)
        card = model_card(model.config, style, origin, format, file)
        with files.atomic_write(folder / "README.md") as readme:
            readme.write(card)
        if verify:
            _verify(model, style, format, gguf_type, folder)
        written = {
            path.name: {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
            for path in sorted(folder.iterdir())
        }
        files.write_json(folder / MARK, {"format": format, "name": origin.name, "files": written})
    for name, facts in written.items():
        print(f"  {name:<24} {facts['bytes']:>14,} bytes")
    print(f"exported to {out}")


def check_target(out: Path) -> None:
    """Refuse to write over anything but an export.

    Raises:
        InputError: `out` is a file, or a folder that holds something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"out: {out} is not a folder")
    if out == Path.cwd():
        raise InputError(f"out: {out} is the working directory, which cannot be replaced")
    ours = _files_of(out)
    if others := sorted(path.name for path in out.iterdir() if path not in ours):
        raise InputError(
            f"out: {out} holds {others[0]}, which is not of an export; give a new or empty folder"
        )


def _files_of(folder: Path) -> list[Path]:
    """The files of an export in a folder: those that its mark names and that `export` writes.

    The mark alone would not do: it is a text file, and may name anything.
    """
    try:
        named = {MARK, *files.read_json(folder / MARK, files.MOST_SMALL)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name in named
        and any(path.match(pattern) for pattern in WRITTEN)
        and path.is_file()
        and not path.is_symlink()
    ]


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends without an error.

    Raises:
        ServiceError: It cannot be written or renamed; `out` is as it was.
    """
    mark = secrets.token_hex(4)
    temporary = out.with_name(f".{out.name}.{mark}.tmp")
    old = out.with_name(f".{out.name}.{mark}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rename(old)  # two renames: a kill between them leaves the old export as .old
        try:
            temporary.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        _remove(old)
    except OSError as error:
        raise files.disk_error(out, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(old: Path) -> None:
    """Take an older export away; what was put beside it meanwhile stays, and is named."""
    if old.exists():
        for path in _files_of(old):
            with contextlib.suppress(OSError):
                path.unlink()
        try:
            old.rmdir()
        except OSError:
            print(f"note: {old} is kept, as it holds what is not of the older export")


def _generation(origin: Origin) -> GenerationConfig:
    try:
        return GenerationConfig(**origin.generation)
    except TypeError as error:
        raise InputError(f"{origin.name}: its generation settings are none ({error})") from None


def _write(
    model: GPTModel,
    style: PromptStyle,
    origin: Origin,
    format: Format,
    gguf_type: GGUFType,
    folder: Path,
) -> str:
    """Write the format's own files; the name of the one with the weights."""
    if format == "hf":
        write_hf(model, style, _generation(origin), folder)
        return "model.safetensors"
    if format == "gguf":
        file = f"{origin.name}-{gguf_type}.gguf"
        write_gguf(model, style, origin.name, folder / file, gguf_type)
        with files.atomic_write(folder / "Modelfile") as recipe:
            recipe.write(modelfile(style, model.config, _generation(origin), file))
        return file
    file = f"{model_name(model.config)}-sft.pth"
    with files.atomic_write(folder / file, "wb") as weights:
        torch.save(book_state_dict(model), weights)
    files.write_json(folder / "config.json", dataclasses.asdict(model.config))
    return file


def _verify(
    model: GPTModel, style: PromptStyle, format: Format, gguf_type: GGUFType, folder: Path
) -> None:
    """Compare the export with the model, whose weights are rounded as the export's are."""
    prompts, length = make_prompts(style, model.config), model.config.context_length
    expected = ask(our_program(model), prompts, length)
    if gguf_type != "f32":
        round_model(model, gguf_type)
        rounded = our_program(model, f"rounded to {gguf_type}")
        effect = compare(rounded, expected, length)
        print(
            f"rounding to {gguf_type}: {effect.same} of {effect.count} greedy answers stay, "
            f"logits move by up to {effect.difference:.1e}"
        )
        expected = ask(rounded, prompts, length)
    model.to("meta")  # its memory is the export's now
    print(f"verified: {check(folder, format, expected, length)}")
