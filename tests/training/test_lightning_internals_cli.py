"""What the command line needs of Lightning's private side is still there, and does what it did."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from pathlib import Path

import jsonargparse._common as common
import lightning.pytorch
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_sft.training import lightning_internals as internals
from lightning_sft.training.lightning_internals import OpenCLI, command_line, quieten


def test_lightning_calls_the_hooks_in_this_order() -> None:
    source = inspect.getsource(LightningCLI.__init__)
    names = ("parse_arguments(", "_parse_ckpt_path(", "_set_seed(", "instantiate_classes(")
    places = [source.index(f"self.{name}") for name in names]
    assert places == sorted(places)


def test_options_parsed_and_made_are_found() -> None:
    class Seedless(OpenCLI):
        def set_seed(self) -> None:
            pass

        def instantiate_trainer(self, **kwargs: object) -> None:  # type: ignore[override]
            return None

    with command_line(["--trainer.max_epochs=3", "--seed_everything=5"]):
        from lightning_sft import InstructionDataModule, SFTModule

        before = torch.initial_seed()
        cli = Seedless(SFTModule, InstructionDataModule, run=False, save_config_callback=None)
    assert torch.initial_seed() == before
    assert cli.setting("seed_everything") == 5
    assert cli.setting("trainer").max_epochs == 3
    assert isinstance(cli.built("data"), InstructionDataModule)
    assert cli.option_parser() is cli.parser


def test_the_command_line_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "before"])
    with command_line(["fit", "--a=1"]):
        assert sys.argv == ["program", "fit", "--a=1"]
    assert sys.argv == ["program", "before"]


def test_what_was_allowed_once_is_not_allowed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = dict(common.parsing_settings["import_path_verdicts"])
    monkeypatch.setitem(common.parsing_settings, "import_path_verdicts", verdicts)
    monkeypatch.setattr(internals, "_allowed_once", set())
    internals.restrict_imports(["lightning_sft", "theirs.callbacks"])
    common.check_import_path("theirs.callbacks.One")
    internals.restrict_imports(["lightning_sft"])
    common.check_import_path("lightning_sft.SFTModule")
    for path in ("theirs.callbacks.One", "os.system", "theirs.other"):
        with pytest.raises(Exception, match="is not allowed"):
            common.check_import_path(path)


def test_what_is_silenced_is_still_said_in_these_words() -> None:
    folder = Path(lightning.pytorch.__file__).parent
    said = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    said += Path(torch.utils._pytree.__file__).read_text(encoding="utf-8")
    said = said.replace("(treespec, LeafSpec)", ".treespec, LeafSpec.")  # `.` is any character
    for text in (*internals.USELESS_LOGS, *internals.USELESS_WARNINGS):
        assert text in said, text


def test_only_that_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    quieten()
    quieten()
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    assert log.filters.count(internals._is_useful) == 1
    with caplog.at_level(logging.INFO, log.name):
        log.info("💡 Tip: buy something")
        log.info("TPU available: False")
        log.info("GPU available: False. Tip: none")
    assert caplog.messages == ["GPU available: False. Tip: none"]
    with warnings.catch_warnings(record=True) as caught:
        quieten()
        warnings.warn("The 'x' does not have many workers which may be a bottleneck", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(one.message) for one in caught] == ["something else"]


def test_an_interval_above_the_epoch_is_known_as_misuse() -> None:
    source = (Path(lightning.pytorch.__file__).parent / "loops/fit_loop.py").read_text("utf-8")
    assert "must be less than or equal" in source
    message = "`val_check_interval` (9) must be less than or equal to the number of the training b"
    assert internals.is_misuse(ValueError(message))
    assert not internals.is_misuse(ValueError("too many values to unpack"))


def test_a_lost_peer_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = RuntimeError("[gloo/transport/tcp] Connection closed by peer [127.0.0.1]:4711")
    assert internals.lost_peer(gone) is None  # no ranks, so no peer
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert internals.lost_peer(gone) == str(gone)
    assert internals.lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
