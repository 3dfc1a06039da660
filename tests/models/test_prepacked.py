"""Weights laid out anew for answering: the same numbers, never stale ones, and given back."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_sft.decoding.generation import generate
from lightning_sft.models import prepacked as module
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.layers import Linear
from lightning_sft.models.llama import LlamaModel
from lightning_sft.models.llama_config import LlamaConfig
from lightning_sft.models.lora import LoRAConfig, add_lora
from lightning_sft.models.prepacked import discard_prepacked, prepack, prepacked, works

pytestmark = pytest.mark.skipif(not works(torch.float32), reason="torch has no such operators here")
SIZE = {"vocab_size": 300, "context_length": 64, "emb_dim": 48, "n_heads": 4, "n_layers": 2}
CONFIGS = {
    "gpt2": GPTConfig(**SIZE),
    "gpt2 without biases": GPTConfig(**SIZE | {"qkv_bias": False}),
    "llama": LlamaConfig(**SIZE, hidden_dim=96, n_kv_groups=2),
    "qwen2.5": LlamaConfig(**SIZE, hidden_dim=96, n_kv_groups=2, qkv_bias=True),
    "qwen3": LlamaConfig(**SIZE, hidden_dim=96, n_kv_groups=2, head_dim=16, qk_norm=True),
}
IDS = torch.arange(14).view(2, 7)


def make(name: str) -> GPTModel | LlamaModel:
    torch.manual_seed(1)
    config = CONFIGS[name]
    model = (GPTModel if isinstance(config, GPTConfig) else LlamaModel)(config).eval()
    for parameter in model.parameters():  # biases and gains that are none would hide a mistake
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def count(model) -> int:
    linears = [layer for layer in model.modules() if isinstance(layer, Linear)]
    return sum((layer.prepacked or layer.prepacked_together) is not None for layer in linears)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_same_logits(name):
    model = make(name)
    wanted = model(IDS)
    assert prepack(model)
    assert count(model) == 9  # 4 of each block, and the head
    torch.testing.assert_close(model(IDS), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDS[:1, :1]), wanted[:1, :1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_they_are_what_is_multiplied_with(monkeypatch):
    model = make("llama")
    wanted = model(IDS)
    prepack(model)
    monkeypatch.setattr(module, "_multiply", lambda x, weight, bias: 0 * x.new_ones(1))
    with pytest.raises((RuntimeError, ValueError)):  # nothing can be split from a single number
        model(IDS)
    discard_prepacked(model)
    assert torch.equal(model(IDS), wanted)


@pytest.mark.parametrize("change", ["trained", "loaded", "replaced", "cast"])
def test_changed_weights_are_not_answered_from(change):
    model = make("gpt2")
    prepack(model)
    if change == "trained":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(IDS).logsumexp(-1).sum().backward()
        optimizer.step()
    elif change == "loaded":
        model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    elif change == "replaced":
        model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True)
    else:
        model.double()
    fresh = copy.deepcopy(model)
    assert count(fresh) == 0
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), fresh(IDS), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_weights():
    model = make("qwen3")
    model(IDS).logsumexp(-1).sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with prepacked(model):
        model(IDS).logsumexp(-1).sum().backward()
    assert all(map(torch.equal, wanted, (parameter.grad for parameter in model.parameters())))


@torch.no_grad()
def test_adapters_are_added_as_before():
    model = make("llama")
    add_lora(model, LoRAConfig(rank=2, targets=("*.W_query", "*.fc3")), seed=1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    wanted = model(IDS)
    with prepacked(model):
        assert count(model) == 2 * (4 + 1 + 1) + 1  # queries apart from keys and values
        torch.testing.assert_close(model(IDS), wanted, rtol=1e-5, atol=1e-4)


def test_generate_gives_them_back_and_an_owner_keeps_them():
    model = make("llama")
    answers = generate(model, [[1, 2, 3], [4]], max_new_tokens=5, eos_token_id=None)
    assert count(model) == 0
    prepack(model)
    kept = count(model)
    assert generate(model, [[1, 2, 3], [4]], max_new_tokens=5, eos_token_id=None) == answers
    assert count(model) == kept > 0


def test_an_error_gives_them_back():
    model = make("gpt2")
    with pytest.raises(KeyError), prepacked(model):
        raise KeyError
    assert count(model) == 0


@torch.no_grad()
@pytest.mark.skipif(not works(torch.bfloat16), reason="no bfloat16 instructions")
def test_autocast_computes_in_its_own_kind_of_number():
    model = make("gpt2")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(IDS)
        assert prepack(model)
        found = model(IDS)
    assert found.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    exact = copy.deepcopy(model)(IDS)
    assert torch.equal(model(IDS), exact)  # in float32 they do not fit, and are left alone


def test_no_room_no_second_copy(monkeypatch):
    monkeypatch.setattr(module, "_free_memory", lambda: 100_000.0)
    model = make("gpt2")
    assert not prepack(model)
    assert count(model) == 0


def test_double_precision_is_left_alone():
    assert not prepack(make("gpt2").double())


def test_a_torch_without_the_operators_computes_as_before(monkeypatch):
    works.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    try:
        assert not prepack(make("gpt2"))
    finally:
        works.cache_clear()
