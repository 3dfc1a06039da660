"""Nothing in a file runs code: configs, checkpoints, weights, data and answers made to try.

Each hostile file would make a canary file. The negative controls open the same files the careless
way, where the canary does appear, so the corpus is known to be live.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.cli
import pytest
import torch
import yaml

from lightning_sft import GPTConfig, GPTModel
from support.runs import TINY, load, newest_checkpoint, run, write_config, write_data

pytestmark = pytest.mark.process  # what is live starts processes; a corpus of commands takes long


@pytest.fixture(autouse=True)
def _quiet_log_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning's handlers keep the stderr of the test in which it was imported, closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


class Payload:
    """Unpickling it touches the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


def refuse(capsys: pytest.CaptureFixture[str], canary: Path, *arguments: Any) -> str:
    """The command fails in one line, and nothing has run."""
    code = run(*arguments)
    err = capsys.readouterr().err
    assert not canary.exists(), arguments
    assert code == 2, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")
    return err


# --- configs -------------------------------------------------------------------------------------
TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.Popen [['touch', '{canary}']]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/new:type\n  args: [x, !!python/tuple [], {{'extend': !!python/name:exec }}]\n"
    "  listitems: \"open('{canary}', 'w')\"",
]


@pytest.mark.parametrize("tag", TAGS, ids=lambda tag: tag[2:40])
@pytest.mark.parametrize("command", ["fit", "predict", "inspect", "plan", "chat", "report"])
def test_yaml_tags(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], command: str, tag: str
) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("data: " + tag.format(canary=canary))
    refuse(capsys, canary, command, "--config", path)
    path.write_text("data:\n  path: " + tag.format(canary=canary).replace("\n", "\n  "))
    refuse(capsys, canary, command, "--config", path)


def test_yaml_tags_are_live(canary: Path) -> None:
    """Negative control."""
    yaml.unsafe_load("data: " + TAGS[0].format(canary=canary))
    assert canary.exists()


# What a class_path or a function name could be, with the arguments that would touch the canary.
# The last ones reach a forbidden module through an allowed one.
CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("os.system", {"command": "touch {canary}"}),
    ("posix.system", {"command": "touch {canary}"}),
    ("subprocess.Popen", {"args": ["touch", "{canary}"]}),
    ("subprocess.check_call", {"args": ["touch", "{canary}"]}),
    ("builtins.eval", {"source": "open('{canary}', 'w')"}),
    ("builtins.exec", {"source": "open('{canary}', 'w')"}),
    ("builtins.open", {"file": "{canary}", "mode": "w"}),
    ("pathlib.Path.touch", {"self": "{canary}"}),
    ("torch.load", {"f": "{pickle}", "weights_only": False}),
    ("torch.hub.load", {"repo_or_dir": "{folder}", "model": "evil", "source": "local"}),
    ("torch.hub.load_state_dict_from_url", {"url": "file://{pickle}"}),
    ("torch.serialization.load", {"f": "{pickle}", "weights_only": False}),
    ("numpy.load", {"file": "{pickle}", "allow_pickle": True}),
    ("lightning.fabric.utilities.cloud_io._load", {"path_or_url": "{pickle}"}),
    ("lightning.pytorch.LightningModule.load_from_checkpoint", {"checkpoint_path": "{pickle}"}),
    ("lightning.pytorch.cli.instantiate_class", {"args": [], "init": {"class_path": "os.abort"}}),
    ("lightning.pytorch.callbacks.LambdaCallback", {"setup": "os.system"}),
    ("lightning_sft.common.files.os.system", {"command": "touch {canary}"}),
    ("lightning_sft.common.files.shutil.rmtree", {"path": "{folder}"}),
    ("torch.optim.optimizer.torch.load", {"f": "{pickle}", "weights_only": False}),
    ("torch.optim.adamw.torch.hub.load", {"repo_or_dir": "{folder}", "source": "local"}),
    ("lightning.pytorch.callbacks.callback.os.system", {"command": "touch {canary}"}),
    ("lightning.pytorch.strategies.ddp.subprocess.Popen", {"args": ["touch", "{canary}"]}),
    ("evil.Optimizer", {}),  # a module beside the config: importing it would be enough
]
PLACES = [
    "model.optimizer",
    "model.lr_scheduler",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.strategy",
    "trainer.plugins",
    "trainer.profiler",
]


def fill(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: fill(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, names) for item in value]
    return value.format(**names) if isinstance(value, str) else value


