"""Llama's kin: sizes, a cache and a packed layout that change nothing, recomputing, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft.common.errors import InputError
from lightning_sft.common.repositories import LLAMA as REPOSITORIES
from lightning_sft.data.batching import collate, pack
from lightning_sft.models.cache import KVCache
from lightning_sft.models.layers import PackedLayout, run_block
from lightning_sft.models.llama import LlamaModel, rotate, rotation_of
from lightning_sft.models.llama_config import SIZES, LlamaConfig
from lightning_sft.training.loss import sum_cross_entropy
from support.tiny_llama import CONFIGS, SIZE, make_llama

EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture(params=CONFIGS)
def exact_model(request: pytest.FixtureRequest) -> LlamaModel:
    """A random tiny model of each kind in float64, gradients off."""
    return make_llama(CONFIGS[request.param], dtype=torch.float64).requires_grad_(False)


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def make_cache(model: LlamaModel, batch_size: int, max_length: int = 32) -> KVCache:
    return KVCache(model.config, batch_size, max_length, dtype=model.tok_emb.weight.dtype)


# --- Sizes and names ---

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
}


def test_the_published_numbers_of_parameters():
    counts = {}
    for name in PUBLISHED:
        with torch.device("meta"):
            model = LlamaModel(SIZES[name])
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    assert counts == PUBLISHED


def test_each_size_has_a_place_on_the_hub():
    assert SIZES.keys() == REPOSITORIES.keys()
    assert SIZES.keys() == PUBLISHED.keys() | {f"{name}-instruct" for name in PUBLISHED}
    assert REPOSITORIES["llama3.2-1b-instruct"] == "meta-llama/Llama-3.2-1B-Instruct"
    assert SIZES["qwen2.5-0.5b-instruct"] == SIZES["qwen2.5-0.5b"]


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.2-3b", "qwen3-0.6b", "qwen3-1.7b"])
def test_sizes_are_the_books(name):
    book = {
        "llama3.2-1b": ("llama3", "LLAMA32_CONFIG_1B"),
        "llama3.2-3b": ("llama3", "LLAMA32_CONFIG_3B"),
        "qwen3-0.6b": ("qwen3", "QWEN_CONFIG_06_B"),
        "qwen3-1.7b": ("qwen3", "QWEN3_CONFIG_1_7B"),
    }
    module, constant = book[name]
    source = pytest.importorskip(f"llms_from_scratch.{module}")
    fields = {key: value for key, value in getattr(source, constant).items() if key != "dtype"}
    eps = 1e-5 if module == "llama3" else 1e-6  # the book's defaults in its classes
    assert LlamaConfig(**fields, norm_eps=eps) == SIZES[name]


def test_no_buffer_and_the_books_names():
    model = LlamaModel(CONFIGS["qwen3"])
    assert list(model.buffers()) == []
    attention = ("W_query", "W_key", "W_value", "out_proj", "q_norm", "k_norm")
    block = [*(f"att.{name}" for name in attention), "ff.fc1", "ff.fc2", "ff.fc3", "norm1", "norm2"]
    names = [f"trf_blocks.{layer}.{name}.weight" for layer in range(2) for name in block]
    assert set(model.state_dict()) == {
        *names,
        "tok_emb.weight",
        "final_norm.weight",
        "out_head.weight",
    }


# --- Initialisation, tying ---


def test_initialisation():
    config = LlamaConfig(vocab_size=400, emb_dim=128, n_heads=4, n_kv_groups=2, n_layers=8)
    with torch.device("meta"):
        model = LlamaModel(dataclasses.replace(config, qkv_bias=True))
    state = torch.random.get_rng_state()
    model.randomize(seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            scaled = "out_proj" in name or "fc3" in name
            expected = 0.02 / math.sqrt(16) if scaled else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_materialize(tie_embeddings):
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**SIZE, tie_embeddings=tie_embeddings))
    model.materialize()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert (model.out_head.weight is model.tok_emb.weight) is tie_embeddings


# --- Rotations ---


def test_a_dot_product_depends_on_the_distance_alone():
    config = CONFIGS["llama3.2"]
    query, key = torch.randn(2, 1, config.head_dim, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 3, 40, 43])
    queries = rotate(query.expand(4, 1, -1), rotation_of(places, config))[:, 0]
    keys = rotate(key.expand(4, 1, -1), rotation_of(places + 5, config))[:, 0]
    products = (queries * keys).sum(-1)
    torch.testing.assert_close(products, products[:1].expand(4), atol=1e-5, rtol=1e-5)
    assert not torch.allclose((queries[:1] * keys).sum(-1), products)  # control: other distances


def test_rotations_of_a_model_in_half_precision_are_computed_in_float32():
    """At place 8,000 bfloat16 would have lost every angle: its next number is 8,032."""
    config = SIZES["smollm2-135m"]
    cosine, _ = rotation_of(torch.tensor([8000, 8001]), config)
    assert cosine.dtype == torch.float32
    assert cosine[:, 0, 0].tolist() == pytest.approx([math.cos(8000), math.cos(8001)], abs=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", CONFIGS)
def test_half_precision(kind):
    """Under autocast and as a whole, with a cache too: as near as three digits can be."""
    model, input_ids = make_llama(CONFIGS[kind]).requires_grad_(False), random_ids(2, 20)
    expected = model(input_ids)
    near = {"atol": 0.06, "rtol": 0.0}  # of logits up to 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(input_ids).float(), expected, **near)
    half = make_llama(CONFIGS[kind], dtype=torch.bfloat16).requires_grad_(False)
    cache = make_cache(half, 2)
    parts = [half(part, cache=cache) for part in input_ids.split([12, 1, 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1).float(), expected, **near)


# --- Causality and positions ---


def test_a_token_sees_only_what_is_before_it(exact_model):
    input_ids = random_ids(1, 10)
    logits = exact_model(input_ids)
    for place in range(10):
        changed = input_ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 61
        difference = (exact_model(changed) - logits).abs().amax(-1)[0]
        assert (difference[:place] == 0).all()
        assert (difference[place:] > 1e-6).all()


def test_the_context_is_not_exceeded():
    model = make_llama(CONFIGS["smollm2"])
    assert model(random_ids(1, 64)).shape == (1, 64, 61)
    with pytest.raises(InputError) as error:
        model(random_ids(1, 65))
    assert str(error.value) == "65 tokens do not fit the model's context of 64"
    cache = make_cache(model, 1, 80)
    model(random_ids(1, 64), cache=cache)
    with pytest.raises(InputError, match="65 tokens do not fit the model's context of 64"):
        model(random_ids(1, 1), cache=cache)


# --- The cache ---


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [1, 7, 1]])
def test_cached_decoding_equals_a_full_pass(exact_model, sizes):
    input_ids = random_ids(3, 9)
    cache = make_cache(exact_model, 3, 9)
    assert cache.keys.shape[2] == exact_model.config.n_kv_groups
    parts = [exact_model(part, cache=cache) for part in input_ids.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), exact_model(input_ids), **EXACT)


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_rows_join_and_leave(kind, lengths, data):
    """Decode, drop, reorder and join at random; every row's logits stay its own."""
    model = make_llama(CONFIGS[kind], dtype=torch.float64).requires_grad_(False)
    rows = [row[:length] for row, length in zip(random_ids(len(lengths), 6), lengths, strict=True)]
    cache = fill_cache(model, rows, room=8)
    for _ in range(data.draw(st.integers(1, 4))):
        kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
        kept = kept[: len(rows)]
        rows = [rows[place] for place in kept]
        cache.select(torch.tensor(kept))
        if data.draw(st.booleans()):
            joining = random_ids(1, 5) * 7 % 61
            cache.join(fill_cache(model, [joining[0]], room=1))
            rows.append(joining[0])
        new = random_ids(len(rows), 1) * 3 % 61
        logits = model(new, cache=cache)[:, 0]
        rows = [torch.cat(pair) for pair in zip(rows, new, strict=True)]
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found, model(row[None])[0, -1], **EXACT)


