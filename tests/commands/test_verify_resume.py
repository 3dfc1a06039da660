"""The command that proves on a user's configuration that a killed run goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.runs import run, run_apart, write_config

# Imported by every child before its command: the dropout of a step no longer has its own seed, so
# that a resumed run draws other numbers than an undisturbed one.
SABOTAGE = """
import lightning_sft.training.module
lightning_sft.training.module.SFTModule.on_train_batch_start = lambda *args: None
"""


def write_dropout_config(folder: Path) -> Path:
    return write_config(folder, model__architecture__drop_rate=0.2, data__num_workers=1)


def test_a_sound_configuration_passes(tmp_path: Path) -> None:
    config = write_dropout_config(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run_apart("verify-resume", "--config", config, cwd=tmp_path)
    assert code == 0, err
    assert out.count("killed after step") == 3
    assert "going on from step-000002" in out
    assert "bit for bit" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_one_that_does_not_go_on_exactly_is_found_out(tmp_path: Path) -> None:
    """The negative control."""
    config = write_dropout_config(tmp_path)
    (tmp_path / "sabotage").mkdir()
    (tmp_path / "sabotage" / "sitecustomize.py").write_text(SABOTAGE)
    code, _, err = run_apart(
        "verify-resume", "--config", config, cwd=tmp_path, PYTHONPATH=str(tmp_path / "sabotage")
    )
    assert code == 4
    assert "error: verify-resume: the resumed run differs in state_dict; optimizer_states;" in err


@pytest.mark.usefixtures("forked_commands")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data.batch_sizes=3"], "did you mean 'data.batch_size'"),
        (["--data.batch_size=1000"], "needs at least 1000 training entries"),
        (["--ckpt_path=last"], "ckpt_path is not allowed"),
    ],
)
def test_what_fit_refuses_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert run("verify-resume", "--config", write_config(tmp_path), *options) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
