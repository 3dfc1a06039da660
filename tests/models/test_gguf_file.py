"""GGUF: facts and tensors of each architecture, as the package gguf and transformers read them."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_sft.common.errors import InputError
from lightning_sft.common.gguf_header import read_gguf_header
from lightning_sft.data.prompts import get_style
from lightning_sft.exporting import export_gguf
from lightning_sft.models import gpt2_weights
from lightning_sft.models.gguf_file import (
    halves_from_pairs,
    note_quantized,
    pairs_from_halves,
    read_gguf,
)
from lightning_sft.models.gpt2 import GPTConfig
from lightning_sft.models.llama_config import SIZES, LlamaConfig, RopeFrequencies
from support.real_model import real_gguf as _real_gguf
from support.tiny_llama import CONFIGS, SIZE, make_llama

gguf = pytest.importorskip("gguf")
from support.tiny_gguf import QUANTIZED, load, write_gguf  # noqa: E402

real_gguf = pytest.fixture(scope="session")(_real_gguf)

# What a GGUF can say: Llama 3's own original context and factors, but for the first.
SAID = {
    kind: dataclasses.replace(config, rope_freq=RopeFrequencies(8.0))
    if config.rope_freq
    else config
    for kind, config in CONFIGS.items()
}


@pytest.mark.parametrize("kind", SAID)
def test_a_model_comes_back_whole(kind, tmp_path: Path):
    model = make_llama(SAID[kind])
    write_gguf(model, tmp_path / "model.gguf")
    again = load(tmp_path / "model.gguf")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_gpt2_comes_back_whole(tie_embeddings, make_model, tmp_path: Path):
    sizes = {"vocab_size": 50257, "context_length": 16, "emb_dim": 8, "n_heads": 2, "n_layers": 2}
    model = make_model(GPTConfig(**sizes, tie_embeddings=tie_embeddings))
    export_gguf.write_gguf(model, get_style("alpaca"), "tiny", tmp_path / "model.gguf")
    config, tensors = read_gguf(tmp_path / "model.gguf")
    assert config == model.config
    state = gpt2_weights.from_hf(tensors, config)
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())
    assert len(state) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["smollm2", "qwen2.5", "qwen3", "qwen3-untied"])
def test_logits_equal_those_of_transformers_from_the_same_file(kind, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[kind]
    if config.qk_norm:
        config = dataclasses.replace(config, head_dim=128)  # they read no other
    write_gguf(make_llama(config), tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    input_ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        actual, expected = load(tmp_path / "model.gguf")(input_ids), theirs(input_ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["f16", "bf16", *QUANTIZED])
def test_types_of_elements(kind, tmp_path: Path):
    config = dataclasses.replace(CONFIGS["smollm2"], hidden_dim=64)
    expected = write_gguf(make_llama(config), tmp_path / "model.gguf", kind)
    _, tensors = read_gguf(tmp_path / "model.gguf")
    assert tensors.keys() == expected.keys()
    wanted = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if tensor.ndim == 1 else wanted)
        np.testing.assert_array_equal(tensor.float().numpy(), expected[name])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_K"])
def test_blocks_of_256(kind, tmp_path: Path):
    """No quantizer in Python for these: bytes at random, undone by the package gguf alone."""
    config = LlamaConfig(
        vocab_size=4, emb_dim=256, n_heads=2, n_kv_groups=1, n_layers=1, hidden_dim=256
    )
    path, dtype = tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind]
    write_gguf(make_llama(config), path, "f32")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    for key in ("context_length", "embedding_length", "feed_forward_length", "block_count"):
        getattr(writer, f"add_{key}")(read_gguf_header(path).facts[f"llama.{key}"])
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    size = gguf.GGML_QUANT_SIZES[dtype][1]
    blocks = np.random.default_rng(0).integers(0, 60, (4, size), np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, tensors = read_gguf(tmp_path / "other.gguf")
    assert (found.n_kv_groups, found.rope_base, found.head_dim) == (2, 10_000.0, 128)
    expected = gguf.dequantize(blocks, dtype)
    assert expected.shape == (4, 256)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"].numpy(), expected)


def test_the_order_of_rows_is_undone():
    weight = torch.arange(24.0).view(12, 2)
    assert torch.equal(halves_from_pairs(pairs_from_halves(weight, 3), 3), weight)
    # One head of four numbers: neighbours become halves.
    neighbours = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    assert halves_from_pairs(neighbours, 1).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count 8 is not supported"),
        ({"attention__sliding_window": 64}, "llama.attention.sliding_window 64 is not supported"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type 'yarn' is not supported"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(facts, message, tmp_path: Path):
    write_gguf(make_llama(CONFIGS["smollm2"]), tmp_path / "model.gguf", **facts)
    with pytest.raises(InputError) as error:
        read_gguf(tmp_path / "model.gguf")
    assert str(error.value) == f"GGUF: {message}"


def test_rotations_that_are_not_llama_3s_are_refused(tmp_path: Path):
    write_gguf(make_llama(CONFIGS["llama3.2"]), tmp_path / "model.gguf")  # another original context
    with pytest.raises(InputError, match="are not the factors of Llama 3's rotations"):
        read_gguf(tmp_path / "model.gguf")


def test_another_architecture_is_refused(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"^GGUF: architecture 'mamba' is not one of gpt2, llama"):
        read_gguf(tmp_path / "model.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    write_gguf(make_llama(CONFIGS["smollm2"]), tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 1500, 37), len(content) - 64]:
        cut.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut\.gguf: "):
            read_gguf(cut)


def test_a_damaged_header_is_refused_or_read(tmp_path: Path):
    """Any bytes of it may be others: one line, and no endless loop."""
    write_gguf(make_llama(CONFIGS["smollm2"]), tmp_path / "model.gguf")
    content, draw = (tmp_path / "model.gguf").read_bytes(), random.Random(1)
    messages, damaged = [], tmp_path / "damaged.gguf"
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 5])):
            changed[draw.randrange(2300)] = draw.choice([0, 1, 255, draw.randrange(256)])
        damaged.write_bytes(changed)
        try:
            read_gguf(damaged)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)


@pytest.mark.slow
def test_the_real_model(real_gguf: Path):
    began = time.process_time()  # one thread; other work on this machine may make it wait
    model = load(real_gguf)
    assert time.process_time() - began < 5
    assert model.config == SIZES["smollm2-135m"]


def test_quantized_weights_are_said_to_be_a_worse_start_once(tmp_path: Path, capsys):
    model = make_llama(LlamaConfig(**SIZE | {"emb_dim": 64, "hidden_dim": 64}))
    write_gguf(model, tmp_path / "plain.gguf", "f16")
    note_quantized(tmp_path / "plain.gguf")
    assert capsys.readouterr().err == ""
    write_gguf(model, tmp_path / "rounded.gguf", "q4_1")
    for _ in range(2):
        note_quantized(tmp_path / "rounded.gguf")
    assert capsys.readouterr().err == (
        "note: rounded.gguf is quantized (Q4_1), a worse start for training than the "
        "full-precision weights it was made of\n"
    )
