"""A model's name on the Hugging Face hub → the folder with its files, fetched where needed.

The library huggingface_hub does the transfer, and its own variables apply: the cache that people
already have (HF_HOME), their token for gated repositories (HF_TOKEN, which goes to the hub alone),
a mirror (HF_ENDPOINT), no requests at all (HF_HUB_OFFLINE). What is added to it:
- a cache that holds all that is needed is used without a request;
- only the files that a model is read from are fetched, all of one commit;
- each file is compared with the digest that its blob is named after, now and in later runs, since
  the library looks at sizes alone;
- whatever goes wrong is one line that says what to do (`hub_failures.py`).

    >>> fetch("HuggingFaceTB/SmolLM2-135M-Instruct").name  # the commit
    '12fd25f77366fa6b3b4b768ec3050bf629380bac'

Source: huggingface_hub's guide to its cache. This module does not import torch, and the library
only when a name is looked up.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

from lightning_sft.common import files
from lightning_sft.common.errors import InputError, LightningSFTError, ServiceError
from lightning_sft.common.repositories import GPT2, REPOSITORIES

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
EXTRAS = ("generation_config.json", "chat_template.jinja")  # not every repository has them
# A path with one of these is meant as a file, also where it looks like `owner/name`.
_FILE_ENDINGS = (".pth", ".pt", ".ckpt", ".safetensors", ".gguf", ".json", ".yaml")
# The library waits for as long as a server asks it to; nobody waits longer than this, in seconds.
_MOST_WAIT = 120


class Repository(NamedTuple):
    """A repository at a branch, tag or commit."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"


def find_repository(source: str | None) -> Repository | None:
    """What a name such as `smollm2-135m`, `owner/name` or `owner/name@revision` stands for.

    Returns:
        None for a path, and for what cannot be a name. A path that is there goes before a name, and
        so does one whose folder is there: whoever mistypes `runs/demo` does not ask the hub for it
        (but `owner/name@main` always does).
    """
    source = source or ""
    size, _, revision = source.partition("@")
    name = REPOSITORIES.get(size, size)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or name.endswith(_FILE_ENDINGS):
        return None
    if Path(source).exists():
        return None
    if "@" in source:
        is_safe = re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision, re.ASCII) and ".." not in revision
        return Repository(name, revision) if is_safe else None
    return None if size == name and Path(name).parent.is_dir() else Repository(name)


def locate_source(source: str) -> Path:
    """Where a path is, or a name's configuration and tokenizer; its weights need not be there.

    Raises:
        InputError, ServiceError: As `fetch`.
    """
    is_name = find_repository(source) is not None
    return fetch(source, weights=False) if is_name else Path(source).expanduser()


def fetch(source: str, *, weights: bool = True) -> Path:
    """The folder with a named model's files; no request is made where the cache has them all.

    Args:
        source: A size's name, `owner/name` or `owner/name@revision`.
        weights: False for configuration and tokenizer alone.

    Raises:
        InputError: No such name, access is not granted, or the repository holds no such model.
        ServiceError: Network, hub or disk failed.
    """
    repository = find_repository(source)
    if repository is None:
        raise InputError(f"{source!r} is no name on the hub; a name is owner/name")
    try:
        return find_cached(repository, weights) or _download(repository, weights)
    except LightningSFTError:
        raise
    except Exception as error:
        from lightning_sft.common.hub_failures import explain_failure

        raise explain_failure(error, repository.name, repository.revision) from None


def find_cached(repository: Repository, weights: bool = True) -> Path | None:
    """The folder with a repository's files, if all that is needed is in the cache, undamaged."""
    from huggingface_hub import try_to_load_from_cache

    look_up = functools.partial(
        try_to_load_from_cache, repository.name, revision=repository.revision
    )
    config = look_up(CONFIG)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    wanted = [CONFIG]
    if repository.name not in GPT2.values():  # has its own tokenizer
        # One that is known not to be in the repository is not waited for.
        wanted += [file for file in TOKENIZER if isinstance(look_up(file), str | None)]
    if weights and not is_whole(folder / WEIGHTS):
        if not is_whole(folder / INDEX):
            return None
        wanted += shard_names(folder / INDEX)
    return folder if all(is_whole(folder / file) for file in wanted) else None


