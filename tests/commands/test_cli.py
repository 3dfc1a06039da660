"""The command line as a person meets it: help, configs, predict, chat, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sft.commands.cli import COMMANDS, TRAINING
from lightning_sft.common.arguments import find_shipped, resolve_configs
from lightning_sft.common.errors import InputError
from lightning_sft.common.files import shipped_folder
from support.runs import newest_checkpoint, run, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run in it."""
    folder = tmp_path_factory.mktemp("trained")
    assert run("fit", "--config", write_config(folder, trainer__max_epochs=1)) == 0
    return folder


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_help_lists_every_command_and_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    page = capsys.readouterr().out
    for name in [*TRAINING, *COMMANDS]:
        assert f"\n  {name} " in page
    for path in shipped_folder().glob("*.yaml"):
        assert path.name in page


def test_what_needs_no_torch_does_not_import_it(tmp_path: Path) -> None:
    code = (
        "import sys; from lightning_sft.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    others = (["prepare", "--help"], ["synthesize", "--help"])
    for arguments in (
        ["--help"],
        ["score", "--help"],
        ["report", "--help"],
        ["compare", "--help"],
        *others,
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert result.stdout.splitlines()[-1] == "False", arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "unknown command 'fti' (did you mean 'fit'?)"),
        (["fit", "--config", "gpt2-medum.yaml"], "did you mean 'gpt2-medium.yaml'?"),
        (["fit", "--config", "https://a.example/x.yaml"], "is a URL"),
        (["fit", "--data.bach_size", "3"], "did you mean 'data.batch_size'?"),
        (["fit", "--data.batch_size", "many"], "data.batch_size"),
        (["predict", "--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt is not a file"),
        (["fit", "--ckpt_path", "https://a.example/x.ckpt"], "URL is not allowed"),
    ],
)
def test_nonsense_gets_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in one_error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run("fit", "--config", "nowhere.yaml", "--debug")


def test_a_bare_config_name_is_looked_for_here_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_folder() / "phi3.yaml"
    assert find_shipped("phi3.yaml", "config") == shipped
    Path("phi3.yaml").write_text("data: {}")
    assert find_shipped("phi3.yaml", "config") == Path("phi3.yaml")
    assert resolve_configs(["--config=gpt2-small.yaml", "-c", "phi3.yaml"]) == [
        f"--config={shipped_folder() / 'gpt2-small.yaml'}",
        "-c",
        "phi3.yaml",
    ]


@pytest.mark.parametrize("source", ["checkpoint", "pth"])
def test_predict_writes_the_chapters_file(trained: Path, source: str) -> None:
    folder = trained / "runs/tiny/version_0"
    path = newest_checkpoint(folder) if source == "checkpoint" else folder / "gpt2-2M-sft.pth"
    target = folder / "instruction-data-with-response.json"
    target.unlink(missing_ok=True)
    # No --config: the checkpoint's run has one. The weights alone start a folder of their own.
    assert run("predict", "--ckpt_path", path) == 0
    if source == "pth":
        target = trained / "runs/tiny/version_1/instruction-data-with-response.json"
    records = json.loads(target.read_text())
    data = json.loads((trained / "data.json").read_text())[34:38]  # 40 entries: 34, 4, 2
    assert [{k: r[k] for k in ("instruction", "input", "output")} for r in records] == data
    assert all(set(r) == {"instruction", "input", "output", "model_response"} for r in records)
    assert target.read_text() == json.dumps(records, indent=4)
    assert not list(target.parent.glob("responses.part-*"))


def test_chat_answers_lines_from_a_pipe(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    folder = trained / "runs/tiny/version_0"
    for path in (newest_checkpoint(folder), folder / "gpt2-2M-sft.pth"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Say the number 3\n\nSay the number 4\n"))
        assert run("chat", "--ckpt_path", path, "--generation.max_new_tokens=5") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0].count("\n\n") == 2


def test_validate_and_test_print_their_losses(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = newest_checkpoint(trained / "runs/tiny/version_0")
    before = sorted(trained.rglob("*"))
    assert run("validate", "--ckpt_path", path) == 0
    assert "val_loss" in capsys.readouterr().out
    assert run("test", "--ckpt_path", path) == 0
    assert "test_perplexity" in capsys.readouterr().out
    assert sorted(trained.rglob("*")) == before


def test_another_architecture_than_the_checkpoints_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = newest_checkpoint(trained / "runs/tiny/version_0")
    config = write_config(tmp_path, model__architecture__n_layers=3)
    assert run("predict", "--config", config, "--ckpt_path", path) == 2
    assert "has n_layers 2, the configuration has 3" in one_error_line(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__batch_size": 2}, "batch_size was 4, is 2"),
        ({"seed_everything": 7}, "seed was 123, is 7"),
        ({"trainer__accumulate_grad_batches": 2}, "accumulate_grad_batches was 1, is 2"),
        ({"data__mask_prompt": True}, "mask_prompt was False, is True"),
        ({"data__prompt_style": "phi3"}, "data was"),
    ],
    ids=str,
)
def test_resume_with_other_batches_names_what_differs(
    trained: Path,
    tmp_path: Path,
    change: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = newest_checkpoint(trained / "runs/tiny/version_0")
    config = write_config(tmp_path, data__path=str(trained / "data.json"), **change)
    assert run("fit", "--config", config, "--ckpt_path", path, "--trainer.max_epochs=2") == 2
    assert message in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}}
    config = write_config(tmp_path, model__optimizer=optimizer, loss_curve__every_n_steps=0)
    assert run("fit", "--config", config) == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert "train_loss is nan at step" in message
    assert "training entries [" in message