def fill_cache(model: LlamaModel, prompts: list[torch.Tensor], room: int) -> KVCache:
    """Prompts of unequal length, right-padded with a token that must not show."""
    cache = make_cache(model, len(prompts))
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=60)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    model.hidden_states(padded, cache=cache, row_lengths=lengths)
    cache.resize(room, 32)
    return cache


# --- Packed batches ---

ROWS = [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 9, 4], [7], [1, 2, 3, 4, 5]]


def layout_of(batch: dict[str, torch.Tensor]) -> PackedLayout:
    return PackedLayout(batch["positions"], batch["gather"], batch["scatter"])


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_packed_batch_equals_rows_alone(exact_model, share_prefix):
    batch = pack(ROWS, share_prefix=share_prefix, eos_token_id=60)
    logits = exact_model(batch["input_ids"], layout=layout_of(batch))
    assert logits.shape == (8 if share_prefix else 18, 61)
    for place, ids in enumerate(ROWS):
        expected = exact_model(torch.tensor([ids]))[0]
        actual = logits[batch["gather"][place, : len(ids)]]
        torch.testing.assert_close(actual, expected, **EXACT)


def test_a_packed_prompt_fills_a_cache(exact_model):
    rows = [[1, 2, 3, 4], [1, 2], [1, 2, 3, 9, 9]]
    batch = pack(rows, share_prefix=True, eos_token_id=60)
    cache = make_cache(exact_model, 3)
    exact_model.hidden_states(
        batch["input_ids"],
        layout=layout_of(batch),
        cache=cache,
        row_lengths=torch.tensor([4, 2, 5]),
    )
    logits = exact_model(torch.tensor([[8], [7], [6]]), cache=cache)
    for row, (ids, token) in enumerate(zip(rows, (8, 7, 6), strict=True)):
        expected = exact_model(torch.tensor([[*ids, token]]))[0, -1]
        torch.testing.assert_close(logits[row, 0], expected, **EXACT)


