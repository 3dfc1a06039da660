"""Every shipped config and every documented pair of them is parsed and built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lightning_sft.common import hub
from lightning_sft.common.files import shipped_folder
from lightning_sft.common.repositories import REPOSITORIES
from lightning_sft.models.registry import ARCHITECTURES
from support.runs import run

CONFIGS = sorted(path.name for path in shipped_folder().glob("*.yaml"))
WHOLE = [
    name
    for name in CONFIGS
    if name.startswith(("gpt2-", "quickstart", "smollm2-", "llama3", "qwen"))
]
OVERLAYS = sorted(set(CONFIGS) - set(WHOLE))
FROM_HUGGING_FACE = [name for name in WHOLE if not name.startswith(("gpt2-", "quickstart"))]
STYLE_OF = {"smollm2": "chatml", "llama3.2": "llama3", "qwen2.5": "chatml", "qwen3": "qwen3"}
MEMORY = re.compile(r"takes ([\d.]+) GB on the chapter's data, and ([\d.]+) GB with lora")


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


def test_there_is_a_config_for_every_size() -> None:
    sizes = {name for name in ARCHITECTURES if not name.endswith("-instruct")}
    assert sizes <= {name.removesuffix(".yaml") for name in WHOLE}


@pytest.mark.parametrize("name", FROM_HUGGING_FACE)
def test_a_models_config_fits_the_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Architecture, weights, style and tokenizer, and a header that names both kinds."""
    config, text = printed(capsys, name), (shipped_folder() / name).read_text()
    size = name.removesuffix(".yaml")
    assert config["model"]["architecture"] == f"{size}-instruct"
    weights = config["model"]["weights"]
    assert weights == f"{size}-instruct" or weights.lower().startswith(f"{size}-instruct.")
    assert config["model"]["tokenizer"] is None  # it comes with the weights
    assert config["data"]["prompt_style"] == STYLE_OF[size.partition("-")[0]]
    assert config["data"]["header_in_prompt"] is True
    for kind in (size, f"{size}-instruct"):
        assert re.search(rf"{re.escape(REPOSITORIES[kind])}\b(?!-)", text), kind
    licence = "Llama 3.2 Community License" if size.startswith("llama") else "Apache-2.0"
    assert f"# Licence {licence}" in text


def test_the_page_of_models_has_the_headers_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for name in FROM_HUGGING_FACE:
        said = MEMORY.search((shipped_folder() / name).read_text())
        assert said is not None
        size = re.escape(name.removesuffix(".yaml"))
        row = rf"\| `{size}` \([\w-]+\) \| {said[1]} \| {said[2]} \|"
        assert re.search(row, page), name


@pytest.mark.parametrize("overlay", [[], ["lora.yaml"]], ids=["full", "lora"])
@pytest.mark.parametrize("name", FROM_HUGGING_FACE)
def test_the_memory_in_a_header_is_plans(
    name: str,
    overlay: list[str],
    book_data_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # GPT-2's tokenizer counts, whatever models this machine has.
    monkeypatch.setattr(hub, "find_cached", lambda repository, weights=True: None)
    said = MEMORY.search((shipped_folder() / name).read_text())
    assert said is not None
    options = ["--data.path", book_data_path, "--memory_gb", 999, "--probe_steps", 0]
    configs = [argument for file in (name, *overlay) for argument in ("--config", file)]
    assert run("plan", *configs, *options) == 0
    together = re.search(r"together +([\d.]+) of", capsys.readouterr().out)
    assert together is not None
    assert f"{float(together[1]):.1f}" == said[2 if overlay else 1]


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