def test_a_folder_that_cannot_be_made_is_found_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not even root can make a folder there.
    assert run("fit", "--config", write_config(tmp_path), "--run.dir=/proc/runs") == 3
    assert "/proc/runs" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, model__weights="nowhere.pth")
    before = set(tmp_path.rglob("*"))
    assert run("fit", "--config", config) == 2
    assert set(tmp_path.rglob("*")) == before


def test_a_refused_resume_changes_nothing(trained: Path) -> None:
    folder = trained / "runs/tiny/version_0"
    path = newest_checkpoint(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert run("fit", "--ckpt_path", path, "--data.batch_size=2", "--trainer.max_epochs=2") == 2
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    events = {p for p in after.keys() - before.keys() if "tfevents" in p.name}
    assert after.keys() - events == before.keys()
    assert all(after[p] == before[p] for p in before)


# --- a user's own classes ---

MINE = "from lightning.pytorch.callbacks import Callback\nclass Mine(Callback):\n    pass\n"


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config that names a class of a package beside it, in the working directory."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LIGHTNING_SFT_ALLOW_IMPORT", "")  # set back to nothing at the end
    callbacks = [{"class_path": "my_package.Mine"}]
    return write_config(
        tmp_path,
        trainer__callbacks=callbacks,
        trainer__max_steps=1,
        loss_curve__every_n_steps=0,
        samples__indices=[],
    )


def test_a_users_class_is_refused_by_default(
    own_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "--config", own_package) == 2
    assert "if you trust it: --allow_import my_package" in one_error_line(capsys)
    assert run("fit", "--config", own_package, "--allow_import=my_package.nothing") == 2
    assert run("fit", "--config", own_package, "--allow_import=my-package") == 2
    assert "'my-package' is not a module's name" in capsys.readouterr().err
    assert "my_package" not in sys.modules


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_users_class_can_be_allowed(
    way: str, own_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = ["--allow_import", "other", "--allow_import=my_package"] if way == "option" else []
    if way == "environment":
        monkeypatch.setenv("LIGHTNING_SFT_ALLOW_IMPORT", "other, my_package")
    assert run("fit", "--config", own_package, *option) == 0
    del sys.modules["my_package"]


def test_a_config_cannot_allow_itself(
    own_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = own_package.read_text()
    own_package.write_text(f"allow_import: my_package\n{text}")
    assert run("fit", "--config", own_package) == 2
    assert "allow_import" in one_error_line(capsys)


# --- a run folder where a checkpoint is wanted ---


def test_a_run_folder_stands_for_its_checkpoint(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained / "runs/tiny/version_0"
    assert run("validate", "--ckpt_path", newest_checkpoint(folder)) == 0
    said = capsys.readouterr().out
    assert run("validate", "--ckpt_path", folder) == 0
    assert capsys.readouterr().out == said
    config = trained / "tiny.yaml"
    assert run("validate", "--config", config, f"--ckpt_path={folder}") == 0
    assert run("validate", "--ckpt_path", folder.parent) == 2
    assert "holds runs; name one, such as" in one_error_line(capsys)


# --- what Lightning would answer with a traceback ---


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.val_check_interval=1000", "val_check_interval"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval: 0 is not allowed"),
        ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch: 0 is not allow"),
        (f"--trainer.devices={10**25}", "trainer.devices: a number over"),
        (f"--generation.max_new_tokens={10**400}", "generation.max_new_tokens: a number over"),
        (
            f"--model.architecture.context_length={10**25}",
            "architecture.context_length: a num",
        ),
        (
            f"--trainer.accumulate_grad_batches={10**25}",
            "accumulate_grad_batches: a number",
        ),
        ("--run.dir=~nosuchuser/runs", "run.dir: ~nosuchuser/runs: there is no such user"),
        ("--ckpt_path=~nosuchuser/a.ckpt", "ckpt_path: ~nosuchuser/a.ckpt: there is no such user"),
        ("--trainer.logger=WandbLogger", "wandb"),
    ],
)
def test_numbers_that_no_run_could_have(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--loss_curve.every_n_steps=0", "--samples.indices=[]"]
    config = write_config(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert run("fit", "--config", config, *short, option) == 2
    assert message in one_error_line(capsys)
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "runs"}