def train(model: LlamaModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Summed loss and gradients of a batch, padded or packed, as training computes them."""
    layout = layout_of(batch) if "gather" in batch else None
    hidden = model.hidden_states(batch["input_ids"], layout=layout).flatten(0, -2)
    wanted = batch["targets"].flatten()
    places = batch["gather"].flatten() if layout is not None else torch.arange(len(wanted))
    keep = wanted != -100
    loss = sum_cross_entropy(hidden, model.out_head.weight, wanted[keep], places[keep])
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_padded_packed_and_shared_train_alike(kind):
    model = make_llama(CONFIGS[kind], dtype=torch.float64)
    expected = train(model, collate(ROWS, pad_token_id=60, eos_token_id=60))
    alone = [train(model, collate([row], eos_token_id=60)) for row in ROWS]
    others = {
        "packed": train(model, pack(ROWS, eos_token_id=60)),
        "shared": train(model, pack(ROWS, share_prefix=True, eos_token_id=60)),
        "alone": {name: sum(row[name] for row in alone) for name in expected},
    }
    for found in others.values():
        torch.testing.assert_close(found, expected, **EXACT)


# --- Recomputing and compiling ---


@pytest.mark.parametrize("kind", CONFIGS)
def test_recomputed_activations_change_nothing(kind):
    model = make_llama(CONFIGS[kind])
    batch = pack(ROWS, share_prefix=True, eos_token_id=60)
    expected = train(model, batch)
    calls = []
    model.trf_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.recompute = True
    found = train(model, batch)
    assert len(calls) == 2  # forward, and again in backward
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_blocks_go_through_what_compiles_them():
    """With the arguments that `run_block` takes; that compiling changes nothing is torch's part."""
    model, input_ids = make_llama(CONFIGS["qwen3"]).requires_grad_(False), random_ids(2, 5)
    expected, calls = model(input_ids), []

    def spy(*arguments):
        calls.append(arguments)
        return run_block(*arguments)

    model.compiled = spy
    assert torch.equal(model(input_ids), expected)
    assert len(calls) == 2
    model(input_ids, cache=make_cache(model, 2))
    assert len(calls) == 2


# --- Configurations ---


def test_a_config_of_plain_values_is_the_same():
    config = CONFIGS["llama3.2"]
    assert LlamaConfig(**dataclasses.asdict(config)) == config
    assert LlamaConfig().head_dim == 64
    assert LlamaConfig() == SIZES["smollm2-135m"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"emb_dim": 100}, "emb_dim 100 is not divisible by n_heads 9"),
        ({"n_kv_groups": 2}, "n_heads 9 is not divisible by n_kv_groups 2"),
        ({"head_dim": 63}, "head_dim 63 is odd; rotations need pairs"),
        ({"head_dim": -2}, "head_dim is -2; it must be > 0"),
        ({"n_layers": 0}, "n_layers is 0; it must be > 0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan; it must be > 0"),
        ({"rope_base": float("inf")}, "rope_base is inf; it must be > 0"),
        ({"n_layers": None}, "n_layers is None; it must be of type int"),
        ({"n_layers": True}, "n_layers is True; it must be of type int"),
        ({"emb_dim": 576.0}, "emb_dim is 576.0; it must be of type int"),
        ({"rope_base": "1e6"}, "rope_base is '1e6'; it must be of type float"),
        ({"qk_norm": "no"}, "qk_norm is 'no'; it must be of type bool"),
        ({"rope_freq": 8}, "rope_freq is 8; it must be a mapping or null"),
        (
            {"rope_freq": {"factor": 8.0, "size": 3}},
            "rope_freq has other fields than factor, low_freq_factor, high_freq_factor, "
            "original_context_length",
        ),
        ({"rope_freq": {"factor": 0.0}}, "rope_freq: factor is 0.0; it must be > 0"),
        (
            {"rope_freq": {"low_freq_factor": 4}},
            "rope_freq: high_freq_factor 4.0 must be more than low_freq_factor 4",
        ),
    ],
    ids=str,
)
def test_bad_configurations(fields, message):
    with pytest.raises(InputError) as error:
        LlamaConfig(**fields)
    assert str(error.value) == f"architecture: {message}"
