"""LoRA's arithmetic: layers, head and loss, merging, what is kept in memory, PEFT's numbers."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_sft import SFTModule
from lightning_sft.common import files
from lightning_sft.common.config_files import read_config
from lightning_sft.common.errors import InputError
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.gpt2_weights import to_hf
from lightning_sft.models.loading import book_state_dict
from lightning_sft.models.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    has_lora,
    is_adapter,
    merge_lora,
    merged_copy,
)
from lightning_sft.models.lora_checkpoint import identify_base, saved_config
from lightning_sft.models.registry import ARCHITECTURES
from lightning_sft.planning.footprint import count_parameters, estimate_memory
from lightning_sft.training.loss import CHUNK_SIZE, sum_cross_entropy
from support.activations import make_batch, measure_activations
from support.tiny_weights import INPUT_IDS, TIED, TINY, logits_of, make_book_model, make_model

CONFIG = LoRAConfig(rank=4, alpha=8.0)


def adapt(model: GPTModel, config: LoRAConfig = CONFIG, std: float = 0.3) -> GPTModel:
    """With adapters that do something: B is not zero as at the start."""
    add_lora(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=std, generator=generator)
    return model.eval()


def adapters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if is_adapter(name)}


@pytest.mark.parametrize("config", [TINY, TIED])
def test_no_effect_before_the_first_step(config: GPTConfig) -> None:
    model = make_model(config)
    before = logits_of(model)
    add_lora(model, CONFIG)
    assert has_lora(model)
    assert torch.equal(logits_of(model), before)


def test_a_layer_is_the_formula() -> None:
    base = torch.nn.Linear(5, 7).double()
    layer = LoRALinear(base, LoRAConfig(rank=2, alpha=6.0))
    with torch.no_grad():
        layer.lora_b.normal_()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = x @ base.weight.T + base.bias + 6.0 / 2 * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "lora_a", "lora_b"}


def test_adapters_begin_as_in_the_paper_and_draw_nothing_from_the_global_state() -> None:
    models = [make_model() for _ in range(3)]
    state = torch.random.get_rng_state()
    first, again, other = (
        adapters(add_lora(model, CONFIG, seed=seed))
        for model, seed in zip(models, (1, 1, 2), strict=True)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if name.endswith("lora_b"):
            assert not parameter.any()
        else:
            assert not torch.equal(parameter, other[name])
            bound = 1 / math.sqrt(parameter.shape[1])  # Kaiming, uniform, a = sqrt(5)
            assert 0.7 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("rank", [4, 16])
def test_the_books_form_is_its_appendix_e(rank: int) -> None:
    """Appendix E written out: `alpha * (x @ A @ B)`, and A by `kaiming_uniform_` as (in, rank)."""
    base = torch.nn.Linear(64, 48)
    config = LoRAConfig(rank=rank, alpha=16, scaling="alpha", init="book")
    layer = LoRALinear(base, config, torch.Generator().manual_seed(0))
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(64, rank), a=math.sqrt(5))
    for a in (layer.lora_a, theirs):
        assert 0.9 < float(a.abs().max()) * math.sqrt(rank) <= 1
    with torch.no_grad():
        layer.lora_b.normal_()
        x = torch.randn(5, 64)
        expected = base(x) + 16 * (x @ layer.lora_a.T @ layer.lora_b.T)
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(layer.merged()(x), expected, atol=1e-4, rtol=1e-5)
    peft = LoRALinear(base, LoRAConfig(rank=rank, alpha=16), torch.Generator().manual_seed(0))
    assert 0.9 < float(peft.lora_a.abs().max()) * math.sqrt(64) <= 1
    assert layer.scale / peft.scale == rank


def test_a_checkpoint_without_the_new_keys_means_pefts_form() -> None:
    old = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["*"]}
    config = saved_config({"lora": old})
    assert config == LoRAConfig(4, 8.0)
    assert config.as_dict() == old  # and older versions read what is written in that form
    book = LoRAConfig(4, 8.0, scaling="alpha", init="book")
    assert saved_config({"lora": book.as_dict()}) == book
    with pytest.raises(InputError, match="which is none"):
        saved_config({"lora": old | {"scaling": "beta"}})


@pytest.mark.parametrize("name", ["lora", "lora-peft"])
def test_the_recipes_differ_in_scaling_and_beginning_alone(name: str) -> None:
    settings = read_config(files.shipped_folder() / f"{name}.yaml")["model"]["lora"]
    config = LoRAConfig(**settings | {"targets": tuple(settings["targets"])})
    expected = LoRAConfig() if name == "lora-peft" else LoRAConfig(scaling="alpha", init="book")
    assert config == expected


def test_only_adapters_train_and_names_stay() -> None:
    model = make_model()
    names = {name for name, _ in model.named_parameters()}
    add_lora(model, CONFIG)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters(model))
    assert {name for name, _ in model.named_parameters()} - trained == names
    linear = [name for name in names if name.endswith("weight") and "emb" not in name]
    assert len(trained) == 2 * len(linear)  # in all linear layers, the head included


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["*"], 13),
        (["out_head"], 1),
        (["W_query", "W_value"], 4),
        (["trf_blocks.1.*"], 6),
        (["*.ff.layers.?", "att.out_proj", "*.out_proj"], 6),
    ],
)
def test_targets_choose_layers_by_name(targets: list[str], count: int) -> None:
    model = add_lora(make_model(), LoRAConfig(targets=tuple(targets)))
    assert sum(isinstance(part, LoRALinear) for part in model.modules()) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora.rank: 0 is not allowed; it must be >= 1"),
        ({"alpha": 0.0}, "lora.alpha: 0.0 is not allowed"),
        ({"alpha": math.inf}, "lora.alpha: inf is not allowed"),
        ({"alpha": math.nan}, "lora.alpha: nan is not allowed"),
        ({"dropout": 1.0}, "lora.dropout: 1.0 is outside"),
        ({"dropout": -0.1}, "lora.dropout: -0.1 is outside"),
        ({"targets": ()}, "lora.targets"),
        ({"targets": "W_query"}, "lora.targets: 'W_query' is not allowed; give a list"),
        ({"targets": ("W_query", "q_proj")}, "'q_proj' matches no layer; .* W_query|out_head"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_lora(make_model(), LoRAConfig(**changes))


def test_adapters_are_not_put_on_adapters() -> None:
    with pytest.raises(InputError, match="has adapters already"):
        add_lora(adapt(make_model()), CONFIG)


@pytest.mark.parametrize("config", [TINY, TIED, dataclasses.replace(TINY, qkv_bias=False)])
def test_merging_is_exact_and_idempotent(config: GPTConfig) -> None:
    model = adapt(make_model(config).double())
    before, embedding = logits_of(model), model.tok_emb.weight.clone()
    assert not torch.allclose(before, logits_of(make_model(config).double()), atol=1.0)
    merge_lora(model)
    torch.testing.assert_close(logits_of(model), before, atol=1e-6, rtol=0)
    assert not has_lora(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_lora(model)
    assert (
        state.keys() == model.state_dict().keys() == make_model(untied(config)).state_dict().keys()
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.tok_emb.weight, embedding)
    assert not model.config.tie_embeddings


def untied(config: GPTConfig) -> GPTConfig:
    return dataclasses.replace(config, tie_embeddings=False)


def test_merged_in_float32_at_the_size_of_real_activations() -> None:
    """GPT-2's initialisation, adapters as large as training makes them, gpt2-small's width."""
    config = dataclasses.replace(ARCHITECTURES["gpt2-small"], n_layers=2, vocab_size=500)
    torch.manual_seed(0)
    model = adapt(GPTModel(config), LoRAConfig(), std=0.01)
    before = logits_of(model)
    difference = (logits_of(merge_lora(model)) - before).abs().max()
    assert difference < 1e-6 * max(1.0, float(before.abs().max()))


def test_an_untouched_head_stays_tied() -> None:
    model = merge_lora(adapt(make_model(TIED), LoRAConfig(targets=("W_query",))))
    assert model.config.tie_embeddings
    assert model.out_head.weight is model.tok_emb.weight


def test_a_merged_copy_leaves_the_model_and_shares_the_rest() -> None:
    model = adapt(make_model(TIED))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merged_copy(model)
    torch.testing.assert_close(logits_of(merged), logits_of(model), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapters(model))
    assert merged.tok_emb.weight.data_ptr() == model.tok_emb.weight.data_ptr()
    assert merged.config.tie_embeddings is not model.config.tie_embeddings


def test_the_books_code_loads_the_merged_weights() -> None:
    model = adapt(make_model())
    theirs = make_book_model(TINY)
    theirs.load_state_dict(book_state_dict(merged_copy(model)), strict=True)
    torch.testing.assert_close(logits_of(theirs), logits_of(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_head_inside_the_loss(dropout: float, dtype: torch.dtype) -> None:
    """Against cross_entropy of the layer's own logits, over more than one chunk."""
    torch.manual_seed(3)
    head = LoRALinear(torch.nn.Linear(6, 11, bias=False).double(), LoRAConfig(2, 5.0, dropout))
    with torch.no_grad():
        head.lora_b.normal_()
    head = head.to(torch.float64 if dtype == torch.float64 else torch.float32)
    hidden = torch.randn(CHUNK_SIZE + 9, 6, dtype=head.weight.dtype, requires_grad=True)
    targets = torch.randint(0, 11, (CHUNK_SIZE + 9,))
    wanted = [hidden, head.lora_a, head.lora_b]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        torch.manual_seed(5)  # the same dropped inputs
        expected = F.cross_entropy(head(hidden).to(head.weight.dtype), targets, reduction="sum")
        torch.manual_seed(5)
        places = torch.arange(len(targets))
        actual = sum_cross_entropy(hidden, head.weight, targets, places, head.factors)
    exact = {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 0.2, "rtol": 0.02}
    torch.testing.assert_close(actual, expected, **exact)
    for ours, theirs in zip(
        torch.autograd.grad(actual, wanted, retain_graph=True),
        torch.autograd.grad(expected, wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **exact)
    again = sum_cross_entropy(hidden.detach(), head.weight, targets, places, head.factors)
    again.backward()
    assert head.weight.grad is None
    assert head.lora_b.grad is not None


def test_a_batch_without_targets_still_reaches_every_trained_parameter() -> None:
    """Else DDP waits for their gradients."""
    head = LoRALinear(torch.nn.Linear(6, 11, bias=False), CONFIG)
    none = torch.zeros(0, dtype=torch.int64)
    hidden = torch.randn(4, 6, requires_grad=True)
    loss = sum_cross_entropy(hidden, head.weight, none, none, head.factors)
    loss.backward()
    assert loss.item() == 0.0
    for parameter in (hidden, head.lora_a, head.lora_b):
        assert parameter.grad is not None
        assert not parameter.grad.any()


ARCHITECTURE = {"emb_dim": 64, "n_heads": 4, "n_layers": 4, "context_length": 256}


def make_module(**lora: Any) -> SFTModule:
    module = SFTModule(ARCHITECTURE, weights=None, lora=LoRAConfig(**lora))
    module.configure_model()
    return module.train()


def test_a_step_changes_adapters_and_nothing_else() -> None:
    module = make_module()
    before = copy.deepcopy(module.network.state_dict())
    base = identify_base(module.network)
    optimizer: Any = module.configure_optimizers()
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in adapters(module.network).values()}
    batch, _ = make_batch("share_prefix")
    for _ in range(2):  # at first B is zero, and with it the gradient of A
        loss, count = module.sum_loss(batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in module.network.named_parameters():
        assert torch.equal(parameter, before[name]) is not is_adapter(name), name
        assert parameter.grad is None
    assert identify_base(module.network) == base


def test_gpt2_medium_has_as_many_adapters_as_the_books_solution_prints() -> None:
    """Exercise 7.4's output: 406,286,336 parameters, 7,898,384 of LoRA's."""
    module = SFTModule("gpt2-medium", weights=None, lora=LoRAConfig())
    total, trained = count_parameters(module)
    assert (total - trained, trained) == (406_286_336, 7_898_384)


def test_adapters_of_gpt2_small_are_below_five_per_cent() -> None:
    module = SFTModule("gpt2-small", weights=None, lora=LoRAConfig())
    total, trained = count_parameters(module)
    per_block = 16 * (4 * (768 + 768) + 2 * (768 + 4 * 768))
    assert trained == 12 * per_block + 16 * (768 + 50257)
    assert trained / (total - trained) < 0.05
    assert module.model is None  # counted without memory


@pytest.mark.parametrize("layout", ["padded", "share_prefix"])
@pytest.mark.parametrize(
    ("lora", "most"),
    [
        ({}, 1.12),
        ({"rank": 4, "targets": ("W_query", "W_value")}, 1.12),
        ({"rank": 4, "targets": ("trf_blocks.[23].*",)}, 1.12),
        # The part of the first block before its adapter keeps nothing; that is not modelled.
        ({"rank": 4, "targets": ("*.layers.2", "out_head")}, 1.35),
        ({"rank": 4, "dropout": 0.1}, 1.12),
    ],
)
def test_activations_are_what_autograd_keeps(
    lora: dict[str, Any], most: float, layout: str
) -> None:
    """And no more: a frozen layer without an adapter does not keep its input."""
    module = make_module(**lora)
    batch, shape = make_batch(layout)
    measured = measure_activations(module, batch, mixed=False)
    estimate = estimate_memory(module, shape).activations
    assert 0.97 * measured <= estimate <= most * measured


def test_the_estimate_counts_trained_parameters_alone() -> None:
    _, shape = make_batch("padded")
    whole = SFTModule(ARCHITECTURE, weights=None)
    lora = SFTModule(ARCHITECTURE, weights=None, lora=LoRAConfig())
    full, ours = estimate_memory(whole, shape), estimate_memory(lora, shape)
    _, trained = count_parameters(lora)
    assert (ours.gradients, ours.optimizer) == pytest.approx((4 * trained, 8 * trained), rel=0.01)
    assert ours.head < full.head
    assert ours.total < full.total


def test_the_fingerprint_sees_one_bit_and_ignores_adapters() -> None:
    model = make_model()
    base = identify_base(model)
    adapt(model)
    assert identify_base(model) == base
    rounded = copy.deepcopy(model).bfloat16()
    assert identify_base(rounded) == identify_base(model, "bfloat16") != base
    bits = model.trf_blocks[1].att.W_key.weight.data.view(torch.int32)
    bits[3, 5] ^= 1
    assert identify_base(model)["sha256"] != base["sha256"]


def hf_model(transformers: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=97,
        n_positions=16,
        n_embd=32,
        n_head=4,
        n_layer=2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_merged_weights_give_transformers_the_same_logits() -> None:
    transformers = pytest.importorskip("transformers")
    model = adapt(make_model())
    theirs = hf_model(transformers)
    missing, extra = theirs.load_state_dict(to_hf(merged_copy(model).state_dict()), strict=False)
    assert (missing, extra) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(theirs(INPUT_IDS).logits, logits_of(model), atol=1e-5, rtol=1e-5)


def test_pefts_lora_gives_the_same_logits_and_gradients() -> None:
    """The same A, B, alpha and rank; one A for the fused query, key and value."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    ours = make_model()
    theirs = hf_model(transformers)
    theirs.load_state_dict(to_hf(ours.state_dict()), strict=False)
    adapt(ours)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["c_attn", "c_proj", "c_fc", "lm_head"],
        fan_in_fan_out=True,
    )
    theirs = peft.get_peft_model(theirs, settings).eval()
    parameters = dict(theirs.named_parameters())
    pairs = {"attn.c_proj": "att.out_proj", "mlp.c_fc": "ff.layers.0", "mlp.c_proj": "ff.layers.2"}
    pairs = {
        f"transformer.h.{n}.{name}": f"trf_blocks.{n}.{own}"
        for n in range(2)
        for name, own in pairs.items()
    }
    pairs["lm_head"] = "out_head"

    def theirs_of(name: str, factor: str) -> torch.nn.Parameter:
        return parameters[f"base_model.model.{name}.lora_{factor}.default.weight"]

    with torch.no_grad():
        for name, own in pairs.items():
            layer = ours.get_submodule(own)
            theirs_of(name, "A").copy_(layer.lora_a)
            theirs_of(name, "B").copy_(layer.lora_b)
        for n, block in enumerate(ours.trf_blocks):
            attention = block.att
            projections = [attention.W_query, attention.W_key, attention.W_value]
            for layer in projections:
                layer.lora_a.copy_(attention.W_query.lora_a)
            name = f"transformer.h.{n}.attn.c_attn"
            theirs_of(name, "A").copy_(attention.W_query.lora_a)
            theirs_of(name, "B").copy_(torch.cat([layer.lora_b for layer in projections]))
    expected, actual = theirs(INPUT_IDS).logits, ours(INPUT_IDS)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for logits in (expected, actual):
        logits.float().logsumexp(-1).mean().backward()
    for name, own in pairs.items():
        layer = ours.get_submodule(own)
        torch.testing.assert_close(layer.lora_a.grad, theirs_of(name, "A").grad)
        torch.testing.assert_close(layer.lora_b.grad, theirs_of(name, "B").grad)
