"""Names on the hub: fetched once, whole, from a hub that fails in every way, or one line."""

from __future__ import annotations

import errno
import json
import resource
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import constants

from lightning_sft.common import hub as names
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.common.hub import Repository, fetch, find_repository
from lightning_sft.common.hub_failures import explain_failure
from support.hub import Reply
from support.model_hub import COMMIT, OTHER_COMMIT, TOKEN, ModelHub, damage

NAME = "owner/tiny"
WEIGHTS = bytes(range(256)) * 40  # nobody here looks into it
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "<|im_end|>"}',
    "model.safetensors": WEIGHTS,
    "README.md": b"# Tiny",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.safetensors": b"another model",
}
SHARDS = {"model-1.safetensors": b"first" * 900, "model-2.safetensors": b"second" * 900}


def index_of(*shards: str) -> bytes:
    return json.dumps(
        {"weight_map": {f"tensor.{i}": name for i, name in enumerate(shards)}}
    ).encode()


SHARDED = {name: body for name, body in FILES.items() if name != "model.safetensors"}
SHARDED |= SHARDS | {"model.safetensors.index.json": index_of(*SHARDS, "model-1.safetensors")}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with ModelHub(monkeypatch, tmp_path / "cache") as server:
        server.add(NAME, FILES)
        yield server


@pytest.fixture
def no_waiting(monkeypatch):
    """The library waits for seconds between its attempts."""
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time.sleep", lambda seconds: None)


def refusal(source: str, kind: type[Exception]) -> str:
    with pytest.raises(kind) as error:
        fetch(source)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == (2 if kind is InputError else 3)
    return str(error.value)


def blobs(hub: ModelHub) -> list[bytes]:
    folder = hub.cache / "models--owner--tiny" / "blobs"
    return [path.read_bytes() for path in folder.iterdir()] if folder.is_dir() else []