@pytest.fixture
def names(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Paths for the arguments above: a live pickle, and a folder with modules that bite."""
    folder = tmp_path / "evil"
    folder.mkdir()
    for name in ("evil.py", "hubconf.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')\n")
    (tmp_path / "payload.pth").write_bytes(pickle.dumps(Payload(canary)))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    return {"canary": str(canary), "folder": str(folder), "pickle": str(tmp_path / "payload.pth")}


@pytest.mark.parametrize("place", PLACES)
def test_classes(
    tmp_path: Path,
    canary: Path,
    names: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    # All of them in two places, and in each of the others every third, in turn.
    thorough = place in ("model.optimizer", "trainer.callbacks")
    for class_path, init_args in CLASSES if thorough else CLASSES[PLACES.index(place) % 3 :: 3]:
        spec: Any = {"class_path": class_path, "init_args": fill(init_args, names)}
        specs = [spec, class_path] if place.startswith("model") else [spec]
        for value in specs:
            in_list = place in ("trainer.callbacks", "trainer.plugins")
            change = {place.replace(".", "__"): [value] if in_list else value}
            refuse(capsys, canary, "fit", "--config", write_config(tmp_path, **change))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["fit", "plan", "chat"])
def test_classes_on_the_command_line(
    tmp_path: Path,
    canary: Path,
    names: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    config = write_config(tmp_path)
    for class_path in (
        "os.system",
        "torch.hub.load",
        "lightning_sft.common.files.os.system",
        "evil.Any",
    ):
        for option in ("--model.optimizer", "--trainer.callbacks", "--generation", "--data"):
            refuse(capsys, canary, command, "--config", config, f"{option}={class_path}")


def test_classes_are_live(canary: Path, names: dict[str, str]) -> None:
    """Negative control: the careless way to follow a class_path."""
    (popen,) = (fill(arguments, names) for name, arguments in CLASSES if name == "subprocess.Popen")
    spec = {"class_path": "subprocess.Popen", "init_args": popen}
    lightning.pytorch.cli.instantiate_class((), spec).wait()
    assert canary.exists()
    canary.unlink()
    __import__("evil")
    assert canary.exists()


# --- prompt templates ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "template",
    [
        "{instruction.__class__.__mro__}",
        "{instruction.__init__.__globals__}",
        "{instruction[0]}",
        "{instruction!r}",
        "{instruction:>1000000000}",
        "{instruction}{0}",
        "{instruction}{input}",
        "{__import__}",
    ],
)
def test_templates(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    style = {"instruction": template, "input": "{input}", "header": "A: "}
    for command in ("fit", "inspect"):
        config = write_config(tmp_path, data__prompt_style=style)
        assert "exactly once" in refuse(capsys, canary, command, "--config", config)


def test_entries_are_no_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Braces in an entry are text; a placeholder in one field does not take in another."""
    path = write_data(tmp_path / "data.json")
    entries = json.loads(path.read_text())
    entries[0] = {"instruction": "{input} {0.__class__}", "input": "{instruction}", "output": "{x}"}
    path.write_text(json.dumps(entries))
    assert run("inspect", "--data.path", path, "--entries", "0") == 0
    out = capsys.readouterr().out
    assert "### Instruction:\n{input} {0.__class__}\n\n### Input:\n{instruction}\n" in out


# --- checkpoints and weights ---------------------------------------------------------------------
def hostile_pickles(canary: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    state = GPTModel(GPTConfig(**TINY)).state_dict()
    payload = Payload(canary)
    return {
        "bare": payload,
        "as a tensor": state | {"tok_emb.weight": payload},
        "beside the tensors": {"state_dict": state, "epoch": payload},
        "as a key's neighbour": OrderedDict([("a", [payload]), ("state_dict", state)]),
        "as hyperparameters": {"state_dict": state, "hyper_parameters": payload},
    }


KINDS = [*hostile_pickles(Path())]
WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda c, path: torch.save(c, path, _use_new_zipfile_serialization=False),
    "plain pickle": lambda content, path: path.write_bytes(pickle.dumps(content)) and None,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_pickles(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], kind: str, writer: str
) -> None:
    config = write_config(tmp_path)
    for suffix in (".pth", ".pt", ".ckpt", ".safetensors"):
        path = tmp_path / f"evil{suffix}"
        WRITERS[writer](hostile_pickles(canary)[kind], path)
        weights = ["--model.weights", path]
        refuse(capsys, canary, "fit", "--config", config, *weights)
    refuse(capsys, canary, "fit", "--config", config, "--ckpt_path", tmp_path / "evil.ckpt")
    refuse(capsys, canary, "predict", "--ckpt_path", tmp_path / "evil.ckpt")
    refuse(capsys, canary, "chat", tmp_path / "evil.ckpt")
    # The negative control, last: the same file, opened without care.
    if writer == "plain pickle":
        pickle.loads((tmp_path / "evil.pth").read_bytes())
    else:
        torch.load(tmp_path / "evil.pth", weights_only=False)
    assert canary.exists()


def test_no_checkpoint_is_read_before_a_good_one(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`last` passes over a hostile file with a newer name, and over its lying sidecar."""
    config = write_config(tmp_path, trainer__max_epochs=1)
    assert run("fit", "--config", config) == 0
    good = newest_checkpoint(tmp_path / "runs/tiny/version_0")
    evil = good.with_name("step-999999.ckpt")
    torch.save({"state_dict": Payload(canary)}, evil)
    evil.with_name(evil.name + ".json").write_text(json.dumps({"step": 999999, "val_loss": 0.0}))
    assert run("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs=2") == 0
    assert not canary.exists()
    assert f"skipped: ckpt_path: {evil}" in capsys.readouterr().out


def test_names_inside_a_checkpoint_are_not_followed(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning and jsonargparse know keys that name code; in a checkpoint they mean nothing."""
    config = write_config(tmp_path, trainer__max_epochs=1, generation__max_new_tokens=2)
    assert run("fit", "--config", config) == 0
    content = load(newest_checkpoint(tmp_path / "runs/tiny/version_0"))
    content["hyper_parameters"] |= {
        "_class_path": "subprocess.Popen",
        "_instantiator": "os.system",
        "optimizer": {"class_path": "os.system", "init_args": {"command": f"touch {canary}"}},
        "args": ["touch", str(canary)],
    }
    content["hparams_type"] = content["hparams_name"] = "os.system"
    path = tmp_path / "named.ckpt"
    torch.save(content, path)
    data = ["--data.path", tmp_path / "data.json", "--run.dir", tmp_path / "elsewhere"]
    data += ["--data.max_length=128", "--data.batch_size=4", "--generation.max_new_tokens=2"]
    assert run("predict", "--ckpt_path", path, *data) == 0
    assert run("fit", "--config", config, "--ckpt_path", path, "--trainer.max_epochs=2") == 0
    assert not canary.exists()
    content["hyper_parameters"]["prompt_style"] = {
        "instruction": "{instruction.__class__}",
        "input": "{input}",
        "header": "x",
    }
    torch.save(content, path)
    assert "exactly once" in refuse(capsys, canary, "predict", "--ckpt_path", path, *data)


def with_header(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def tensor_entry(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes
    return json.dumps({"tok_emb.weight": entry}).encode()


LYING_HEADERS = {
    "endless header": with_header(b"{}", length=2**63),
    "header past the end": with_header(b"{}", length=10_000),
    "negative header": with_header(b"{}", length=2**64 - 1),
    "no JSON": with_header(b"<html></html>"),
    "deep JSON": with_header(b'{"a":' * 50_000),
    "data past the end": with_header(tensor_entry(), body=b"\0" * 8),
    "huge shape": with_header(tensor_entry(shape=[2**40, 2**40]), body=b"\0" * 16),
    "overflowing shape": with_header(tensor_entry(shape=[2**62, 8]), body=b"\0" * 16),
    "backward offsets": with_header(tensor_entry(data_offsets=[16, 0]), body=b"\0" * 16),
    "negative offsets": with_header(tensor_entry(data_offsets=[-16, 0]), body=b"\0" * 16),
    "unknown type": with_header(tensor_entry(dtype="PICKLE"), body=b"\0" * 16),
    "more bytes than tensors": with_header(tensor_entry(), body=b"\0" * 4096),
}


@pytest.mark.parametrize("name", LYING_HEADERS)
def test_safetensors_that_lie(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LYING_HEADERS[name])
    for weights in (path, tmp_path):  # the file, and the folder that holds it
        config = write_config(tmp_path, model__weights=str(weights))
        assert "safetensors" in refuse(capsys, canary, "fit", "--config", config)


def test_a_shard_index_does_not_lead_out_of_its_folder(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(with_header(tensor_entry(), body=b"\0" * 16))
    index = folder / "model.safetensors.index.json"
    config = write_config(tmp_path, model__weights=str(folder))
    for target in ("../outside.safetensors", str(outside), 3, ["a"], None):
        index.write_text(json.dumps({"weight_map": {"tok_emb.weight": target}}))
        message = refuse(capsys, canary, "fit", "--config", config)
        assert "tensors do not fit" not in message  # it was not read


# --- answers -------------------------------------------------------------------------------------
MARKUP = [
    "<script>document.title='ran'</script>",
    "</script><script src=https://evil.test/x.js></script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "${alert(1)} {{7*7}} {% raw %}",
    "javascript:alert(1)",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "\u2028\u2029</ScRiPt >",
]


def test_markup_in_answers_stays_text(tmp_path: Path) -> None:
    """The report holds every answer, and none of it as an element, a script or an address."""
    records = [
        {
            "instruction": f"{n} {text}",
            "input": text,
            "output": text,
            "model_response": text,
        }
        for n, text in enumerate(MARKUP)
    ]
    harmless = json.loads(json.dumps(records).replace("<", "(").replace(">", ")"))
    pages = []
    for name, content in (("evil", records), ("plain", harmless)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "instruction-data-with-response.json").write_text(json.dumps(content))
        assert run("report", folder) == 0
        pages.append((folder / "report.html").read_text())
    evil, plain = ([tag.lower() for tag in re.findall(r"<[!/a-zA-Z][^\s>]*", p)] for p in pages)
    assert evil == plain  # the same elements, whatever the answers hold
    assert not re.search(r"<[^>]*(src|href)\s*=\s*[\"']?https?:", pages[0], re.I)
    # The negative control: pasted in as it is, an answer would add elements.
    pasted = pages[1].replace("</body>", MARKUP[1] + "</body>")
    assert [t.lower() for t in re.findall(r"<[!/a-zA-Z][^\s>]*", pasted)] != plain
