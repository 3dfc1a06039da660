"""Weights from every source into `GPTModel` and back: same logits, or one line of refusal."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_sft.common import downloads, files
from lightning_sft.common.errors import InputError, ServiceError
from lightning_sft.models import files as weight_files
from lightning_sft.models import gpt2_weights as weights
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import from_hf, to_hf
from lightning_sft.models.loading import book_state_dict, load_weights
from lightning_sft.models.registry import ARCHITECTURES
from support.hub import Reply
from support.model_hub import ModelHub, damage
from support.tiny_weights import INPUT_IDS, TIED, TINY, logits_of, make_book_model, make_model


def on_meta(config: GPTConfig = TINY) -> GPTModel:
    with torch.device("meta"):
        return GPTModel(config).eval()


def load_logits(source: object, config: GPTConfig = TINY) -> torch.Tensor:
    model = on_meta(config)
    load_weights(model, str(source))
    return logits_of(model)


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory):
    """Folders written by transformers, and the logits of the model behind each."""
    transformers = pytest.importorskip("transformers")
    made = {}
    for name, tied in (("tied", True), ("untied", False)):
        config = transformers.GPT2Config(
            vocab_size=97,
            n_positions=16,
            n_embd=32,
            n_head=4,
            n_layer=2,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(1)
        model = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            model.save_pretrained(folder / "shards", max_shard_size="30KB")
            made[name] = folder, model(INPUT_IDS).logits
    return made


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_files, "can_read_openai", lambda: False)
    with ModelHub(monkeypatch, tmp_path / "hub") as server:
        yield server


# --- Parity ---


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("part", ["", "model.safetensors", "shards"])
def test_logits_equal_transformers(hf_folders, tied, part):
    folder, expected = hf_folders[tied]
    if part == "shards":
        assert len(list((folder / part).glob("*.safetensors"))) > 1
    torch.testing.assert_close(load_logits(folder / part), expected, atol=1e-5, rtol=1e-5)
    if tied == "tied":
        torch.testing.assert_close(load_logits(folder, TIED), expected, atol=1e-5, rtol=1e-5)


def test_a_forgotten_transpose_would_show(hf_folders, monkeypatch):
    """Control for the parity above: `attn.c_proj` is square, so no shape check can find it."""
    folder, expected = hf_folders["tied"]
    monkeypatch.setattr(
        weights, "_is_conv1d", lambda name, tensor: tensor.ndim == 2 and "attn.c_proj" not in name
    )
    tensors = load_file(folder / "model.safetensors")
    tops = {f"transformer.{name}" for name in ("wte.weight", "wpe.weight")}
    flipped = {name: t.T.contiguous() if name in tops else t for name, t in tensors.items()}
    save_file(flipped, folder / "flipped.safetensors")
    difference = (load_logits(folder / "flipped.safetensors") - expected).abs().max()
    assert difference > 0.1


def test_old_files_without_prefix_and_with_masks(hf_folders, tmp_path):
    """As the official gpt2 repositories have it."""
    folder, expected = hf_folders["tied"]
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 16, 16))
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_logits(tmp_path), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(hf_folders, tmp_path, dtype):
    folder, _ = hf_folders["untied"]
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = on_meta()
    load_weights(model, str(tmp_path))
    for name, expected in from_hf(tensors, TINY).items():
        parameter = model.get_parameter(name)
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected.float())


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_to_hf_and_back_is_bit_exact(tmp_path, qkv_bias, tied):
    config = dataclasses.replace(TINY, qkv_bias=qkv_bias, tie_embeddings=tied)
    model = make_model(config)
    tensors = to_hf(model.state_dict())
    assert ("lm_head.weight" in tensors) is not tied
    save_file(tensors, tmp_path / "model.safetensors")
    back = on_meta(config)
    load_weights(back, str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_transformers_reads_to_hf(hf_folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make_model()
    config = json.loads((hf_folders["untied"][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(to_hf(model.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(INPUT_IDS).logits, logits_of(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_books_pth_loads_here(tmp_path, qkv_bias):
    config = dataclasses.replace(TINY, qkv_bias=qkv_bias)
    torch.manual_seed(2)
    theirs = make_book_model(config)
    torch.save(theirs.state_dict(), tmp_path / "book.pth")
    assert "trf_blocks.0.att.mask" in theirs.state_dict()
    actual = load_logits(tmp_path / "book.pth", config)
    torch.testing.assert_close(actual, logits_of(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [TINY, TIED, dataclasses.replace(TINY, qkv_bias=False)])
def test_our_pth_loads_in_the_book(tmp_path, config):
    ours, theirs = make_model(config), make_book_model(config)
    torch.save(book_state_dict(ours), tmp_path / "ours.pth")
    theirs.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)
    torch.testing.assert_close(logits_of(theirs), logits_of(ours), atol=1e-5, rtol=1e-5)
    assert torch.equal(load_logits(tmp_path / "ours.pth", config), logits_of(ours))


def saved_size(state: dict[str, torch.Tensor]) -> int:
    torch.save(state, buffer := io.BytesIO())
    return len(buffer.getvalue())


def test_the_books_mask_is_written_once():
    model = make_model(dataclasses.replace(TINY, context_length=256, n_layers=4))
    size = saved_size(book_state_dict(model)) - saved_size(dict(model.state_dict()))
    one_mask = 256 * 256 * 4
    assert one_mask < size < 1.2 * one_mask


def test_nothing_of_size_context_squared(tmp_path):
    """131,072 tokens would make a mask of 69 GB behind every fit."""
    short = dataclasses.replace(TINY, context_length=weights.LONGEST_BOOK_MASK, n_layers=1)
    long = dataclasses.replace(short, context_length=131_072)
    assert "trf_blocks.0.att.mask" in book_state_dict(make_model(short))
    state = book_state_dict(make_model(long))
    assert state.keys() == make_model(long).state_dict().keys()
    torch.save(state, tmp_path / "long.pth")
    load_weights(on_meta(long), str(tmp_path / "long.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize("wrap", ["", "lightning", "chapter 5", "legacy"])
def test_state_dicts_in_their_wrappings(tmp_path, suffix, wrap):
    model, path = make_model(), tmp_path / f"file{suffix}"
    state: dict[str, object] = dict(model.state_dict())
    if wrap == "lightning":
        state = {"epoch": 1, "state_dict": {f"model.{name}": t for name, t in state.items()}}
    elif wrap == "chapter 5":
        state = {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}
    torch.save(state, path, _use_new_zipfile_serialization=wrap != "legacy")
    assert torch.equal(load_logits(path), logits_of(model))


# --- What a loaded model is like ---


@pytest.mark.parametrize("make", [on_meta, make_model])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("config", [TINY, TIED])
def test_parameters_own_their_memory(tmp_path, make, suffix, config):
    source, path = make_model(config, seed=3), tmp_path / f"file{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(to_hf(source.state_dict()), path)
    content = path.read_bytes()
    model = make(config)
    assert load_weights(model, str(path)) == path
    assert (model.out_head.weight is model.tok_emb.weight) == config.tie_embeddings
    storages = set()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.requires_grad
        assert parameter.is_contiguous()
        assert parameter.dtype == torch.float32
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        storages.add(parameter.data_ptr())
        assert torch.equal(parameter, source.get_parameter(name))
        with torch.no_grad():
            parameter.add_(1.0)  # as an optimizer does
    assert len(storages) == len(list(model.parameters()))
    assert path.read_bytes() == content
    path.write_bytes(b"")  # a mapped file cut short would now end the process
    assert torch.isfinite(logits_of(model)).all()


def test_none_leaves_the_model_alone():
    model = make_model()
    expected = logits_of(model)
    assert load_weights(model, None) is None
    assert torch.equal(logits_of(model), expected)


def test_a_head_of_its_own(tmp_path):
    untied, tied = make_model(TINY), make_model(TIED)
    torch.save(untied.state_dict(), tmp_path / "untied.pth")
    torch.save(tied.state_dict(), tmp_path / "tied.pth")
    with pytest.raises(InputError, match=r"output head differs.*tie_embeddings: false"):
        load_weights(on_meta(TIED), str(tmp_path / "untied.pth"))
    # Controls: a head that is the embedding is no loss, and an untied model takes either.
    assert torch.equal(load_logits(tmp_path / "tied.pth", TIED), logits_of(tied))
    assert torch.equal(load_logits(tmp_path / "tied.pth", TINY), logits_of(tied))
    assert torch.equal(load_logits(tmp_path / "untied.pth", TINY), logits_of(untied))
    model = on_meta(TINY)
    load_weights(model, str(tmp_path / "tied.pth"))
    assert model.out_head.weight.data_ptr() != model.tok_emb.weight.data_ptr()


# --- Bad weights ---


def refusal(path: Path, config: GPTConfig = TINY) -> str:
    """The error's text; the model must be as it was."""
    model = make_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as warned, pytest.raises(InputError) as error:
        load_weights(model, str(path))
    assert not warned  # one line means one line
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_tensors_that_do_not_fit(tmp_path):
    path, good = tmp_path / "weights.pth", make_model().state_dict()
    layer = [name for name in good if name.startswith("trf_blocks.1.")]
    torch.save({name: good[name] for name in good if name not in layer}, path)
    message = refusal(path)
    assert f"{len(layer)} tensors do not fit" in message
    assert message.count("is missing") == 5  # the first five of sixteen
    assert len(layer) == 16

    torch.save(good | {"trf_blocks.0.att.W_query.lora_a": torch.zeros(2)}, path)
    assert "trf_blocks.0.att.W_query.lora_a has no place" in refusal(path)
    torch.save(good | {"pos_emb.weight": torch.zeros(8, 32)}, path)
    assert "pos_emb.weight is (8, 32) instead of (16, 32)" in refusal(path)
    torch.save(good | {"pos_emb.weight": torch.zeros(16, 32, dtype=torch.int64)}, path)
    assert "pos_emb.weight is torch.LongTensor (16, 32)" in refusal(path)
    torch.save(good | {"pos_emb.weight": torch.zeros(16, 32).to_sparse()}, path)
    assert "1 tensors do not fit" in refusal(path)
    torch.save(good, path)
    assert torch.equal(load_logits(path), logits_of(make_model()))  # control