# --- What is a name ---


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("smollm2-135m-instruct", Repository("HuggingFaceTB/SmolLM2-135M-Instruct")),
        ("gpt2-small", Repository("openai-community/gpt2")),
        ("Qwen/Qwen2.5-0.5B", Repository("Qwen/Qwen2.5-0.5B")),
        ("owner/name@v1.0", Repository("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", Repository("owner/name", "refs/pr/3")),
        ("here/name@main", Repository("here/name")),
        ("here/name", None),  # its folder is there: mistyped
        ("owner/name@../../outside", None),
        ("owner/name@/etc", None),
        ("owner/name@", None),
        ("owner/model.gguf", None),
        ("owner/a/b", None),
        ("./name", None),
        ("../name", None),
        ("~/name", None),
        ("/owner/name", None),
        ("https://huggingface.co/owner/name", None),
        ("name", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_a_name(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert find_repository(source) == expected


# --- Whole, and no more than needed ---


def test_what_is_needed_is_fetched_once(hub):
    folder = fetch(NAME)
    assert folder.name == COMMIT
    wanted = {name for name in FILES if name.endswith(("json", "safetensors")) and "/" not in name}
    assert {path.name for path in folder.iterdir()} == wanted
    for name in wanted:
        assert (folder / name).read_bytes() == FILES[name]
    assert hub.asked_for() == wanted | {"chat_template.jinja"}
    assert set(names.model_files(folder)) == set(folder.iterdir())
    hub.forget()
    assert fetch(NAME) == fetch(f"{NAME}@main") == fetch(f"{NAME}@{COMMIT}") == folder
    assert hub.requests == []


def test_configuration_and_tokenizer_alone(hub):
    folder = fetch(NAME, weights=False)
    assert hub.storage.requests == []
    assert not (folder / "model.safetensors").exists()
    assert fetch(NAME) == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_shards_by_their_index(hub):
    hub.add("owner/sharded", SHARDED)
    folder = fetch("owner/sharded")
    for name, body in SHARDS.items():
        assert (folder / name).read_bytes() == body
    assert {path.name for path in names.model_files(folder)} >= SHARDS.keys()
    hub.forget()
    fetch("owner/sharded")
    assert hub.requests == []
    (folder / "model-2.safetensors").resolve().unlink()
    fetch("owner/sharded")
    assert [r.path for r in hub.storage.requests] == [
        hub.storage_path(SHARDS["model-2.safetensors"])
    ]


@pytest.mark.parametrize(
    "shard",
    ["../../../../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".safetensors",
     "..\\x.safetensors", "model.bin", "C:x.safetensors", 5],
)  # fmt: skip
def test_an_index_names_no_file_elsewhere(hub, tmp_path, shard):
    hub.add(
        NAME, SHARDED | {"model.safetensors.index.json": index_of("model-1.safetensors", shard)}
    )
    assert "model.safetensors.index.json: " in refusal(NAME, InputError)
    assert hub.storage.requests == []
    assert not list(tmp_path.rglob("*outside*"))
    hub.add("owner/sharded", SHARDED)  # control
    fetch("owner/sharded")


def test_a_revision(hub):
    hub.add(NAME, FILES | {"model.safetensors": b"older"}, revision="v1", commit=OTHER_COMMIT)
    assert (fetch(f"{NAME}@v1") / "model.safetensors").read_bytes() == b"older"
    assert (fetch(f"{NAME}@{OTHER_COMMIT}") / "model.safetensors").read_bytes() == b"older"
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    missing = Reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
    hub.server.default[f"/{NAME}/resolve/v9/config.json"] = missing
    assert f"{NAME} has no revision 'v9'" in refusal(f"{NAME}@v9", InputError)


def test_files_are_of_one_commit(hub):
    """The branch moves on after the first answer."""
    hub.add(NAME, FILES | {"model.safetensors": b"newer"}, revision="next", commit=OTHER_COMMIT)
    first = hub.server.default[f"/{NAME}/resolve/main/config.json"]
    for name in FILES:
        place = f"/{NAME}/resolve/main/{name}"
        hub.server.default[place] = hub.server.default[f"/{NAME}/resolve/next/{name}"]
    hub.server.default[f"/{NAME}/resolve/main/config.json"] = first
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS


def test_eight_at_once(hub):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: fetch(NAME), range(8)))
    (folder,) = folders
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len([r for r in hub.storage.requests if r.method == "GET"]) == 1


# --- Access ---


def test_a_gated_repository_without_a_token(hub):
    hub.add("owner/gated", FILES, token=TOKEN)
    message = refusal("owner/gated", InputError)
    page = f"{hub.server.address}/owner/gated"
    assert message == (
        f"owner/gated is gated: accept its licence at {page} and set HF_TOKEN to a token of that "
        "account"
    )
    hub.monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else_entirely")
    message = refusal("owner/gated", InputError)
    assert "the token in use has no access" in message
    assert "somebody" not in message


def test_the_token_goes_to_the_hub_alone(hub, capfd, caplog):
    caplog.set_level(0)
    hub.add("owner/gated", FILES, token=TOKEN)
    hub.monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.storage.script(hub.storage_path(WEIGHTS), Reply(status=500, body=TOKEN.encode()))
    refusal("owner/gated", ServiceError)
    fetch("owner/gated")
    assert {r.headers["authorization"] for r in hub.server.requests} == {f"Bearer {TOKEN}"}
    assert len(hub.storage.requests) == 2  # control: it was asked
    assert not any("authorization" in request.headers for request in hub.storage.requests)
    written = [path for path in hub.cache.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in "".join((*capfd.readouterr(), caplog.text))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(401, b"", {"X-Error-Code": "RepoNotFound"}), "neither a file or folder here nor a"),
        (Reply(404, b"no such page"), "a private one needs HF_TOKEN"),
        (Reply(403, b"", {"X-Error-Message": "no"}), "refuses access (HTTP 403)"),
        (Reply(403, b"", {"X-Error-Message": "Access to this resource is disabled."}), "disabled"),
        (Reply(404, b"", {"X-Error-Code": "EntryNotFound"}), "owner/other has no config.json"),
    ],
)
def test_what_may_not_be_read_is_a_wrong_name(hub, reply, message):
    hub.server.default["/owner/other/resolve/main/config.json"] = reply
    assert message in refusal("owner/other", InputError)
    assert len(hub.server.requests) == 1


def test_a_token_that_is_no_longer_valid(hub):
    hub.monkeypatch.setenv("HF_TOKEN", TOKEN)
    error = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.server.default["/owner/other/resolve/main/config.json"] = Reply(401, b"", error)
    message = refusal("owner/other", InputError)
    assert "the token in use is for other ones, or no longer valid" in message
    assert TOKEN not in message


def test_a_page_to_log_in_is_no_model(hub):
    """As a network sends it that wants its own log-in first."""
    page = Reply(200, b"<html>Log in", {"Content-Type": "text/html"})
    hub.server.default["/owner/other/resolve/main/config.json"] = page
    assert "FileMetadataError" in refusal("owner/other", ServiceError)
    assert not list(hub.cache.glob("models--owner--other/blobs/*"))


def test_a_token_that_is_none(hub):
    hub.monkeypatch.setenv("HF_TOKEN", "hf_ä")
    assert refusal(NAME, InputError) == "HF_TOKEN: holds characters that no token has"


def test_a_mirror_that_is_no_address(hub):
    hub.move("example.org")
    assert "HF_ENDPOINT: 'example.org' is not an http or https address" in refusal(NAME, InputError)


def test_a_repository_without_safetensors(hub):
    hub.add("owner/pickles", {k: v for k, v in FILES.items() if "safetensors" not in k})
    message = refusal("owner/pickles", InputError)
    assert "owner/pickles has no model.safetensors.index.json; a model is read from" in message


# --- Without a network ---


