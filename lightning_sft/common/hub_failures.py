"""What to do when the hub does not give a model: each of the library's failures as one line.

Texts of servers are not repeated, nor URLs, which may hold signatures; the token is in neither.
"""

from __future__ import annotations

import errno
from pathlib import PurePosixPath

from lightning_sft.common.errors import InputError, LightningSFTError, ServiceError, hide_keys

# Of the disk and its rights, among the many OSErrors that a network makes too.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
_DISK |= {errno.ENOTDIR, errno.EIO}
# Packages whose exceptions speak of the transfer; which of them is beneath depends on the version.
_PACKAGES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet")


def explain_failure(
    error: Exception, name: str, revision: str, instead: str | None = None
) -> LightningSFTError:
    """The error that a user can act on.

    Args:
        error: Of the library.
        name, revision: Of the repository.
        instead: What else to do where it cannot be reached; for a model it is known.

    Raises:
        Exception: `error` itself, if it is of no kind that a transfer fails in.
    """
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    host, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    shown = name if revision == "main" else f"{name}@{revision}"
    later = instead or (
        f"where there is a network, `python -m lightning_sft download {shown}` puts it there; or "
        "give the folder that holds it"
    )
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return InputError(_explain_gate(f"{host}/{name}", name, get_token() is not None))
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name} has no revision {revision!r}; {host}/{name} lists those it has")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        file = PurePosixPath(error.response.url.path).name
        return InputError(
            f"{shown} has no {file}; a model is read from config.json and model.safetensors (whole "
            "or in shards), a GGUF from a path of this machine"
        )
    if isinstance(error, UnicodeError):  # nothing else of a request is not checked before
        return InputError("HF_TOKEN: holds characters that no token has")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{name!r} is no name on the hub; a name is owner/name")
    if isinstance(error, errors.DisabledRepoError):
        return InputError(f"{name}: the hub has disabled it")
    if status in (401, 404):
        return InputError(
            f"{name!r} is neither a file or folder here nor a repository at {host} that may be "
            f"read; {_explain_token(get_token() is not None)}"
        )
    if status == 403:
        return InputError(
            f"{name}: {host} refuses access (HTTP 403); give HF_TOKEN the right to read it (gated "
            "repositories are a right of its own)"
        )
    if status is not None:
        return ServiceError(f"{name}: {host} answered HTTP {status}; run the command again later")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ServiceError(
            f"{shown} is not whole in the cache {cache}, and HF_HUB_OFFLINE allows no request; "
            + later
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        where = error.filename or cache
        return ServiceError(f"{where}: cannot be written ({error.strerror}); HF_HOME moves it")
    package = type(error).__module__.split(".")[0]
    if package in _PACKAGES or isinstance(error, OSError):
        text = hide_keys(" ".join(str(error).split()))[:150]
        reason = f"{type(error).__name__}: {text}".rstrip(": ")
        return ServiceError(
            f"{shown} is not whole in the cache and could not be fetched from {host} ({reason}); "
            + later
        )
    raise error


def _explain_gate(page: str, name: str, has_token: bool) -> str:
    if has_token:
        return (
            f"{name} is gated, and the token in use has no access: accept its licence at {page} "
            "with the account of HF_TOKEN"
        )
    return (
        f"{name} is gated: accept its licence at {page} and set HF_TOKEN to a token of that account"
    )


def _explain_token(has_token: bool) -> str:
    if has_token:
        return "the token in use is for other ones, or no longer valid"
    return "a private one needs HF_TOKEN"
