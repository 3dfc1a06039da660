"""Whatever a user gets wrong is one line on stderr and exit code 2, and nothing is written.

Each case runs the real command in this process. A case names what its message must say: the file
or option, the place in it, and what is allowed instead.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_sft import GPTConfig, GPTModel
from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import collate
from lightning_sft.data.loader import TrainLoader
from lightning_sft.data.rows import Row
from lightning_sft.models.loading import read_tensors
from support.runs import TINY, run, run_apart, write_config, write_data


@pytest.fixture(autouse=True)
def _quiet_log_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning's handlers keep the stderr of the test in which it was imported, closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)


GOOD = {"instruction": "Say it", "input": "", "output": "It."}


def refuse(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[Any], *says: str
) -> str:
    """Run a command that must fail on its input; its message, which must hold all of `says`."""
    before = set(folder.rglob("*"))
    code = run(*arguments)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert code == 2, err
    (message,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert err.splitlines()[-1] == message
    for part in says:
        assert part in message
    assert set(folder.rglob("*")) == before
    return message


# --- data: file content → what the message must say. A string is the file's text. ---------------
BAD_DATA: dict[str, tuple[Any, list[str]]] = {
    "empty": ("", ["bad.json", "the file is empty"]),
    "blank": (" \n\n", ["bad.json", "the file is empty"]),
    "no entries": ("[]", ["bad.json", "at least one entry"]),
    "an object": ('{"a": 1}', ["bad.json", "must be a list"]),
    "syntax": ('[\n{"instruction": "a",\n oops}]', ["bad.json: line 3, column 2"]),
    "not UTF-8": (b'[{"instruction": "\xff"}]', ["bad.json: byte 18 is not valid UTF-8"]),
    "cut off": (json.dumps([GOOD] * 40)[:-9], ["bad.json: line 1, column"]),
    "deep": ("[" * 100_000, ["bad.json", "not usable as JSON"]),
    "deep lines": ('{"a":' * 100_000, ["bad.json"]),
    "a number": ([GOOD, 3], ["bad.json: entry 1", "must be an object"]),
    "no instruction": ([GOOD, {"output": "b"}], ["entry 1: 'instruction' is missing"]),
    "no output": ([{"instruction": "a"}], ["entry 0: 'output' is missing", "field_names"]),
    "null": ([GOOD | {"input": None}], ["entry 0: 'input' is a null; it must be text"]),
    "number as text": ([GOOD | {"output": 3}], ["entry 0: 'output' is a number"]),
    "blank instruction": ([GOOD | {"instruction": " "}], ["entry 0: 'instruction' is blank"]),
    "empty output": ([GOOD | {"output": ""}], ["entry 0: 'output' is blank", "training"]),
    "surrogate": ('[{"instruction": "a\\ud800", "output": "b"}]', ["entry 0", "lone surrogate"]),
    "too few": ([GOOD] * 3, ["fractions", "leave the test split empty"]),
}


@pytest.mark.parametrize("command", ["fit", "inspect"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str) -> None:
    content, says = BAD_DATA[name]
    path = tmp_path / "bad.json"
    if isinstance(content, list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(
        capsys, tmp_path, [command, "--config", write_config(tmp_path, data__path=str(path))], *says
    )


@pytest.mark.parametrize("path", ["/nowhere/data.json", "/", "/dev/null"])
@pytest.mark.parametrize("option", ["path", "val_path", "test_path"])
def test_data_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, path: str
) -> None:
    config = write_config(tmp_path)
    refuse(capsys, tmp_path, ["fit", "--config", config, f"--data.{option}={path}"], path)


def test_a_key_in_an_address_is_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in ("https://me:hunter2@host.test/d.json", "https://host.test/d.json?api_key=hunter2"):
        arguments = ["fit", "--config", write_config(tmp_path), f"--data.path={url}"]
        assert "hunter2" not in refuse(capsys, tmp_path, arguments, "host.test/d.json", "key")


def test_data_that_is_unusual_but_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte-order mark, no `input`, an end-of-text written out, a header in the text."""
    entries: list[dict[str, str]] = [{"instruction": f"Do {n}", "output": "x"} for n in range(40)]
    entries[0]["output"] = "<|endoftext|>"
    entries[1]["output"] = "### Response:"
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(entries).encode())
    assert run("inspect", "--data.path", path) == 0
    assert (
        "hold a prompt header such as '### Response:' in their text: 1\n" in capsys.readouterr().out
    )
    assert run("inspect", "--data.path", path, "--entries=0", "--data.mask_prompt=true") == 0
    # Seven plain tokens and the row's own end.
    assert "[[27 91 437 1659 5239 91 29 50256]]" in capsys.readouterr().out


