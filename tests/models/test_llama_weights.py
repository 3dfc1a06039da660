"""Llama's kin beside transformers and the book: logits, losses, gradients, names, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import collate, pack
from lightning_sft.models.layers import PackedLayout
from lightning_sft.models.llama import LlamaModel
from lightning_sft.models.llama_config import SIZES, LlamaConfig
from lightning_sft.models.llama_weights import (
    book_state_dict,
    count_layers,
    from_hf,
    from_hf_config,
    gguf_names,
    hf_config,
    to_hf,
)
from lightning_sft.training.loss import sum_cross_entropy
from support.tiny_llama import CONFIGS, SCALING, SIZE, make_llama

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ROWS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1, 2, 3], [1, 2, 9, 4, *range(30)], [7, 7]]


def make_theirs(model: LlamaModel) -> Any:
    """transformers' model with the same weights and dtype."""
    transformers = pytest.importorskip("transformers")
    facts = hf_config(model.config)
    config = transformers.AutoConfig.for_model(**facts, attn_implementation="sdpa")
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(model.tok_emb.weight.dtype)
    missing, unexpected = theirs.load_state_dict(to_hf(model.state_dict()), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if model.config.tie_embeddings else [])
    theirs.tie_weights()
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # Theirs computes in float32 whatever the model's dtype, which float64 would show.
            module.forward = functools.partial(exact_norm, module)
    return theirs.eval()


def exact_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)


# --- transformers ---


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_loss_and_gradients_equal_transformers(kind, dtype):
    model = make_llama(CONFIGS[kind], dtype=dtype)
    theirs = make_theirs(model)
    batch = collate(ROWS, pad_token_id=60, eos_token_id=60)
    close = functools.partial(
        torch.testing.assert_close, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )

    their_logits = theirs(batch["input_ids"]).logits
    close(model(batch["input_ids"]), their_logits)
    wanted = batch["targets"].flatten()
    (keep,) = torch.where(wanted != -100)
    their_loss = F.cross_entropy(their_logits.flatten(0, 1)[keep], wanted[keep])
    their_loss.backward()
    gradients = from_hf(
        {name: parameter.grad for name, parameter in theirs.named_parameters()}, model.config
    )

    for share_prefix in (None, False, True):
        layout, places = None, keep
        if share_prefix is not None:
            packed = pack(ROWS, share_prefix=share_prefix, eos_token_id=60)
            layout = PackedLayout(packed["positions"], packed["gather"], packed["scatter"])
            places = packed["gather"].flatten()[keep]
        input_ids = batch["input_ids"] if layout is None else packed["input_ids"]
        hidden = model.hidden_states(input_ids, layout=layout).flatten(0, -2)
        loss = sum_cross_entropy(hidden, model.out_head.weight, wanted[keep], places) / len(keep)
        close(loss, their_loss)
        model.zero_grad()
        loss.backward()
        close({name: p.grad for name, p in model.named_parameters()}, gradients)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_survives_transformers(kind, tmp_path: Path):
    """Ours → `config.json` → transformers 5, which writes its own form → ours."""
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[kind]
    assert from_hf_config(hf_config(config)) == config
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in facts
    assert from_hf_config(facts) == config


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_there_and_back(kind):
    model = make_llama(CONFIGS[kind])
    tensors = to_hf(model.state_dict())
    assert ("lm_head.weight" in tensors) is not model.config.tie_embeddings
    assert count_layers(tensors) == count_layers(model.state_dict()) == 2
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}  # of old files
    back = from_hf(tensors | buffer | {"other": torch.zeros(1)}, model.config)
    assert back.pop("other").shape == (1,)
    named = dict(model.named_parameters())
    assert back.keys() == named.keys()
    assert all(torch.equal(back[name], named[name]) for name in named)
    assert gguf_names(2).keys() >= tensors.keys()


