"""`plan` for the Llama family: estimates against measured memory, before the weights are here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft.common import hub
from lightning_sft.data.counting import BatchShape
from lightning_sft.data.find_tokenizer import read_tokenizer
from lightning_sft.models.lora import LoRAConfig
from lightning_sft.models.registry import ARCHITECTURES
from lightning_sft.planning.footprint import count_parameters, estimate_memory
from lightning_sft.planning.stand_in import PlannedModule, StandInTokenizer
from support.activations import make_batch, measure_activations, measure_peak
from support.runs import run, write_config
from support.tiny_run import write_hf

# Of each model what is its own: groups, width of a head, biases, norms of queries and keys, head.
SIZE = {"family": "llama", "vocab_size": 2048, "context_length": 256, "emb_dim": 128}
SIZE |= {"n_heads": 4, "n_layers": 6, "hidden_dim": 352, "n_kv_groups": 2}
ARCHITECTURES_HERE: dict[str, dict[str, Any]] = {
    "smollm2": SIZE,
    "qwen2.5": SIZE | {"n_kv_groups": 1, "qkv_bias": True},
    "qwen3": SIZE | {"head_dim": 64, "qk_norm": True},
    "llama-untied": SIZE | {"hidden_dim": 512, "tie_embeddings": False},
}
EOS = 511
LORA: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"rank": 4},
    "lora-attention": {"rank": 4, "targets": ("W_query", "W_value")},
    "lora-upper": {"rank": 4, "targets": ("trf_blocks.[345].*",)},
    "lora-dropout": {"rank": 4, "dropout": 0.1},
}


@pytest.fixture(autouse=True)
def empty_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever models this machine has."""
    monkeypatch.setattr(hub, "find_cached", lambda repository, weights=True: None)


def make_module(
    architecture: dict[str, Any], lora: dict[str, Any] | None = None, **options: Any
) -> PlannedModule:
    adapters = LoRAConfig(**lora) if lora else None
    module = PlannedModule(architecture, weights=None, lora=adapters, **options)
    module.configure_model()
    return module.train()


def estimate_kept(module: PlannedModule, shape: BatchShape, precision: str) -> float:
    """Activations, and autocast's copies of the blocks' weights, which a plan counts as weights."""
    layers = [m for m in module.network.trf_blocks.modules() if isinstance(m, torch.nn.Linear)]
    copies = 2 * sum(layer.weight.numel() for layer in layers) if "mixed" in precision else 0
    return estimate_memory(module, shape, precision).activations + copies