def test_predict_needs_no_outputs(tmp_path: Path) -> None:
    path = write_data(tmp_path / "data.json")
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([{"instruction": entry["instruction"]} for entry in entries]))
    config = write_config(tmp_path, data__path=str(path), generation__max_new_tokens=2)
    assert run("predict", "--config", config) == 0


# --- options: dotted changes of a good config → what the message must say. -----------------------
COSINE = {"class_path": "lightning_sft.WarmupCosine"}
ADAM = {"class_path": "torch.optim.AdamW"}
BAD_OPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"data__batchsize": 3}, ["data.batchsize", "did you mean 'data.batch_size'?"]),
    ({"dat": {"batch_size": 3}}, ["dat"]),
    ({"data__batch_size": "many"}, ["data.batch_size", "int", "many"]),
    ({"data__batch_size": 0}, ["data.batch_size: 0", ">= 1"]),
    ({"data__batch_size": 1000}, ["data.batch_size: 1000", "there are 34"]),
    ({"data__num_workers": -1}, ["data.num_workers: -1", ">= 0"]),
    ({"data__max_length": 0}, ["data.max_length: 0", ">= 1"]),
    ({"data__max_length": 4096}, ["data.max_length: 4096", "context of 128"]),
    ({"data__max_length": 9, "data__overlong": "error"}, ["train split: entry 0", "max_length 9"]),
    ({"data__max_length": 10, "data__overlong": "drop"}, ["train split", "max_length 10"]),
    ({"data__max_length": 10, "data__mask_prompt": True}, ["entry 0 has no target left"]),
    ({"data__overlong": "cut"}, ["data.overlong", "truncate"]),
    ({"data__fractions": [0.5, 0.2, 0.2]}, ["fractions", "sum to 0.9"]),
    ({"data__fractions": [0.5, 0.5]}, ["data.fractions", "3 elements"]),
    ({"data__fractions": [1.5, -0.3, -0.2]}, ["fractions", "between 0 and 1"]),
    ({"data__fractions": [math.nan, 0.5, 0.5]}, ["fractions", "between 0 and 1"]),
    ({"data__field_names": {"inputt": "x"}}, ["field_names", "'inputt'", "instruction"]),
    ({"data__prompt_style": "alpacca"}, ["prompt_style", "'alpacca'", "alpaca"]),
    ({"data__prompt_style": {"instruction": "x"}}, ["prompt_style", "'header' is missing"]),
    ({"data__path": None}, ["data.path"]),
    ({"data__path": ["a"]}, ["data.path"]),
    ({"model__architecture": "gpt3"}, ["architecture", "'gpt3'", "gpt2-small"]),
    ({"model__architecture": [1]}, ["model.architecture"]),
    ({"model__architecture__emb_dim": 33}, ["emb_dim 33", "n_heads 4"]),
    ({"model__architecture__emb_dim": "wide"}, ["emb_dim", "'wide'", "int"]),
    ({"model__architecture__emb_dim": 32.0}, ["emb_dim", "32.0", "int"]),
    ({"model__architecture__emb_dim": True}, ["emb_dim", "True", "int"]),
    ({"model__architecture__n_layers": 0}, ["n_layers", ">= 1"]),
    ({"model__architecture__width": 3}, ["architecture", "'width'", "emb_dim"]),
    ({"model__architecture__vocab_size": 100}, ["vocab_size 100", "50257"]),
    ({"model__architecture__drop_rate": 1.0}, ["drop_rate 1.0", "[0, 1)"]),
    ({"model__architecture__drop_rate": -0.1}, ["drop_rate -0.1", "[0, 1)"]),
    ({"model__architecture__drop_rate": math.nan}, ["drop_rate nan", "[0, 1)"]),
    ({"model__optimizer": ADAM | {"init_args": {"lr": 0.0}}}, ["model.optimizer", "lr 0.0"]),
    ({"model__optimizer": ADAM | {"init_args": {"lr": -1.0}}}, ["model.optimizer", "-1.0"]),
    ({"model__optimizer": ADAM | {"init_args": {"lr": math.nan}}}, ["model.optimizer", "nan"]),
    ({"model__optimizer": ADAM | {"init_args": {"lr": math.inf}}}, ["model.optimizer", "inf"]),
    ({"model__optimizer": ADAM | {"init_args": {"lr": "fast"}}}, ["model.optimizer", "lr", "fast"]),
    ({"model__optimizer": ADAM | {"init_args": {"betas": [2.0, 0.9]}}}, ["model.optimizer"]),
    ({"model__optimizer": {"class_path": "torch.nn.Linear"}}, ["model.optimizer", "torch.nn"]),
    ({"model__lr_scheduler": COSINE | {"init_args": {"warmup": -1}}}, ["lr_scheduler: warmup -1"]),
    ({"trainer__max_epochs": -5}, ["max_epochs", "-5"]),
    ({"trainer__max_epochs": "two"}, ["trainer.max_epochs", "two"]),
    ({"trainer__accelerator": "abacus"}, ["abacus", "cpu"]),
    ({"trainer__precision": "8"}, ["trainer.precision", "bf16-mixed"]),
    ({"trainer__devices": 0}, ["devices"]),
    ({"trainer__devices": "x"}, ["devices"]),
    ({"trainer__strategy": "magic"}, ["magic"]),
    ({"trainer__accumulate_grad_batches": 0}, ["accumulate_grad_batches", ">= 1"]),
    ({"trainer__callbacks": [{"class_path": "lightning_sft.training.checkpoint.Nope"}]}, ["Nope"]),
    ({"generation__max_new_tokens": 0}, ["generation.max_new_tokens: 0", ">= 1"]),
    ({"generation__temperature": -1.0}, ["generation.temperature: -1.0", ">= 0"]),
    ({"generation__top_p": 2.0}, ["generation.top_p: 2.0", "(0, 1]"]),
    ({"checkpoints__keep_last": 0}, ["keep_last", ">= 1"]),
    ({"loss_curve__num_batches": 0}, ["num_batches", ">= 1"]),
    ({"seed_everything": "abc"}, ["seed_everything", "abc"]),
    ({"seed_everything": -1}, ["seed_everything", "-1"]),
    ({"run__name": "../elsewhere"}, ["run.name", "../elsewhere"]),
    ({"model__weights": "gpt5"}, ["weights: 'gpt5'", "gpt2-small"]),
    ({"data__api_key": "sk-123456789012345678901234"}, ["data.api_key"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    BAD_OPTIONS,
    ids=[" ".join(c)[:60] + str(n) for n, (c, _) in enumerate(BAD_OPTIONS)],
)
def test_options(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    says: list[str],
) -> None:
    message = refuse(
        capsys, tmp_path, ["fit", "--config", write_config(tmp_path, **changes)], *says
    )
    assert "sk-1234" not in message


COMMAND_LINES: list[tuple[list[str], list[str]]] = [
    (["fitt"], ["'fitt'", "did you mean 'fit'?"]),
    (["fit", "--data.batch_sise", "3"], ["data.batch_sise", "did you mean 'data.batch_size'?"]),
    (["fit", "--batch_size", "3"], ["batch_size", "did you mean 'data.batch_size'?"]),
    (["fit", "--config"], ["config", "expected one argument"]),
    (["fit", "--config", "gpt2-tiny.yaml"], ["gpt2-tiny.yaml", "did you mean", "gpt2-xl.yaml"]),
    (["fit", "--config", "http://host.test/x.yaml"], ["http://host.test/x.yaml", "URL"]),
    (["fit", "--config", "/"], ["config: / is not a file"]),
    (["fit", "--ckpt_path", "/nowhere/x.ckpt"], ["/nowhere/x.ckpt"]),
    (["fit", "--ckpt_path", "http://host.test/x.ckpt"], ["URL"]),
    (["fit", "--ckpt_path", "last"], ["no whole checkpoint"]),
    (["predict", "--ckpt_path", "best"], ["no whole checkpoint"]),
    (["inspect", "--data.batch_sise", "3"], ["did you mean 'data.batch_size'?"]),
    (["plan", "--data.batch_sise", "3"], ["did you mean 'data.batch_size'?"]),
]


@pytest.mark.parametrize(
    ("arguments", "says"), COMMAND_LINES, ids=lambda value: " ".join(value)[:60]
)
def test_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    first = [arguments[0]] if arguments[0] == "fitt" else [arguments[0], "--config", str(config)]
    refuse(capsys, tmp_path, [*first, *arguments[1:]], *says)


BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["bad.yaml", "is empty"]),
    "a list": (b"- 1\n- 2\n", ["bad.yaml", "must be a mapping"]),
    "syntax": (b"model: [1,\n  x: }\n", ["bad.yaml: line 2, column 6"]),
    "tab": (b"data:\n\tpath: x\n", ["bad.yaml: line 2, column 1"]),
    "not UTF-8": (b"data: \xff\n", ["bad.yaml: byte 6 is not valid UTF-8"]),
    "twice": (b"data: {batch_size: 1}\nmodel: {}\ndata: {}\n", ["line 3: the key 'data'"]),
    "deep": (b"a: " + b"{a: " * 5_000, ["bad.yaml", "too deeply"]),
    "huge": (b"a: " + b"x" * 1_100_000, ["bad.yaml", "over 1,000,000 bytes"]),
    "aliases": (
        b"a0: &a0 [x, x]\n"
        + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 60)),
        ["bad.yaml", "more than 100,000 values"],
    ),
    "endless": (b"a: &a [*a]\n", ["bad.yaml", "no config"]),
    "no section": (b"trainer: 3\n", ["bad.yaml: trainer holds 3", "must be a mapping"]),
    "empty section": (b"data:\n", ["bad.yaml: data holds None", "must be a mapping"]),
    "binary": (bytes(range(256)), ["bad.yaml"]),
}


