"""Every shipped config and every documented pair of them is parsed and built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lightning_sft.common.files import shipped_folder
from support.runs import run

CONFIGS = sorted(path.name for path in shipped_folder().glob("*.yaml"))
WHOLE = [name for name in CONFIGS if name.startswith(("gpt2-", "quickstart", "smollm2-"))]
OVERLAYS = sorted(set(CONFIGS) - set(WHOLE))


def printed(capsys: pytest.CaptureFixture[str], *names: str) -> dict:
    """The configuration that these files make together."""
    arguments = [argument for name in names for argument in ("--config", name)]
    with pytest.raises(SystemExit) as exit_info:
        run("fit", *arguments, "--print_config")
    assert exit_info.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", WHOLE)
def test_a_config_parses_and_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, name)
    text = (shipped_folder() / name).read_text()
    assert text.startswith("# ")
    assert f"python -m lightning_sft fit --config {name}" in text
    assert config["seed_everything"] == 123


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_changes_what_it_holds_and_nothing_else(
    overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, both = printed(capsys, "gpt2-medium.yaml"), printed(capsys, "gpt2-medium.yaml", overlay)
    held = yaml.safe_load((shipped_folder() / overlay).read_text())
    for group, settings in held.items():
        for key, value in settings.items():
            assert both[group].pop(key) == value
            base[group].pop(key)
    both["run"], base["run"] = {}, {}  # both are named after their first config
    assert both == base


def test_three_overlays_compose(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "gpt2-small.yaml", "phi3.yaml", "mask-prompt.yaml", "bf16.yaml")
    assert config["data"]["prompt_style"] == "phi3"
    assert config["data"]["mask_prompt"] is True
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["model"]["architecture"] == "gpt2-small"


def test_the_medium_config_is_the_chapters_run(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "gpt2-medium.yaml")
    assert config["trainer"]["max_epochs"] == 2
    assert (config["data"]["batch_size"], config["data"]["max_length"]) == (8, 1024)
    optimizer = config["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"]) == (5e-5, 0.1)


def test_every_command_in_the_readme_names_shipped_configs() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    named = set(re.findall(r"--config ([\w.-]+\.yaml)", text))
    assert named <= set(CONFIGS)
    assert {"gpt2-medium.yaml", "quickstart.yaml"} <= named