@pytest.mark.parametrize("layout", ["padded", "padding_free", "share_prefix"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ARCHITECTURES_HERE)
def test_activations_are_what_autograd_keeps(name: str, precision: str, layout: str) -> None:
    module = make_module(ARCHITECTURES_HERE[name])
    batch, shape = make_batch(layout, EOS)
    measured = measure_activations(module, batch, mixed=precision == "bf16-mixed")
    assert estimate_kept(module, shape, precision) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("layout", ["padded", "share_prefix"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("lora", [name for name in LORA if name != "full"])
def test_adapters_keep_what_they_need(lora: str, precision: str, layout: str) -> None:
    """A frozen layer without an adapter does not ask for its input again."""
    module = make_module(ARCHITECTURES_HERE["qwen3"], LORA[lora])
    batch, shape = make_batch(layout, EOS)
    measured = measure_activations(module, batch, mixed=precision == "bf16-mixed")
    estimate = estimate_kept(module, shape, precision)
    assert 0.95 * measured <= estimate <= 1.15 * measured


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", ["padded", "share_prefix"])
@pytest.mark.parametrize("lora", ["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES_HERE)
def test_a_step_takes_what_was_estimated(
    name: str, lora: str, layout: str, checkpointing: bool
) -> None:
    """Within 15 per cent, of all allocations: weights, gradients, AdamW's state, activations."""
    module = make_module(
        ARCHITECTURES_HERE[name], LORA[lora], activation_checkpointing=checkpointing
    )
    batch, shape = make_batch(layout, EOS)
    measured = measure_peak(module, batch)
    assert estimate_memory(module, shape).total == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("lora", ["full", "lora"])
def test_a_mixed_step_takes_what_was_estimated(lora: str) -> None:
    module = make_module(ARCHITECTURES_HERE["qwen3"], LORA[lora])
    batch, shape = make_batch("share_prefix", EOS)
    measured = measure_peak(module, batch, mixed=True)
    assert estimate_memory(module, shape, "bf16-mixed").total == pytest.approx(measured, rel=0.15)


def test_groups_and_the_width_of_a_head_count() -> None:
    """What a formula of width and depth alone would miss."""
    _, shape = make_batch("padded", EOS)
    least, more = (
        estimate_memory(make_module(SIZE | {"n_kv_groups": groups}), shape).activations
        for groups in (1, 4)
    )
    places = shape.rows * shape.width
    assert more - least == 6 * places * 2 * 3 * 32 * 4  # blocks, keys and values, groups, numbers
    wide = estimate_memory(make_module(SIZE | {"head_dim": 64}), shape).activations
    assert wide > more


def test_sharded_memory_falls_with_the_devices() -> None:
    module = PlannedModule("llama3.2-1b", weights=None)
    _, shape = make_batch("padded", EOS)
    total, _ = count_parameters(module)
    assert total == 1_235_814_400  # as Meta counts it: one matrix for embedding and head
    sizes = [estimate_memory(module, shape, devices=devices, sharded=True) for devices in (2, 4, 8)]
    assert [size.optimizer for size in sizes] == pytest.approx(
        [8 * total / n for n in (2, 4, 8)], rel=1e-3
    )
    whole = sizes[0].weights - 4 * total / 2  # gathered: the embedding, and one block of sixteen
    assert whole == pytest.approx(4 * (128256 * 2048 + (total - 128256 * 2048) / 16), rel=1e-3)
    for size, devices in zip(sizes, (2, 4, 8), strict=True):
        assert size.weights == size.gradients == pytest.approx(4 * total / devices + whole)
    # Autocast's copies are of whole weights, however many devices share these.
    mixed = estimate_memory(module, shape, "bf16-mixed", devices=8, sharded=True)
    assert mixed.weights - sizes[2].weights == 2 * total


# --- The command ---


def options(folder: Path, **changes: Any) -> list[Any]:
    settings = {"data__prompt_style": "chatml", "data__batch_size": 8} | changes
    return ["--config", write_config(folder, **settings), "--probe_steps", 1]


def test_a_folder_is_planned_with_its_own_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(write_hf(tmp_path / "hf"))
    changes = {"model__architecture": "auto", "model__weights": weights, "data__max_length": 256}
    assert run("plan", *options(tmp_path, **changes)) == 0
    out = capsys.readouterr().out
    assert "GPT-2's tokenizer" not in out
    longest = int(re.search(r"rows of up to (\d+) tokens", out)[1])  # type: ignore[index]
    assert longest > 70  # a byte a token here
    assert re.search(r"a step +\d+\.\d\d s at most on this cpu", out)
    assert not (tmp_path / "runs").exists()


def test_without_weights_gpt2_counts_the_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"family": "llama", "vocab_size": 500, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
    fields |= {"hidden_dim": 48, "n_kv_groups": 2}
    for weights in (None, "smollm2-135m", "/nowhere/model.safetensors"):
        changes = {"model__architecture": fields, "model__weights": weights}
        assert run("plan", *options(tmp_path, **changes)) == 0
        out = capsys.readouterr().out
        assert "counted with GPT-2's tokenizer, as the model's own is not here" in out
        longest = int(re.search(r"rows of up to (\d+) tokens", out)[1])  # type: ignore[index]
        assert longest < 50


def test_a_named_size_is_planned_without_making_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model__architecture": "llama3.2-1b", "model__weights": "llama3.2-1b"}
    arguments = options(tmp_path, **changes, data__prompt_style="llama3")
    assert run("plan", *arguments, "--memory_gb", 16) == 4
    captured = capsys.readouterr()
    assert "parameters   1,235,814,400, 1,235,814,400 of them trained" in captured.out
    assert "one row does not fit either, weights, gradients and optimizer alone take 19.8 GB" in (
        captured.err
    )


def test_what_plan_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", *options(tmp_path, model__architecture="auto", model__weights="gone")) == 2
    assert "model.architecture: auto: gone has no config.json and is no GGUF" in (
        capsys.readouterr().err
    )
    named = ["--model.architecture", json.dumps({"family": "llama"})]
    assert run("plan", *options(tmp_path), *named, "--model.tokenizer", "gone") == 2
    err = capsys.readouterr().err
    assert "model.tokenizer: there is no tokenizer.json in or beside gone" in err


def test_the_stand_in_has_ids_of_the_model_and_markers_of_the_styles() -> None:
    tokenizer = StandInTokenizer(300)
    ids = tokenizer.encode("An instruction of some length, naïve or not.")
    assert max(ids) < 300
    assert len(ids) > 8
    for marker in ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<think>"):
        assert tokenizer.special_tokens[marker] < 300
    assert StandInTokenizer(301).name != tokenizer.name  # rows are kept by this name


def test_every_named_size_is_planned() -> None:
    """With a plausible answer: activations and head beside what 16 bytes a parameter make."""
    _, shape = make_batch("padded", EOS)
    for name, config in ARCHITECTURES.items():
        if name.startswith("gpt2") or name.endswith("-instruct"):
            continue
        module = PlannedModule(name, weights=None)
        total, trained = count_parameters(module)
        assert total == trained
        memory = estimate_memory(module, shape)
        assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(
            16 * total, rel=1e-3
        )
        assert memory.activations > 4 * shape.tokens * config.n_layers * 4 * config.hidden_dim
        assert module.model is None


def test_a_plan_fetches_nothing_and_takes_what_the_hubs_cache_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr(hub, "_download", lambda *args: fetched.append(args))
    assert PlannedModule(SIZE, weights="owner/name").counts_by_stand_in
    folder = write_hf(tmp_path / "hf")
    monkeypatch.setattr(hub, "find_cached", lambda repository, weights=True: folder)
    module = PlannedModule(SIZE, weights="owner/name")
    assert module.tokenizer.name == read_tokenizer(folder).name
    assert not fetched
