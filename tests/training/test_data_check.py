"""What `fit` says and refuses of its data, at the command line and with a plain `Trainer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from lightning_sft import InstructionDataModule, SFTModule
from lightning_sft.commands.training import use_checkpoint_config
from lightning_sft.common.errors import InputError
from lightning_sft.data.prompts import get_style
from lightning_sft.data.tokenizer import Tokenizer
from lightning_sft.models.lora import LoRAConfig
from lightning_sft.models.ready import load_for_answers
from support.runs import TINY, newest_checkpoint, run, write_config, write_data

OLD_PHI3 = {
    "name": "phi3",
    "instruction": "<|user|>\n{instruction}",
    "input": "\n{input}",
    "header": "\n\n<|assistant|>\n",
    "end": "",
}


def meet(
    tmp_path: Path,
    stage: str,
    module: dict[str, Any],
    data: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Bring a module and a data module together in a plain trainer, for one batch."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=1,
        limit_predict_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    settings = {"architecture": TINY, "weights": None} | module
    path = str(write_data(tmp_path / "data.json"))
    loaded = InstructionDataModule(path, **{"batch_size": 4, "max_length": 128} | data)
    loaded.tokenizer = tokenizer or loaded.tokenizer
    getattr(trainer, stage)(SFTModule(**settings), datamodule=loaded)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_other_prompt_styles_are_refused(tmp_path: Path, stage: str) -> None:
    with pytest.raises(InputError, match=r"^prompt_style: instruction is 'Below") as error:
        meet(tmp_path, stage, {"prompt_style": "phi3"}, {"prompt_style": "alpaca"})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^prompt_style: header_in_prompt is False in the data"):
        meet(tmp_path, stage, {}, {"header_in_prompt": False})


def test_the_same_style_under_another_name_fits(tmp_path: Path) -> None:
    texts = {"instruction": "{instruction}", "input": "+{input}", "header": ">"}
    meet(tmp_path, "fit", {"prompt_style": texts | {"name": "a"}}, {"prompt_style": texts})


def test_another_tokenizer_is_refused(tmp_path: Path, char_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"encoded with characters, the model's is gpt2"):
        meet(tmp_path, "fit", {}, {"max_length": 999}, char_tokenizer)


@pytest.mark.parametrize(
    "module",
    [
        {"architecture": TINY | {"drop_rate": 0.1}},
        {"lora": LoRAConfig(rank=2, alpha=2, dropout=0.1)},
    ],
    ids=["model", "adapters"],
)
def test_shared_prefixes_with_dropout_are_refused(tmp_path: Path, module: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^data.share_prefix: .* would share its dropout of 0.1"):
        meet(tmp_path, "fit", module, {"share_prefix": True})
    meet(tmp_path, "fit", module, {"padding_free": True})
    meet(tmp_path, "validate", module, {"share_prefix": True})  # nothing is dropped there


def test_fit_refuses_data_that_teaches_no_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, data__max_length=20)
    assert run("fit", "--config", config) == 2
    err = capsys.readouterr().err
    assert (
        "error: train split: 34 of 34 entries are cut to max_length 20 before their answer" in err
    )
    assert not (tmp_path / "runs").exists()


def test_fit_opens_with_its_data_and_predict_with_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, trainer__max_steps=1, loss_curve__every_n_steps=0)
    assert run("fit", "--config", config) == 0
    lines = capsys.readouterr().out.splitlines()
    opening = [line for line in lines if line.startswith(("data: ", "tokens: ", "rows: "))]
    assert len(opening) == 3
    assert opening[0] == "data: 34 training, 2 validation and 4 test entries"
    note = "note: no checkpoint is loaded; the answers are those of the starting weights"
    assert run("predict", "--config", config) == 0
    assert f"{note} (model.weights: none, so they are random)" in capsys.readouterr().out
    assert run("predict", "--config", config, "--ckpt_path", "last") == 0
    assert note not in capsys.readouterr().out


def test_a_run_of_the_old_phi3_goes_on_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name `phi3` stood for other texts in version 0.1.0; its checkpoints hold them."""
    settings = {"data__prompt_style": OLD_PHI3, "loss_curve__every_n_steps": 0}
    config = write_config(tmp_path, trainer__max_epochs=1, **settings)
    assert run("fit", "--config", config) == 0
    folder = tmp_path / "runs/tiny/version_0"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved["data"]["prompt_style"] = "phi3"
    del saved["data"]["empty_output"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    (weights,) = folder.glob("*.pth")
    assert load_for_answers(str(weights))[1] == get_style(OLD_PHI3)
    capsys.readouterr()
    # Refused if the rows were others than those that it was trained on.
    resume = ["--ckpt_path", newest_checkpoint(folder), "--trainer.max_epochs=2"]
    assert run("fit", *resume) == 0
    assert run("predict", "--ckpt_path", newest_checkpoint(folder)) == 0
    assert "note: prompt_style" not in capsys.readouterr().out
    (said,) = use_checkpoint_config(["--ckpt_path", str(weights)])[1:2]
    assert get_style(json.loads(said.removeprefix("--data.prompt_style="))) == get_style(OLD_PHI3)
