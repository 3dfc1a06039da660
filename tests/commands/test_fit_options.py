"""The help page and the check of names agree with the parser that comes after them."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_sft.commands.cli import COMMANDS, FIT_LIKE, TRAINING
from lightning_sft.commands.fit_options import (
    OF_COMMAND,
    PLAIN,
    SHOWN,
    TAKERS,
    check_options,
    known_options,
    option_page,
)
from lightning_sft.common.arguments import PROGRAM
from lightning_sft.common.errors import InputError
from support.runs import run, write_config


@pytest.mark.parametrize("command", TRAINING)
def test_every_option_of_the_parser_is_known(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(command, "--help=all")
    assert caught.value.code == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: {PROGRAM} {command} ")
    found = set(re.findall(r"--([a-z]\w*(?:\.\w+)*)", page))
    assert len(found) > 100
    for name in found - {"config"}:
        check_options(command, [f"--{name}=1"])
    shown = {name for options in SHOWN.values() for name in options} - {"allow_import"}
    assert shown <= found


def test_every_section_is_read_off_the_source() -> None:
    known = known_options()
    assert all(known[section] for section in TAKERS)
    assert {"ckpt_path", "weights_only", "return_predictions", "verbose"} <= set(known[""])
    assert known["data"]["batch_size"] == "8"


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=val_loss",
        "--model.optimizer.init_args.lr=1",
        "--model.architecture.emb_dim",
        "--data=data.yaml",
        "--trainer.help",
        *(f"--{name}" for name in PLAIN if name != "config"),
    ],
)
def test_what_the_parser_takes_is_let_through(option: str) -> None:
    check_options("fit", [option, "3"])


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--data.bach_size", "data.batch_size"),
        ("--trainer.max_epoch", "trainer.max_epochs"),  # no abbreviations
        ("--batch_size", "data.batch_size"),
        ("--ckpt", "ckpt_path"),
        ("--trainer.callback+", "trainer.callbacks"),
    ],
)
def test_a_misspelt_option_gets_the_nearest(option: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        check_options("fit", [f"{option}=3"])


def test_a_misspelt_key_names_its_file(tmp_path: Path) -> None:
    config = write_config(tmp_path, data__bach_size=3)
    with pytest.raises(InputError, match=r"tiny.yaml: unknown key 'data.bach_size' \(did you"):
        check_options("fit", ["--config", str(config)])


@pytest.mark.parametrize("command", [*TRAINING, *FIT_LIKE])
def test_the_page_leads_with_what_is_usual(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: {PROGRAM} {command} ")
    assert len(lines) <= 75
    assert max(map(len, lines)) <= 100
    assert "  --data.batch_size                 rows a micro-batch on one device [8]" in lines
    for name in OF_COMMAND.get(command, {}):
        assert any(line.startswith(f"  --{name} ") for line in lines)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in FIT_LIKE])
def test_every_page_has_the_same_program_name(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        run(command, "--help")
    assert capsys.readouterr().out.lower().startswith(f"usage: {PROGRAM} {command}")


def test_a_misspelt_option_is_answered_before_torch_is_imported() -> None:
    code = (
        "import sys; from lightning_sft.__main__ import main\n"
        "main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    begun = time.monotonic()
    command = [sys.executable, "-c", code, "fit", "quickstart.yaml", "--data.bach_size=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
    assert "did you mean 'data.batch_size'?" in result.stderr
    assert time.monotonic() - begun < 20  # a second on a machine left alone


def test_a_config_may_come_without_its_option(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert option_page("fit", "").count("CONFIG.yaml") == 1
    short = ["--trainer.max_steps=1", "--loss_curve.every_n_steps=0", "--samples.indices=[]"]
    assert run("fit", config, *short) == 0
    assert (tmp_path / "runs/tiny/version_0/config.yaml").exists()
