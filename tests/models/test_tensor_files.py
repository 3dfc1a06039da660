"""Damaged and hostile files of tensors: each is noticed before anything is built from it."""

from __future__ import annotations

import json
import os
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.models import tensor_files
from lightning_sft.models.checkpoint_file import read_checkpoint, sidecar
from lightning_sft.models.files import read_tensors
from lightning_sft.models.gpt2 import GPTModel
from lightning_sft.models.gpt2_weights import to_hf
from lightning_sft.models.loading import load_weights
from lightning_sft.models.ready import load_for_answers
from lightning_sft.models.registry import get_config
from support.tiny_weights import TINY, make_model

SETTINGS: dict[str, Any] = {
    "architecture": {"vocab_size": 97, "context_length": 16, "emb_dim": 32, "n_heads": 4}
    | {"n_layers": 2},
    "prompt_style": "alpaca",
    "header_in_prompt": True,
    "weights": None,
    "lora": None,
    "generation": {},
    "seed": 1,
}


def make_checkpoint(**changes: Any) -> dict[str, Any]:
    state = {f"model.{name}": tensor for name, tensor in make_model().state_dict().items()}
    content = {"state_dict": state, "global_step": 3, "epoch": 1, "loops": {}}
    content |= {"pytorch-lightning_version": "2.6.6", "hyper_parameters": SETTINGS}
    return content | changes


def write(path: Path, digest: bool) -> Path:
    """Tiny weights in the format of the suffix; with the record of our own that gives a digest."""
    if path.suffix == ".safetensors":
        save_file(to_hf(make_model().state_dict()), path)
    elif path.suffix == ".ckpt":
        torch.save(make_checkpoint(), path)
    else:
        torch.save(make_model().state_dict(), path)
    if digest and path.suffix == ".ckpt":
        files.write_json(sidecar(path), {"sha256": files.sha256_of(path)})
    elif digest and path.suffix == ".safetensors":
        path.with_name(f"{path.name}.sha256").write_text(f"{files.sha256_of(path)}  {path.name}\n")
    elif digest:
        facts = {"files": {path.name: {"bytes": 1, "sha256": files.sha256_of(path)}}}
        files.write_json(path.with_name("export.json"), facts)
    return path


def check_message(error: InputError, path: Path | str = "") -> None:
    assert "\n" not in str(error)
    assert str(path) in str(error)


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def read_as_weights(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path)


def read_for_chat(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_for_answers(str(path))[0].state_dict())


def read_to_resume(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["state_dict"]


@pytest.mark.parametrize(
    ("name", "digest", "read"),
    [
        ("a.pth", False, read_as_weights),
        ("a.pth", True, read_as_weights),
        ("a.ckpt", False, read_as_weights),
        ("a.ckpt", True, read_as_weights),
        ("a.ckpt", False, read_for_chat),
        ("a.ckpt", True, read_for_chat),
        ("a.ckpt", False, read_to_resume),
        ("a.safetensors", True, read_as_weights),
    ],
)
def test_a_flipped_bit_is_noticed_at_100_of_100_places(
    tmp_path: Path, name: str, digest: bool, read: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    """Without a digest, alignment and time stamps of the archive may change: no tensor does."""
    path = write(tmp_path / name, digest)
    whole, expected = path.read_bytes(), read(path)
    draw = random.Random(0)
    noticed = harmless = 0
    for _ in range(100):
        path.write_bytes(flipped(whole, draw.randrange(len(whole)), draw.randrange(8)))
        try:
            found = read(path)
        except InputError as error:
            check_message(error, path)
            noticed += 1
        else:
            assert found.keys() == expected.keys()
            harmless += all(torch.equal(found[key], value) for key, value in expected.items())
    assert noticed + harmless == 100
    assert noticed == 100 if digest else noticed >= 90


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt"])
def test_every_number_of_an_archive_is_covered(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, digest=False)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if "/data" in m.filename]
        places = []
        for member in members:
            name_length, extra = struct.unpack("<HH", whole[member.header_offset + 26 :][:4])
            begin = member.header_offset + 30 + name_length + extra
            places += [begin, begin + member.file_size // 2, begin + member.file_size - 1]
    for place in places:
        path.write_bytes(flipped(whole, place, 6))
        with pytest.raises(InputError):
            read_tensors(path)


def test_a_safetensors_file_of_others_has_no_checksum(tmp_path: Path) -> None:
    """What is not noticed: a changed number that stays finite, where no digest is known."""
    path = write(tmp_path / "a.safetensors", digest=False)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, len(whole) - 100, 0))
    read_tensors(path)
    for content in (whole + b"x", whole[:-1], flipped(whole, 3, 2), flipped(whole, 9, 0)):
        path.write_bytes(content)  # its length and its header it knows
        with pytest.raises(InputError, match="not a whole safetensors file"):
            read_tensors(path)


def test_control_torch_itself_takes_a_flipped_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", digest=False)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, len(whole) // 2, 3))
    torch.load(path, weights_only=True)


