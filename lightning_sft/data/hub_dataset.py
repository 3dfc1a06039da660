"""A data set on the Hugging Face hub → a folder with links to its Parquet files.

    >>> fetch_dataset("hf://HuggingFaceTB/smoltalk/all:train")

An address is `hf://owner/name`, with `@revision`, `/configuration` and `:split` where there are
several of them. A data set without Parquet files of its own is read from those that the hub makes
of it. The library huggingface_hub fetches the files into the cache that people already have; a
folder of ours says which of them are meant, so that a second run asks nobody.

This module does not import torch, and the library only when an address is looked up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, LightningSFTError
from lightning_sft.common.hub import Repository, fetch_file, is_whole
from lightning_sft.data.tables import FOLDER_STATE

PREFIX = "hf://"
CONVERTED = "refs/convert/parquet"  # the branch where the hub puts what it made
# train-00000-of-00002.parquet, with or without a digest behind; or train/0000.parquet.
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-[0-9a-f]+)?")


class Address(NamedTuple):
    """What `hf://owner/name@revision/configuration:split` says."""

    repository: Repository
    configuration: str | None
    split: str | None


def is_dataset(path: str | Path) -> bool:
    """Whether a path is an address on the hub."""
    return str(path).startswith(PREFIX)


def parse_address(text: str) -> Address:
    """The parts of an address.

    Raises:
        InputError: It is none.
    """
    word = r"\w[\w.-]*"
    found = re.fullmatch(
        rf"{PREFIX}(?P<name>{word}/{word})(@(?P<revision>{word}(/{word})*?))?"
        rf"(/(?P<configuration>{word}))?(:(?P<split>{word}))?",
        text,
        re.ASCII,
    )
    if found is None:
        raise InputError(
            f"{text[:80]!r} is no address on the hub; it is hf://owner/name, with @revision, "
            "/configuration and :split where there are several"
        )
    revision = found["revision"] or "main"
    return Address(Repository(found["name"], revision), found["configuration"], found["split"])


def fetch_dataset(text: str) -> Path:
    """A folder with the Parquet files of one split; no request is made for what is there.

    Raises:
        InputError: No address, no such data set, or several splits or configurations to choose of.
        ServiceError: Network, hub or disk failed.
    """
    address = parse_address(text)
    folder = files.cache_dir() / "data" / f"hub-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with files.lock(folder):
        if _is_there(folder):
            return folder
        try:
            _fetch(address, folder)
        except LightningSFTError:
            raise
        except Exception as error:
            from lightning_sft.common.hub_failures import explain_failure

            name, revision = address.repository
            instead = "give its files as paths of this machine"
            raise explain_failure(error, f"datasets/{name}", revision, instead) from None
    return folder


def choose_files(paths: list[str], address: Address) -> list[str]:
    """Those of a repository's Parquet files that an address means, in order.

    Raises:
        InputError: There are several configurations or splits, of which one has to be named.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(path for path in paths if path.endswith(".parquet")):
        place, part = _place_of(PurePosixPath(path))
        found.setdefault(place, {}).setdefault(part, []).append(path)
    here = f"{PREFIX}{address.repository}"
    configuration = address.configuration or _only(found, "default")
    if configuration not in found:
        known = ", ".join(f"/{name}" for name in found)
        raise InputError(f"{here}: which configuration? add one of {known}")
    splits = found[configuration]
    split = address.split or _only(splits, "train")
    if split not in splits:
        known = ", ".join(f":{name}" for name in splits)
        raise InputError(f"{here}: which split? add one of {known}")
    return splits[split]


def _only(names: Iterable[str], usual: str) -> str | None:
    """The usual one of some names, or the only one."""
    names = list(names)
    return usual if usual in names else names[0] if len(names) == 1 else None


def _place_of(path: PurePosixPath) -> tuple[str, str]:
    """Configuration and split of a Parquet file, by where it is and what it is called."""
    folders = list(path.parent.parts)
    shard = _SHARD.fullmatch(path.stem)
    if shard is None and path.stem.isdecimal() and folders:
        split = folders.pop()
    else:
        split = shard["split"] if shard else path.stem
    folders = [folder for folder in folders if folder != "data"]
    return (folders[-1] if folders else "default"), split


def _fetch(address: Address, folder: Path) -> None:
    """Fetch what is meant, and link it into the folder."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    api = HfApi(endpoint=constants.ENDPOINT)
    repository = address.repository
    info = api.dataset_info(repository.name, revision=repository.revision, timeout=30)
    paths = [file.rfilename for file in info.siblings or []]
    if not any(path.endswith(".parquet") for path in paths) and repository.revision == "main":
        try:
            info = api.dataset_info(repository.name, revision=CONVERTED, timeout=30)
        except RevisionNotFoundError:
            raise InputError(f"{PREFIX}{repository}: has no Parquet files") from None
        paths = [file.rfilename for file in info.siblings or []]
    if not any(path.endswith(".parquet") for path in paths):
        raise InputError(f"{PREFIX}{repository}: has no Parquet files")
    # Whatever is pushed meanwhile, all files are of this commit.
    pinned = repository._replace(revision=info.sha or repository.revision)
    found = [fetch_file(pinned, path, "dataset") for path in choose_files(paths, address)]
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:05}.parquet" for number in range(len(found))]
    for name, path in zip(names, found, strict=True):
        (folder / name).unlink(missing_ok=True)
        # To the library's own link, whose target is called after the digest of what it holds.
        (folder / name).symlink_to(path)
    state = {"_data_files": [{"filename": name} for name in names], "address": str(address)}
    files.write_json(folder / FOLDER_STATE, state)


def _is_there(folder: Path) -> bool:
    """Whether all files of a folder are there, undamaged."""
    try:
        state = files.read_json(folder / FOLDER_STATE, files.MOST_SMALL)
        links = [folder / file["filename"] for file in state["_data_files"]]
        return all(is_whole(link.readlink()) for link in links)
    except (InputError, OSError, KeyError, TypeError):
        return False
