"""Names on the hub through the commands and from Python, with a tiny model on a hub of our own."""

from __future__ import annotations

import json
import signal
import threading
import time

import pytest

from lightning_sft import SFTModule, load_model
from lightning_sft.data.find_tokenizer import read_tokenizer
from support.hub import Reply
from support.model_hub import COMMIT, TOKEN, ModelHub
from support.runs import load, newest_checkpoint, read_metrics, run, spawn, write_config
from support.tiny_run import write_hf

NAME = "owner/tiny"
SETTINGS = {"model__architecture": "auto", "data__prompt_style": "chatml"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with ModelHub(monkeypatch, tmp_path / "hub" / "hub") as server:
        server.add(NAME, write_hf(tmp_path / "hf"))
        yield server


def test_a_run_from_a_name_is_that_from_its_folder(hub, tmp_path, capsys):
    losses = []
    for weights in (NAME, str(tmp_path / "hf"), f"{NAME}@{COMMIT}"):
        config = write_config(tmp_path, model__weights=weights, **SETTINGS)
        assert run("fit", "--config", config, "--trainer.max_steps", 2) == 0
        losses.append(read_metrics(tmp_path / f"runs/tiny/version_{len(losses)}", "train_loss"))
    assert losses[0] == losses[1] == losses[2]
    checkpoint = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    assert load(checkpoint)["hyper_parameters"]["tokenizer"] == NAME
    hub.set("HF_HUB_OFFLINE", True)
    hub.forget()
    assert run("fit", "--config", config, "--ckpt_path", checkpoint, "--trainer.max_steps", 3) == 0
    assert hub.requests == []
    capsys.readouterr()


def test_inspect_fetches_no_weights(hub, tmp_path, capsys):
    config = write_config(tmp_path, model__weights=NAME, **SETTINGS)
    assert run("inspect", "--config", config, "--show", 1) == 0
    assert "<|im_start|>[[user\nSay" in capsys.readouterr().out
    assert hub.storage.requests == []
    config = write_config(tmp_path, model__tokenizer=NAME, model__weights=None, **SETTINGS)
    assert run("inspect", "--config", config, "--model.architecture", '{"family": "llama"}') == 0
    capsys.readouterr()


def test_adapters_beside_a_name(hub, tmp_path, capsys):
    lora = {"rank": 2, "targets": ["W_query"]}
    config = write_config(tmp_path, model__weights=NAME, model__lora=lora, **SETTINGS)
    assert run("fit", "--config", config, "--trainer.max_steps", 1) == 0
    checkpoint = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    assert load(checkpoint)["hyper_parameters"]["weights"] == NAME
    model = load_model(checkpoint, device="cpu")
    assert isinstance(model.answer("Say the number 3", max_new_tokens=3), str)
    capsys.readouterr()


def test_a_name_is_asked(hub, tmp_path, capsys):
    ours = load_model(NAME, device="cpu", prompt_style="chatml")
    theirs = load_model(tmp_path / "hf", device="cpu", prompt_style="chatml")
    answers = [model.answer("Say the number 3", max_new_tokens=9) for model in (ours, theirs)]
    assert answers[0] == answers[1]
    assert ours.tokenizer.name == read_tokenizer(NAME).name == read_tokenizer(tmp_path / "hf").name
    assert SFTModule("auto", NAME).config == theirs.model.config
    config = write_config(tmp_path)  # says another architecture
    style = ["--data.prompt_style", "chatml"]
    assert run("predict", "--config", config, *style, "--ckpt_path", NAME) == 0
    responses = tmp_path / "runs/tiny/version_0/instruction-data-with-response.json"
    named = responses.read_bytes()
    folder = ["--model.architecture", "auto", "--model.weights", tmp_path / "hf"]
    assert run("predict", "--config", config, *style, *folder) == 0
    again = tmp_path / "runs/tiny/version_1/instruction-data-with-response.json"
    assert again.read_bytes() == named
    capsys.readouterr()


@pytest.mark.parametrize("option", ["--model.weights", "--ckpt_path"])
def test_what_is_no_name_leaves_no_run(hub, tmp_path, capsys, option):
    config = write_config(tmp_path, **SETTINGS)
    hub.server.default["/owner/none/resolve/main/config.json"] = Reply(
        401, b"", {"X-Error-Code": "RepoNotFound"}
    )
    assert run("fit", "--config", config, option, "owner/none") == 2
    error = capsys.readouterr().err
    assert "'owner/none' is neither a file or folder here nor a repository" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_librarys_own_variables(hub, tmp_path):
    """In processes of their own: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE; one is killed."""
    hub.add("owner/gated", write_hf(tmp_path / "hf"), token=TOKEN)
    own = {"HF_ENDPOINT": hub.server.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    own |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    body = (tmp_path / "hf" / "model.safetensors").read_bytes()
    release = threading.Event()
    hub.storage.script(hub.storage_path(body), Reply(cut=1000, hold=release))
    arguments = ["download", "owner/gated"]
    process = spawn(*arguments, cwd=tmp_path, forked=False, **own)
    deadline = time.monotonic() + 120
    while not hub.storage.requests and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    release.set()
    assert process.returncode == -signal.SIGKILL
    process = spawn(*arguments, cwd=tmp_path, forked=False, **own)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("downloaded: ") == 4
    snapshot = tmp_path / "home/hub/models--owner--gated/snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == body
    hub.forget()
    config = write_config(tmp_path, model__weights="owner/gated", **SETTINGS)
    offline = own | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    process = spawn("inspect", "--config", config, cwd=tmp_path, forked=False, **offline)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert hub.requests == []
    assert TOKEN not in json.dumps([out, err])