# --- More than the file: compression, overlaps, strides, sizes ---


def zip_with(path: Path, *members: tuple[str, bytes], compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)


@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
@pytest.mark.parametrize("member", ["a/data.pkl", "a/data/0"])
def test_a_compressed_member_is_refused_before_it_grows(
    tmp_path: Path, suffix: str, member: str
) -> None:
    path = tmp_path / f"bomb{suffix}"
    zip_with(path, (member, b"\0" * 40_000_000), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    for read in (read_tensors, lambda p: read_checkpoint(p, mmap=True), read_checkpoint):
        with pytest.raises(InputError, match="compressed"):
            read(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_members_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """A thousand names for one piece of the file would take as many readings."""
    path = tmp_path / "a.pth"
    zip_with(path, ("a/data/0", b"x" * 100_000), compression=zipfile.ZIP_STORED)
    content = path.read_bytes()
    begin, end = content.index(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    entry = content[begin:end]
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1000, 1000, 1000 * len(entry), begin, 0)
    path.write_bytes(content[:begin] + entry * 1000 + last)
    assert len(zipfile.ZipFile(path).infolist()) == 1000  # control: it is an archive
    start = time.monotonic()
    with pytest.raises(InputError, match="larger than the file"):
        read_tensors(path)
    assert time.monotonic() - start < 1


def test_a_few_bytes_that_stand_for_a_model_are_refused(tmp_path: Path) -> None:
    shapes = {name: p.shape for name, p in make_model().named_parameters()}
    torch.save(
        {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "a.pth"
    )
    with pytest.raises(InputError, match=r"stand for [\d,]+ numbers and hold"):
        load_weights(make_model(), str(tmp_path / "a.pth"))


@pytest.mark.parametrize("field", ["n_layers", "emb_dim", "context_length", "vocab_size"])
def test_absurd_sizes_are_refused(field: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=f"architecture: {field} .* is over"):
        get_config({field: 10**9})
    assert time.monotonic() - start < 1


# --- Things that are no files ---


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        read_tensors(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / "model.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        read_tensors(folder)
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
    with pytest.raises(InputError, match="not a regular file"):
        read_tensors(folder)


# --- Whole, and yet not sound ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_no_numbers_names_the_tensor(tmp_path: Path, value: float) -> None:
    checkpoint = make_checkpoint()
    checkpoint["state_dict"]["model.pos_emb.weight"][0, 0] = value
    torch.save(checkpoint, tmp_path / "a.ckpt")
    for read in (read_checkpoint, read_for_chat):
        with pytest.raises(InputError, match=r"model\.pos_emb\.weight holds NaN or infinity"):
            read(tmp_path / "a.ckpt")


WRONG: list[Any] = [None, 5, -1, "x", [], {}, {"a": 1}, 1.5, torch.zeros(2), [[[]]], True]


@pytest.mark.parametrize("key", [*SETTINGS, "global_step", "epoch", "loops", "state_dict"])
def test_damaged_metadata_is_one_line(tmp_path: Path, key: str) -> None:
    """Either the value may stand there, or one line says that it may not."""
    path = tmp_path / "a.ckpt"
    for value in WRONG:
        changes: dict[str, Any] = {key: value}
        if key in SETTINGS:
            changes = {"hyper_parameters": SETTINGS | {key: value}}
        torch.save(make_checkpoint(**changes), path)
        try:
            load_for_answers(str(path))
        except InputError as error:
            check_message(error)


def test_damaged_config_beside_weights_is_one_line(tmp_path: Path) -> None:
    torch.save(make_model().state_dict(), tmp_path / "a.pth")
    good = {"model": {"architecture": SETTINGS["architecture"]}, "data": {"prompt_style": "alpaca"}}
    (tmp_path / "config.yaml").write_text(json.dumps(good))
    model, _ = load_for_answers(str(tmp_path / "a.pth"))
    assert model.config == TINY
    texts = ["", "5", "[", "model: 5", "data: {prompt_style: 5}", "model: {architecture: 5}"]
    texts += ["data: {header_in_prompt: 7}", "\x00", "model: {architecture: {n_layers: x}}"]
    texts += ["[" * 100_000, "!!python/name:os.system", "model: {architecture: {emb_dim: [1]}}"]
    for text in texts:
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(InputError) as error:
            load_for_answers(str(tmp_path / "a.pth"))
        assert "\n" not in str(error.value)


def test_a_record_that_is_damaged_itself_is_no_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", digest=True)
    for text in ("", "{", "[]", '{"sha256": 5}', "[" * 100_000):
        sidecar(path).write_text(text)
        read_checkpoint(path)
        assert not tensor_files.check_digest(path)


def test_a_downloads_record_is_looked_at_by_path_too(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", digest=True)
    with torch.device("meta"):
        model = GPTModel(TINY)
    load_weights(model, str(tmp_path))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=r"is damaged \(its sha256 differs from .*\.sha256\)"):
        load_weights(model, str(tmp_path))