@pytest.mark.parametrize("command", ["fit", "inspect", "plan", "chat"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_config_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    content, says = BAD_FILES[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    refuse(capsys, tmp_path, [command, "--config", path], *says)


# --- weights -------------------------------------------------------------------------------------
def make_state(**changes: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**(TINY | changes))).state_dict()


def save(state: Any, path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, path)
    else:
        torch.save(state, path)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(state: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return dict(list(state.items())[count:])


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty": (lambda path: path.write_bytes(b""), []),
    "random bytes": (lambda path: path.write_bytes(bytes(range(256)) * 40), []),
    "text": (lambda path: path.write_text("<html>404</html>"), []),
    "truncated": (lambda path: (save(make_state(), path), cut_in_half(path)), []),
    "missing": (
        lambda path: save(without(make_state(), 7), path),
        ["7 tensors do not fit", "7 missing", "tok_emb.weight is missing"],
    ),
    "extra": (
        lambda path: save(make_state() | {"lm.bias": torch.zeros(3)}, path),
        ["1 tensors do not fit", "lm.bias has no place"],
    ),
    "misshapen": (
        lambda path: save(make_state() | {"pos_emb.weight": torch.zeros(9, 32)}, path),
        ["pos_emb.weight is (9, 32) instead of (128, 32)"],
    ),
    "more layers": (lambda path: save(make_state(n_layers=3), path), ["trf_blocks.2"]),
    "NaN": (
        lambda path: save(make_state() | {"final_norm.scale": torch.full((32,), math.nan)}, path),
        ["final_norm.scale holds NaN"],
    ),
    "no tensors": (lambda path: save({}, path), ["is missing"]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    make, says = BAD_WEIGHTS[name]
    make(path)
    config = write_config(tmp_path, model__weights=str(path))
    refuse(capsys, tmp_path, ["fit", "--config", config], path.name, *says)


def test_another_sizes_weights_are_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told from names and shapes alone; a real file of that size would take a minute here."""
    state = {f"h.{n}.ln_1.weight": torch.zeros(1024) for n in range(24)}
    save(state | {"wte.weight": torch.zeros(50, 1024)}, tmp_path / "medium.safetensors")
    config = write_config(tmp_path, model__weights=str(tmp_path / "medium.safetensors"))
    refuse(capsys, tmp_path, ["fit", "--config", config], "looks like gpt2-medium (355M)")


def test_weights_that_are_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, says in (
        ("weights.bin", ".safetensors, .pth"),
        ("folder", "model.safetensors"),
        ("numbers.pth", "no state dict"),
        ("list.pth", "no state dict"),
    ):
        config = write_config(tmp_path, model__weights=str(tmp_path / name))
        refuse(capsys, tmp_path, ["fit", "--config", config], name, says)


def test_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that load, but are no checkpoint of a run."""
    state = {f"model.{name}": tensor for name, tensor in make_state().items()}
    bare = {"state_dict": state, "epoch": 0, "global_step": 0}
    style: dict[str, Any] = {"prompt_style": "alpaca", "header_in_prompt": True}
    wide = {"architecture": TINY | {"emb_dim": 64}}
    contents: dict[str, Any] = {
        "list": [1],
        "no state": {"epoch": 1},
        "nothing else": {"state_dict": state},
        "no loops": bare,
        "odd hyperparameters": bare | {"hyper_parameters": [3]},
        "empty hyperparameters": bare | {"hyper_parameters": {}},
        "text hyperparameters": bare | {"hyper_parameters": {"architecture": "x", **style}},
        "another width": bare | {"hyper_parameters": wide | style},
    }
    config = write_config(tmp_path, generation__max_new_tokens=2)
    path = tmp_path / "made.ckpt"
    for content in contents.values():
        torch.save(content, path)
        refuse(capsys, tmp_path, ["fit", "--config", config, "--ckpt_path", path], "ckpt_path")
    for name in ("list", "no state", "odd hyperparameters", "empty hyperparameters"):
        torch.save(contents[name], path)
        refuse(capsys, tmp_path, ["predict", "--ckpt_path", path], "ckpt_path")


def test_a_checkpoint_may_stand_for_weights(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in make_state().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "step.ckpt")
    config = write_config(
        tmp_path, model__weights=str(tmp_path / "step.ckpt"), trainer__max_steps=1
    )
    assert run("fit", "--config", config) == 0


def test_a_run_that_began_is_not_taken_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the folder that a refused run made goes; an older run beside it stays."""
    config = write_config(tmp_path, trainer__max_steps=1)
    assert run("fit", "--config", config) == 0
    bad = ["--data.path", "/nowhere/x.json"]
    refuse(capsys, tmp_path, ["fit", "--config", config, *bad])
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    refuse(capsys, tmp_path, ["fit", "--config", config, "--ckpt_path", checkpoint, *bad])


def test_one_row_for_two_devices() -> None:
    """The loader of each rank refuses; the test below is the same through two real processes."""
    with pytest.raises(InputError, match=r"data.batch_size: 1 on 2 device\(s\)"):
        TrainLoader(
            [Row([1, 2])],
            collate,
            num_targets=np.ones(1),
            num_tokens=np.ones(1),
            batch_size=1,
            seed=0,
            world_size=2,
        )


@pytest.mark.slow
def test_one_row_on_two_devices(tmp_path: Path) -> None:
    paths = {
        f"data__{name}": str(write_data(tmp_path / f"{name}.json", 1))
        for name in ("path", "val_path", "test_path")
    }
    config = write_config(
        tmp_path, trainer__devices=2, trainer__strategy="ddp", data__batch_size=1, **paths
    )
    code, _, err = run_apart("fit", "--config", config, cwd=tmp_path)
    assert code == 2, err
    assert "error: data.batch_size: 1 on 2 device(s)" in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


# --- anything at all -----------------------------------------------------------------------------
KEYS = {
    "data": "path val_path batch_size max_length fractions prompt_style field_names overlong "
    "header_in_prompt mask_prompt num_workers group_by_length",
    "model": "architecture optimizer lr_scheduler generation",
    "trainer": "max_epochs max_steps devices num_nodes precision accumulate_grad_batches callbacks "
    "accelerator strategy limit_train_batches logger",
    "generation": "max_new_tokens temperature top_k top_p batch_size seed",
    "run": "dir name",
    "checkpoints": "every_n_steps keep_last keep_best",
    "loss_curve": "every_n_steps num_batches",
    "samples": "indices",
}
INNER = "class_path init_args emb_dim n_heads drop_rate lr instruction input header name args"
NAMES = st.sampled_from([*INNER.split(), "", "__class__"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["torch.optim.SGD", "os.system", "alpaca", "gpt2-small", "..", "[", "{", "1e9"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
SECTIONS = {
    section: st.dictionaries(st.sampled_from(keys.split()), VALUES, max_size=2)
    for section, keys in KEYS.items()
}
CONFIGS = st.fixed_dictionaries(
    {}, optional={**SECTIONS, "seed_everything": VALUES, "ckpt_path": VALUES, "other": VALUES}
)


@pytest.mark.process
@pytest.mark.parametrize(("command", "examples"), [("inspect", 60), ("plan", 20)])
def test_no_config_gives_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, examples: int
) -> None:
    base = write_config(tmp_path)
    before = set(tmp_path.rglob("*"))
    overlay = tmp_path / "overlay.yaml"

    @settings(max_examples=examples)
    @example({"data": None})
    @example({"trainer": 3})
    @example({"model": {"architecture": {"emb_dim": 2**40}}})
    @given(CONFIGS)
    def check(config: dict[str, Any]) -> None:
        overlay.write_text(yaml.safe_dump(config))
        probe = ["--probe_steps=0", "--memory_gb=64"] if command == "plan" else []
        code = run(command, "--config", base, "--config", overlay, *probe)
        err = capsys.readouterr().err
        assert code in (0, 2, 3, 4)
        assert [line.startswith("error: ") for line in err.splitlines()] == [True] * (code != 0)

    check()
    assert set(tmp_path.rglob("*")) == before | {overlay}


@given(st.binary(max_size=200), st.sampled_from([".safetensors", ".pth", ".ckpt"]))
@example(b"PK\x03\x04" + b"\0" * 60, ".pth")
@example(b"\x80\x02}q\x00.", ".pth")
def test_no_bytes_are_weights(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        tensors = read_tensors(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most examples are refused, some are empty
    else:
        assert tensors == {}