def model_files(folder: Path) -> list[Path]:
    """Those files in a folder that a model is read from."""
    names = [CONFIG, *TOKENIZER, *EXTRAS, WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names += [INDEX, *shard_names(folder / INDEX)]
    return [folder / name for name in names if (folder / name).is_file()]


def shard_names(index: Path) -> list[str]:
    """The files that an index of safetensors names, all of which lie beside it.

    Raises:
        InputError: It is no index, or names a file anywhere else.
    """
    try:
        names = sorted(set(files.read_json(index, files.MOST_SMALL)["weight_map"].values()))
        outside = [name for name in names if not re.fullmatch(r"\w[\w.-]*\.safetensors", name)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{index}: not an index of shards ({reason})") from None
    if outside:
        raise InputError(
            f"{index}: {outside[0]!r} is not the name of a safetensors file beside the index"
        )
    return names


def _download(repository: Repository, weights: bool) -> Path:
    """Fetch what is missing of a repository, file by file; what a killed run fetched stays."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    _ask_once(repository)
    folder = fetch_file(repository, CONFIG).parent
    # Whatever is pushed meanwhile, all files are of this commit.
    pinned = repository._replace(revision=folder.name)
    for file in (*TOKENIZER, *EXTRAS):
        with contextlib.suppress(RemoteEntryNotFoundError):
            fetch_file(pinned, file)
    if weights:
        try:
            fetch_file(pinned, WEIGHTS)
        except RemoteEntryNotFoundError:
            for shard in shard_names(fetch_file(pinned, INDEX)):
                fetch_file(pinned, shard)
    return folder


def _ask_once(repository: Repository) -> None:
    """Find out in seconds that a hub cannot be reached, which the library would try for minutes."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if not constants.ENDPOINT.startswith(("http://", "https://")):
        raise InputError(f"HF_ENDPOINT: {constants.ENDPOINT!r} is not an http or https address")
    url = hf_hub_url(repository.name, CONFIG, revision=repository.revision)
    try:
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        status, wait = error.response.status_code, error.response.headers.get("Retry-After", "")
        passes = status in (408, 429) or status >= 500  # the library asks again
        if not passes or (re.fullmatch("[0-9]+", wait) and int(wait[:9]) > _MOST_WAIT):
            raise


def fetch_file(repository: Repository, file: str, repo_type: str = "model") -> Path:
    """One file of a repository, in the library's cache and undamaged.

    Args:
        repo_type: `model` or `dataset`.

    Raises:
        ServiceError: It arrived damaged twice.
        Exception: The library's own, for `explain_failure`.
    """
    from huggingface_hub import hf_hub_download

    for _ in range(2):
        path = Path(
            hf_hub_download(
                repository.name, file, revision=repository.revision, repo_type=repo_type
            )
        )
        if is_whole(path):
            return path
    raise ServiceError(
        f"{repository.name}: {file} arrived damaged twice (it is not what its digest says); run "
        "the command again"
    )


def is_whole(path: Path) -> bool:
    """Whether a file of the cache is there and undamaged; a damaged one is taken away.

    What lies in a snapshot is a link to a blob, named after the sha256 of a large file and the git
    hash of a small one. Where links cannot be made there is no name to compare with.
    """
    try:
        found = path.stat()
        digest = path.readlink().name if path.is_symlink() else ""
    except FileNotFoundError:
        return False
    if not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", digest):
        return True
    if _digest(path, found.st_size, found.st_mtime_ns, is_git=len(digest) == 40) == digest:
        return True
    print(f"note: {path} is damaged and fetched again", file=sys.stderr)
    for file in (path.resolve(), path.parent / path.readlink(), path):  # blobs may be links, too
        file.unlink(missing_ok=True)
    return False


@functools.lru_cache(maxsize=1024)  # a run looks up its weights more than once
def _digest(path: Path, size: int, changed: int, *, is_git: bool) -> str:
    """The digest of a file that had this size, and was changed at this time in ns."""
    if not is_git:
        return files.sha256_of(path)
    content = files.read_bytes(path)
    return hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()