# Of the repositories' own config.json, what matters here.
PUBLISHED = {
    "smollm2-135m": {
        "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 576,
        "intermediate_size": 1536, "max_position_embeddings": 8192, "mlp_bias": False,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "llama3.2-1b": {
        "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen3-0.6b-instruct": {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    assert from_hf_config(PUBLISHED[name]) == SIZES[name]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama3.2-1b",
            {"model_type": "qwen3_moe"},
            "model_type 'qwen3_moe' is not one of llama, qwen2, qwen3",
        ),
        ("llama3.2-1b", {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama3.2-1b", {"mlp_bias": True}, "mlp_bias True is not supported"),
        ("llama3.2-1b", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            "smollm2-135m",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type 'linear' is not supported; allowed: llama3",
        ),
        (
            "qwen3-0.6b-instruct",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "rope_type 'yarn' is not supported; allowed: llama3",
        ),
        (
            "smollm2-135m",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not supported",
        ),
        ("llama3.2-1b", {"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        (
            "qwen2.5-0.5b",
            {"use_sliding_window": True, "max_window_layers": 21},
            "layers of 'sliding_attention' are not supported",
        ),
        (
            "qwen2.5-0.5b",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layers of 'chunked_attention' are not supported",
        ),
        ("qwen2.5-0.5b", {"hidden_size": None}, "emb_dim is None; it must be of type int"),
        (
            "qwen2.5-0.5b",
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config {'quant_method': 'gptq'} is not supported",
        ),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(name, change, message):
    with pytest.raises(InputError) as error:
        from_hf_config(PUBLISHED[name] | change)
    assert str(error.value).split(": ", 1)[1] == message


def test_a_missing_size_is_named():
    facts = {key: value for key, value in PUBLISHED["smollm2-135m"].items() if key != "vocab_size"}
    with pytest.raises(InputError, match=r"^config.json: vocab_size is missing$"):
        from_hf_config(facts)


def test_windows_that_no_layer_uses_are_no_windows():
    facts = PUBLISHED["qwen2.5-0.5b"] | {"use_sliding_window": True, "max_window_layers": 24}
    assert from_hf_config(facts) == SIZES["qwen2.5-0.5b"]


def test_an_architecture_that_no_one_has_is_not_written():
    with pytest.raises(InputError, match="no known model has both"):
        hf_config(LlamaConfig(qkv_bias=True, qk_norm=True))
    with pytest.raises(InputError, match="qwen2 has no head_dim of its own"):
        hf_config(LlamaConfig(qkv_bias=True, head_dim=32))


# --- The book ---


def make_books(config: LlamaConfig) -> Any:
    """The book's model of that configuration."""
    fields = dataclasses.asdict(config) | {"dtype": torch.float32}
    if config.qk_norm:
        return pytest.importorskip("llms_from_scratch.qwen3").Qwen3Model(fields)
    return pytest.importorskip("llms_from_scratch.llama3").Llama3Model(fields)


BOOKS = {
    "llama3": LlamaConfig(**SIZE, rope_base=1e4, rope_freq=SCALING, tie_embeddings=False),
    "qwen3": LlamaConfig(**SIZE, head_dim=12, qk_norm=True, norm_eps=1e-6, tie_embeddings=False),
}
INPUT_IDS = torch.tensor([[*range(40)], [*range(20, 60)]])


@pytest.mark.parametrize("name", BOOKS)
def test_the_books_file_loads_here(name, tmp_path: Path):
    theirs = make_books(BOOKS[name]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours = make_llama(BOOKS[name])
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    ours.load_state_dict(from_hf(state, ours.config))
    with torch.no_grad():
        torch.testing.assert_close(ours(INPUT_IDS), theirs(INPUT_IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("name", BOOKS)
def test_our_file_loads_in_the_books_code(name, tie_embeddings, tmp_path: Path):
    config = dataclasses.replace(BOOKS[name], tie_embeddings=tie_embeddings)
    ours, theirs = make_llama(config, seed=1), make_books(config).eval()
    torch.save(book_state_dict(ours), tmp_path / "model.pth")
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(ours(INPUT_IDS), theirs(INPUT_IDS), atol=1e-5, rtol=1e-5)


def test_only_the_gains_of_norms_are_renamed():
    names = ["trf_blocks.0.att.q_norm.scale", "final_norm.scale", "trf_blocks.0.ff.fc1.scale"]
    found = from_hf(dict.fromkeys(names, torch.zeros(1)), BOOKS["qwen3"])
    assert list(found) == [
        "trf_blocks.0.att.q_norm.weight",
        "final_norm.weight",
        "trf_blocks.0.ff.fc1.scale",  # of some quantized file, say
    ]