def test_a_hub_file_that_does_not_fit(hf_folders, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = load_file(hf_folders["tied"][0] / "model.safetensors")
    save_file(tensors, path)
    message = refusal(path, dataclasses.replace(TINY, n_layers=1))
    assert "12 without a place" in message
    assert message.count("h.1.") == 5
    assert "16 missing" in refusal(path, dataclasses.replace(TINY, n_layers=3))
    assert "has no place" in refusal(path, dataclasses.replace(TINY, qkv_bias=False))
    save_file(tensors | {"transformer.h.0.attn.c_attn.weight": torch.zeros(16, 96)}, path)
    assert "3 of another shape" in refusal(path)
    save_file(tensors | {"transformer.h.0.attn.c_attn.bias": torch.tensor(0.0)}, path)
    assert "3 missing" in refusal(path)


@pytest.mark.parametrize("size", ["gpt2-medium", "gpt2-xl"])
def test_weights_of_another_size_are_named(tmp_path, size):
    shapes = {name: p.shape for name, p in on_meta(ARCHITECTURES[size]).named_parameters()}
    element = torch.zeros(1)
    torch.save({name: element.expand(shape) for name, shape in shapes.items()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=re.escape(f"looks like {size} (")) as error:
        load_weights(on_meta(ARCHITECTURES["gpt2-small"]), str(tmp_path / "a.pth"))
    assert {"gpt2-medium": "(355M)", "gpt2-xl": "(1558M)"}[size] in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["trf_blocks.1.ff.layers.0.bias", "tok_emb.weight"])
def test_a_value_that_is_no_number(tmp_path, value, name):
    state = make_model().state_dict()
    state[name].view(-1)[7] = value
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        load_weights(on_meta(), str(tmp_path / "a.pth"))


class Bomb:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize("protocol", [2, "torch"])
def test_a_hostile_pickle_is_not_run(tmp_path, suffix, protocol):
    path, proof = tmp_path / f"hostile{suffix}", tmp_path / "proof"
    content = make_model().state_dict() | {"bomb": Bomb(proof)}
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Bomb(proof)}, protocol=protocol))
    assert "nothing in a file is run" in refusal(path)
    assert not proof.exists()
    if protocol == "torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert proof.exists()  # control: the bomb works


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(to_hf(make_model().state_dict()), path)
    else:
        torch.save(make_model().state_dict(), path)
    whole = path.read_bytes()
    load_weights(on_meta(), str(path))  # control
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(256, (5000,), dtype=torch.uint8, generator=generator)
    cuts = [whole[:n] for n in (1, 8, 100, len(whole) // 2, len(whole) - 1)]
    for content in [b"", bytes(random.tolist()), b"<html>", b"\x80\x04.", b"{}", *cuts]:
        path.write_bytes(content)
        refusal(path)
    path.write_bytes(b"")
    assert "the file is empty" in refusal(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": 5}, torch.zeros(2), None])
def test_a_pickle_that_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    assert "no state dict of tensors" in refusal(tmp_path / "a.pth")


def test_things_that_are_no_weights(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "no weights in this folder" in refusal(tmp_path / "folder")
    (tmp_path / "a.txt").write_text("x")
    assert "allowed: a folder, .safetensors" in refusal(tmp_path / "a.txt")
    assert "neither a file nor a folder nor one of gpt2-small" in refusal(tmp_path / "missing.pth")
    save_file(to_hf(make_model().state_dict()), tmp_path / "outside.safetensors")
    for shards in (
        "5",
        "[]",
        '{"a": 5}',
        '{"a": "no.safetensors"}',
        '{"a": "../outside.safetensors"}',
    ):
        index = tmp_path / "folder" / "model.safetensors.index.json"
        index.write_text(f'{{"weight_map": {shards}}}')
        refusal(tmp_path / "folder")
        index.write_text(shards)
        refusal(tmp_path / "folder")
    (tmp_path / "folder.pth").mkdir()
    refusal(tmp_path / "folder.pth")


# --- Names: cache, hub, OpenAI ---


def tiny_safetensors(tmp_path: Path) -> bytes:
    save_file(to_hf(make_model().state_dict()), tmp_path / "tiny.safetensors")
    return (tmp_path / "tiny.safetensors").read_bytes()


REPOSITORY = "openai-community/gpt2-medium"


def put_on(hub: ModelHub, tmp_path: Path, body: bytes | None = None) -> None:
    body = tiny_safetensors(tmp_path) if body is None else body
    hub.add(REPOSITORY, {"config.json": b"{}", "model.safetensors": body})


def keep(tmp_path: Path, body: bytes) -> Path:
    """As a version fetched it that had no use for the hub's own cache."""
    folder = tmp_path / "cache" / "weights" / "gpt2-medium"
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    path.write_bytes(body)
    path.with_name("model.safetensors.sha256").write_text(f"{files.sha256_of(path)}  {path.name}\n")
    return path


def test_a_name_is_fetched_once(hub, tmp_path):
    put_on(hub, tmp_path)
    for name in ("gpt2-medium", "openai-community/gpt2-medium"):
        assert torch.equal(load_logits(name), logits_of(make_model()))
    assert len(hub.storage.requests) == 1
    cached = weight_files.find_weights("gpt2-medium") / "model.safetensors"
    damage(cached)
    assert torch.equal(load_logits("gpt2-medium"), logits_of(make_model()))
    assert cached.read_bytes() == tiny_safetensors(tmp_path)


def test_shards_of_a_repository(hub, hf_folders):
    folder, expected = hf_folders["untied"]
    hub.add("owner/sharded", folder / "shards")
    torch.testing.assert_close(load_logits("owner/sharded"), expected, atol=1e-5, rtol=1e-5)
    assert len([r for r in hub.storage.requests if r.method == "GET"]) > 1


def test_a_local_path_goes_before_a_name(hub, tmp_path, monkeypatch):
    (tmp_path / "gpt2-medium").mkdir()
    (tmp_path / "gpt2-medium" / "model.safetensors").write_bytes(tiny_safetensors(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_logits("gpt2-medium"), logits_of(make_model()))
    assert hub.requests == []


def test_what_is_no_safetensors_file_is_not_accepted(hub, tmp_path):
    put_on(hub, tmp_path, tiny_safetensors(tmp_path)[:-5])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_logits("gpt2-medium")


def test_what_older_versions_fetched_is_found(hub, tmp_path):
    path = keep(tmp_path, tiny_safetensors(tmp_path))
    for name in ("gpt2-medium", "openai-community/gpt2-medium"):
        assert torch.equal(load_logits(name), logits_of(make_model()))
    assert hub.requests == []
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    put_on(hub, tmp_path)
    assert torch.equal(load_logits("gpt2-medium"), logits_of(make_model()))
    assert len(hub.storage.requests) == 1


def test_without_a_hub_it_is_said_what_to_do(hub, tmp_path):
    hub.move("http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ServiceError) as error:
        load_logits("gpt2-medium")
    assert (
        f"{REPOSITORY} is not whole in the cache and could not be fetched from http://127.0.0.1:9"
        in str(error.value)
    )
    assert "or give the folder that holds it" in str(error.value)
    (tmp_path / "by hand").mkdir()
    (tmp_path / "by hand" / "model.safetensors").write_bytes(tiny_safetensors(tmp_path))
    assert torch.equal(load_logits(tmp_path / "by hand"), logits_of(make_model()))


def test_openais_is_gpt2_alone(hub):
    with pytest.raises(InputError, match="openai: has no 'smollm2-135m'; allowed: gpt2-small"):
        weight_files.fetch_weights("smollm2-135m", "openai")
    assert hub.requests == []


def serve_openai(hub: ModelHub, host: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = hub.server.address
    monkeypatch.setattr(weight_files, "OPENAI", (f"{address}/first", f"{address}/second"))
    for part in weight_files.OPENAI_FILES:
        hub.server.serve(f"/{host}/{size}/{part}", part.encode())


@pytest.mark.parametrize("host", ["first", "second"])
@pytest.mark.parametrize("fault", [Reply(404, b""), Reply(503, b"", {"Retry-After": "999"})])
def test_openais_files_when_the_hub_fails(hub, tmp_path, monkeypatch, host, fault):
    hub.server.default[f"/{REPOSITORY}/resolve/main/config.json"] = fault
    serve_openai(hub, host, "355M", monkeypatch)
    with pytest.raises((InputError, ServiceError)):  # control: nothing to read them with
        weight_files.find_weights("gpt2-medium")
    monkeypatch.setattr(weight_files, "can_read_openai", lambda: True)
    folder = weight_files.find_weights("gpt2-medium")
    assert folder == tmp_path / "cache/weights/gpt2-medium/openai"
    for part in weight_files.OPENAI_FILES:
        assert (folder / part).read_bytes() == part.encode()
    hub.forget()
    assert weight_files.find_weights("gpt2-medium") == folder
    assert hub.requests == []


def test_openais_files_need_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "model.ckpt.index").write_bytes(b"x")
    assert files.install_command("openai") in refusal(tmp_path)


def test_download_command_tells_what_it_did(hub, tmp_path, capsys, monkeypatch):
    put_on(hub, tmp_path)
    weight_files.download_command("gpt2-medium")
    folder = weight_files.find_weights("gpt2-medium")
    facts = ""
    for name in ("config.json", "model.safetensors"):
        path = folder / name
        size, sha256 = path.stat().st_size, files.sha256_of(path)
        facts += f"WHAT: {path}\n  {size:,} bytes, sha256 {sha256}\n"
    assert capsys.readouterr().out == facts.replace("WHAT", "downloaded")
    hub.forget()
    weight_files.download_command("gpt2-medium")
    assert capsys.readouterr().out == facts.replace("WHAT", "already there")
    assert hub.requests == []  # still there, and not asked for again
    serve_openai(hub, "first", "355M", monkeypatch)
    for what in ("downloaded", "already there"):
        weight_files.download_command("gpt2-medium", "openai")
        assert capsys.readouterr().out.count(f"{what}: ") == len(weight_files.OPENAI_FILES)
    weight_files.download_command("gpt2-medium")
    assert "already there" in capsys.readouterr().out
    path = keep(tmp_path / "older", tiny_safetensors(tmp_path))
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path / "older" / "cache"))
    weight_files.download_command("gpt2-medium")
    assert f"already there: {path}\n" in capsys.readouterr().out


def test_download_command_takes_any_name(hub, tmp_path, capsys):
    hub.add("owner/name", {"config.json": b"{}", "model.safetensors": tiny_safetensors(tmp_path)})
    weight_files.download_command("owner/name@main")
    assert capsys.readouterr().out.count("downloaded: ") == 2
    with pytest.raises(InputError, match="'nonsense' is no name on the hub"):
        weight_files.download_command("nonsense")