def test_offline(hub, tmp_path):
    hub.set("HF_HUB_OFFLINE", True)
    message = refusal(NAME, ServiceError)
    assert f"{NAME} is not whole in the cache {hub.cache}" in message
    assert f"`python -m lightning_sft download {NAME}`" in message
    hub.set("HF_HUB_OFFLINE", False)
    folder = fetch(NAME, weights=False)
    hub.set("HF_HUB_OFFLINE", True)
    refusal(NAME, ServiceError)  # its weights are not there
    hub.set("HF_HUB_OFFLINE", False)
    fetch(NAME)
    hub.forget()
    hub.set("HF_HUB_OFFLINE", True)
    assert fetch(NAME) == folder
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    folder = fetch(NAME)
    hub.move("http://127.0.0.1:9")  # nobody listens there
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    message = refusal("owner/other", ServiceError)
    assert message.startswith("owner/other is not whole in the cache and could not be fetched")
    assert "from http://127.0.0.1:9 (ConnectError" in message
    assert "`python -m lightning_sft download owner/other`" in message
    assert waits == []
    assert fetch(NAME) == folder


def test_a_silent_hub(hub):
    with socket.create_server(("127.0.0.1", 0)) as silence:
        hub.move(f"http://127.0.0.1:{silence.getsockname()[1]}")
        hub.set("HF_HUB_ETAG_TIMEOUT", 0.1)
        start = time.monotonic()
        assert "(ReadTimeout" in refusal(NAME, ServiceError)
        assert time.monotonic() - start < 5.0


# --- Broken transfers ---


def test_a_broken_transfer_is_resumed(hub, monkeypatch, no_waiting):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.storage.script(hub.storage_path(WEIGHTS), Reply(cut=5000))
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.storage.requests[-1].headers["range"] == "bytes=5000-"


def test_files_that_arrived_are_not_fetched_again(hub):
    hub.add("owner/sharded", SHARDED)
    second = hub.storage_path(SHARDS["model-2.safetensors"])
    hub.storage.script(second, Reply(status=500, body=b""))
    assert "answered HTTP 500" in refusal("owner/sharded", ServiceError)
    hub.forget()
    fetch("owner/sharded")
    assert {request.path for request in hub.storage.requests} == {second}


def test_one_flipped_bit(hub, capsys):
    flipped = bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:]
    place = hub.storage_path(WEIGHTS)
    hub.storage.script(place, Reply(body=flipped), Reply(body=flipped))
    assert "model.safetensors arrived damaged twice" in refusal(NAME, ServiceError)
    assert flipped not in blobs(hub)
    hub.storage.script(place, Reply(body=flipped))
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert "is damaged and fetched again" in capsys.readouterr().err


def test_a_wrong_size(hub, no_waiting):
    hub.storage.script(hub.storage_path(WEIGHTS), Reply(body=WEIGHTS[:-1]))
    assert "could not be fetched from" in refusal(NAME, ServiceError)
    assert not [blob for blob in blobs(hub) if blob == WEIGHTS[:-1]]
    fetch(NAME)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_damaged_later_is_fetched_again(hub, file):
    path = fetch(NAME) / file
    damage(path)
    assert (fetch(NAME) / file).read_bytes() == FILES[file]
    damage(path)
    hub.set("HF_HUB_OFFLINE", True)
    assert "is not whole in the cache" in refusal(NAME, ServiceError)


@pytest.mark.parametrize("wait", ["86400", "9" * 5000])
def test_nobody_waits_a_day(hub, wait):
    busy = Reply(503, b"", {"Retry-After": wait})
    hub.server.script(f"/{NAME}/resolve/main/config.json", busy)
    assert "answered HTTP 503; run the command again later" in refusal(NAME, ServiceError)


def test_a_passing_fault_is_tried_again(hub, no_waiting):
    hub.server.script(f"/{NAME}/resolve/main/config.json", *[Reply(503, b"busy")] * 2)
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS


# --- Disk ---


def test_a_cache_that_cannot_be_written_to(hub, tmp_path):
    (tmp_path / "file").write_text("")
    hub.set("HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    message = refusal(NAME, ServiceError)
    assert str(tmp_path / "file") in message
    assert "HF_HOME moves it" in message


def test_a_full_disk(hub):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(WEIGHTS) // 2, hard))
    try:
        message = refusal(NAME, ServiceError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large); HF_HOME moves it" in message
    assert not list(hub.cache.rglob("*.incomplete"))
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    error = explain_failure(OSError(errno.ENOSPC, "No space left on device"), NAME, "main")
    assert "cannot be written (No space left on device)" in str(error)


def test_a_mistake_of_our_own_is_not_taken_for_the_networks():
    with pytest.raises(TypeError):
        explain_failure(TypeError("of nobody else"), NAME, "main")


def test_the_library_is_imported_for_names_alone(tmp_path):
    code = (
        "import sys; from lightning_sft.data.find_tokenizer import tokenizer_of_model; "
        "tokenizer_of_model({'weights': 'gpt2-medium'}); "
        "print({'torch', 'huggingface_hub'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
