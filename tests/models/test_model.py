"""GPT-2: the book's logits, a cache and a packed layout that change nothing, and refusals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft.common.errors import InputError
from lightning_sft.data.batching import pack
from lightning_sft.models.cache import KVCache
from lightning_sft.models.gpt2 import GPTConfig, GPTModel
from lightning_sft.models.layers import PackedLayout
from lightning_sft.models.registry import (
    ARCHITECTURES,
    FAMILIES,
    GPT2,
    MODEL_SIZES,
    family_of,
    get_config,
)

EXACT = {"atol": 1e-10, "rtol": 1e-10}
Make = Callable[..., GPTModel]


def random_ids(*shape: int, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exact_model(make_model: Make) -> GPTModel:
    """A random tiny model in float64, gradients off."""
    return make_model(dtype=torch.float64).requires_grad_(False)


def make_cache(model: GPTModel, batch_size: int, max_length: int = 32) -> KVCache:
    return KVCache(model.config, batch_size, max_length, dtype=model.tok_emb.weight.dtype)


# --- Parity with the book; transformers' model is compared in test_weights.py ---


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_logits_equal_the_books_model(make_model, tiny_config, qkv_bias):
    ch04 = pytest.importorskip("llms_from_scratch.ch04")
    config = dataclasses.replace(tiny_config, qkv_bias=qkv_bias)
    ours = make_model(config)
    fields = dataclasses.asdict(config)
    del fields["tie_embeddings"]
    theirs = ch04.GPTModel(fields).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["trf_blocks.0.att.mask", "trf_blocks.1.att.mask"]  # a buffer of theirs
    assert unexpected == []
    input_ids = random_ids(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids), theirs(input_ids), atol=1e-5, rtol=1e-5)


def test_parameter_names_are_the_books(tiny_model):
    block = [
        *(f"att.{name}.{kind}" for name in ("W_query", "W_key", "W_value", "out_proj")
          for kind in ("weight", "bias")),
        *(f"ff.layers.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")),
        *(f"norm{number}.{kind}" for number in (1, 2) for kind in ("scale", "shift")),
    ]  # fmt: skip
    expected = {
        "tok_emb.weight",
        "pos_emb.weight",
        *(f"trf_blocks.{layer}.{name}" for layer in range(2) for name in block),
        "final_norm.scale",
        "final_norm.shift",
        "out_head.weight",
    }
    assert set(tiny_model.state_dict()) == expected


# --- Sizes ---


def count_parameters(config: GPTConfig) -> int:
    """By hand: embeddings, per block 12·D² weights and 13·D biases and norms, final norm, head."""
    D, V = config.emb_dim, config.vocab_size
    block = 12 * D * D + 13 * D
    return V * D + config.context_length * D + config.n_layers * block + 2 * D + V * D


@pytest.mark.parametrize("name", GPT2.sizes)
def test_the_four_sizes(name):
    config = ARCHITECTURES[name]
    with torch.device("meta"):
        untied = GPTModel(config)
        tied = GPTModel(dataclasses.replace(config, tie_embeddings=True))
    assert all(parameter.is_meta for parameter in untied.parameters())
    count = sum(parameter.numel() for parameter in untied.parameters())
    assert count == count_parameters(config)
    as_openai_counts = sum(parameter.numel() for parameter in tied.parameters())
    assert as_openai_counts == count - config.vocab_size * config.emb_dim
    assert f"{as_openai_counts / 1e6:.0f}M" == MODEL_SIZES[name]


def test_published_sizes():
    """Radford et al. 2019, table 2, with the counts the release corrected it to."""
    sizes = {
        name: (config.emb_dim, config.n_layers, config.n_heads, config.context_length)
        for name, config in GPT2.sizes.items()
    }
    assert sizes == {
        "gpt2-small": (768, 12, 12, 1024),
        "gpt2-medium": (1024, 24, 16, 1024),
        "gpt2-large": (1280, 36, 20, 1024),
        "gpt2-xl": (1600, 48, 25, 1024),
    }
    assert MODEL_SIZES == {
        "gpt2-small": "124M",
        "gpt2-medium": "355M",
        "gpt2-large": "774M",
        "gpt2-xl": "1558M",
    }
    assert {(c.vocab_size, c.qkv_bias, c.drop_rate) for c in GPT2.sizes.values()} == {
        (50257, True, 0.0)
    }


# --- Initialisation, dropout, tying ---


def test_initialisation():
    """GPT-2's: 0.02, and 0.02 / √(2·layers) where a block writes into the residual stream."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=400, context_length=300, emb_dim=128, n_heads=4, n_layers=8)
    for name, parameter in GPTModel(config).named_parameters():
        if name.endswith("scale"):
            assert (parameter == 1).all()
        elif name.endswith(("bias", "shift")):
            assert (parameter == 0).all()
        else:
            scaled = "out_proj" in name or "layers.2" in name
            expected = 0.02 / math.sqrt(16) if scaled else 0.02
            # 16,384 draws or more: the deviation is known to half a per cent.
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < expected / 20, name


def test_an_untrained_model_knows_nothing():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=400, context_length=32, emb_dim=64, n_heads=4, n_layers=2)
    logits = GPTModel(config)(random_ids(4, 32, vocab_size=400))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), random_ids(128, vocab_size=400))
    assert loss.item() == pytest.approx(math.log(400), rel=0.02)


def test_dropout_is_off_in_evaluation(make_model, tiny_config):
    model = make_model(dataclasses.replace(tiny_config, drop_rate=0.5))
    plain = make_model(tiny_config)
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(input_ids), plain(input_ids))
        model.train()
        first, second = model(input_ids), model(input_ids)
    assert not torch.allclose(first, second)  # control: in training it is on


def set_dropout(model: GPTModel, embedding: float, attention: float, shortcut: float) -> None:
    model.drop_emb.p = embedding
    for block in model.trf_blocks:
        block.att.drop_rate, block.drop_shortcut.p = attention, shortcut


@pytest.mark.parametrize("rates", [(0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)], ids=str)
def test_each_dropout_works_alone(make_model, rates):
    model, input_ids = make_model().train().requires_grad_(False), random_ids(2, 9)
    set_dropout(model, *rates)
    assert not torch.allclose(model(input_ids), model(input_ids))
    set_dropout(model, 0.0, 0.0, 0.0)
    assert torch.equal(model(input_ids), model(input_ids))  # control


def test_both_shortcuts_of_a_block_have_dropout(make_model):
    """With all of what blocks add dropped, only the embeddings are left."""
    model, input_ids = make_model().train().requires_grad_(False), random_ids(2, 9)
    set_dropout(model, 0.0, 0.0, 1.0)
    embedded = model.tok_emb(input_ids) + model.pos_emb(torch.arange(9))
    torch.testing.assert_close(model(input_ids), model.out_head(model.final_norm(embedded)))


def test_tied_embeddings_share_one_parameter(make_model, tiny_config):
    tied = make_model(dataclasses.replace(tiny_config, tie_embeddings=True))
    assert tied.out_head.weight is tied.tok_emb.weight
    assert len(list(tied.parameters())) == len(list(make_model().parameters())) - 1
    tied(random_ids(1, 5)).sum().backward()
    assert tied.tok_emb.weight.grad is not None
    untied = make_model()
    assert untied.out_head.weight is not untied.tok_emb.weight


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_materialize(tiny_config, tie_embeddings):
    config = dataclasses.replace(tiny_config, tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = GPTModel(config)
    assert model.tok_emb.weight.is_meta
    model.materialize()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert (model.out_head.weight is model.tok_emb.weight) is tie_embeddings
    direct = GPTModel(config)
    for made in (model, direct):
        torch.manual_seed(3)
        made.initialize()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, direct.get_parameter(name)), name


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


def test_right_padding_changes_nothing_before_it(exact_model):
    input_ids = random_ids(2, 10)
    padded = torch.cat([input_ids, torch.zeros(2, 5, dtype=torch.int64)], 1)
    torch.testing.assert_close(exact_model(padded)[:, :10], exact_model(input_ids), **EXACT)


def test_the_context_is_not_exceeded(tiny_model):
    assert tiny_model(random_ids(1, 32)).shape == (1, 32, 61)
    with pytest.raises(InputError) as error:
        tiny_model(random_ids(1, 33))
    assert str(error.value) == "33 tokens do not fit the model's context of 32"
    cache = make_cache(tiny_model, 1, 40)
    tiny_model(random_ids(1, 30), cache=cache)
    tiny_model(random_ids(1, 2), cache=cache)
    with pytest.raises(InputError, match="33 tokens do not fit the model's context of 32"):
        tiny_model(random_ids(1, 1), cache=cache)
    batch = pack([list(range(34))], eos_token_id=60)
    with pytest.raises(InputError, match="34 tokens do not fit"):
        tiny_model(batch["input_ids"], layout=layout_of(batch))


# --- The cache ---


@pytest.mark.parametrize("sizes", [[1] * 9, [9], [4, 5], [6, 1, 1, 1], [1, 7, 1], [3, 3, 3]])
def test_cached_decoding_equals_a_full_pass(exact_model, sizes):
    input_ids = random_ids(3, 9)
    expected = exact_model(input_ids)
    cache = make_cache(exact_model, 3, 9)
    parts = [exact_model(part, cache=cache) for part in input_ids.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **EXACT)
    assert cache.lengths.tolist() == [9, 9, 9]
    assert cache.longest == 9


def prefill(model: GPTModel, cache: KVCache, prompts: list[torch.Tensor]) -> None:
    """Put prompts of unequal length into a cache, right-padded with a token that must not show."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=60)
    model.hidden_states(padded, cache=cache, row_lengths=lengths)


def decode(model: GPTModel, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, S, V) of tokens (B, S) fed one at a time."""
    return torch.cat([model(column, cache=cache) for column in tokens.split(1, 1)], 1)


RAGGED = [5, 1, 8, 3]


def ragged_prompts() -> list[torch.Tensor]:
    return [row[:length] for row, length in zip(random_ids(4, 8), RAGGED, strict=True)]


def test_rows_of_unequal_length(exact_model):
    prompts, steps = ragged_prompts(), random_ids(4, 6) % 7
    cache = make_cache(exact_model, 4, 14)
    prefill(exact_model, cache, prompts)
    actual = decode(exact_model, cache, steps)
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, steps[row]])[None]
        torch.testing.assert_close(actual[row], exact_model(whole)[0, len(prompt) :], **EXACT)
    assert cache.lengths.tolist() == [length + 6 for length in RAGGED]
    assert cache.longest == 14


def test_a_longer_piece_after_rows_of_unequal_length(exact_model):
    """Several tokens at once behind a ragged prompt: a second turn of a conversation."""
    prompts, turn = ragged_prompts(), random_ids(4, 4) % 9
    cache = make_cache(exact_model, 4)
    prefill(exact_model, cache, prompts)
    actual = exact_model(turn, cache=cache)
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, turn[row]])[None]
        torch.testing.assert_close(actual[row], exact_model(whole)[0, len(prompt) :], **EXACT)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0], [2], [1, 3], [3, 1], [0, 3, 2], [2, 2, 0]])
def test_rows_leave_the_cache(exact_model, kept):
    prompts, steps = ragged_prompts(), random_ids(4, 5) % 7
    cache = make_cache(exact_model, 4, 13)
    prefill(exact_model, cache, prompts)
    decode(exact_model, cache, steps[:, :2])
    cache.select(torch.tensor(kept))
    assert cache.lengths.tolist() == [RAGGED[row] + 2 for row in kept]
    assert cache.longest == max(RAGGED[row] + 2 for row in kept)
    actual = decode(exact_model, cache, steps[kept, 2:])
    for slot, row in enumerate(kept):
        whole = torch.cat([prompts[row], steps[row]])[None]
        torch.testing.assert_close(actual[slot], exact_model(whole)[0, -3:], **EXACT)


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_any_course_of_a_batch(make_model, lengths, data):
    """Decode, drop and reorder at random; every row's logits stay its own."""
    model = make_model(dtype=torch.float64).requires_grad_(False)
    rows = [row[:length] for row, length in zip(random_ids(len(lengths), 6), lengths, strict=True)]
    cache = make_cache(model, len(rows))
    prefill(model, cache, rows)
    for _ in range(data.draw(st.integers(1, 4))):
        kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=len(rows)))
        rows = [rows[place] for place in kept]
        cache.select(torch.tensor(kept))
        new = random_ids(len(rows), 1) * 3 % 61
        logits = model(new, cache=cache)[:, 0]
        rows = [torch.cat(pair) for pair in zip(rows, new, strict=True)]
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found, model(row[None])[0, -1], **EXACT)


def test_a_full_cache_says_so(exact_model):
    cache = make_cache(exact_model, 1, 4)
    exact_model(random_ids(1, 3), cache=cache)
    with pytest.raises(ValueError, match="KVCache of 4 tokens a row cannot hold 5"):
        exact_model(random_ids(1, 2), cache=cache)
    fresh = make_cache(exact_model, 1, 4)
    exact_model(random_ids(1, 4), cache=fresh)  # control


def test_the_model_keeps_no_state(exact_model):
    """Two caches side by side do not disturb each other, nor a pass without one."""
    input_ids = random_ids(1, 8)
    expected = exact_model(input_ids)
    first, second = make_cache(exact_model, 1), make_cache(exact_model, 1)
    exact_model(input_ids[:, :5], cache=first)
    exact_model(input_ids[:, :2], cache=second)
    torch.testing.assert_close(exact_model(input_ids), expected, **EXACT)
    rest = exact_model(input_ids[:, 5:], cache=first)
    torch.testing.assert_close(rest, expected[:, 5:], **EXACT)
    rest = exact_model(input_ids[:, 2:], cache=second)
    torch.testing.assert_close(rest, expected[:, 2:], **EXACT)


# --- Packed batches; loss and gradients are compared in test_data.py ---


def layout_of(batch: dict[str, torch.Tensor]) -> PackedLayout:
    return PackedLayout(batch["positions"], batch["gather"], batch["scatter"])


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_packed_batch_equals_separate_rows(exact_model, share_prefix):
    rows = [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 9, 4], [7], [1, 2, 3, 4, 5]]
    batch = pack(rows, share_prefix=share_prefix, eos_token_id=60)
    logits = exact_model(batch["input_ids"], layout=layout_of(batch))
    assert logits.shape == (8 if share_prefix else 18, 61)
    for place, ids in enumerate(rows):
        expected = exact_model(torch.tensor([ids]))[0]
        actual = logits[batch["gather"][place, : len(ids)]]
        torch.testing.assert_close(actual, expected, **EXACT)


def test_a_packed_prompt_fills_a_cache(exact_model):
    """How generation begins: prompts packed into a cache, then a token a row."""
    rows = [[1, 2, 3, 4], [1, 2], [1, 2, 3, 9, 9]]
    batch = pack(rows, share_prefix=True, eos_token_id=60)
    cache = make_cache(exact_model, 3)
    lengths = torch.tensor([4, 2, 5])
    exact_model.hidden_states(
        batch["input_ids"], layout=layout_of(batch), cache=cache, row_lengths=lengths
    )
    assert cache.lengths.tolist() == [4, 2, 5]
    logits = exact_model(torch.tensor([[8], [7], [6]]), cache=cache)
    for row, (ids, token) in enumerate(zip(rows, (8, 7, 6), strict=True)):
        expected = exact_model(torch.tensor([[*ids, token]]))[0, -1]
        torch.testing.assert_close(logits[row, 0], expected, **EXACT)


# --- Configurations ---


def test_get_config(tiny_config):
    assert get_config("gpt2-medium") == GPTConfig(emb_dim=1024, n_heads=16, n_layers=24)
    assert get_config(tiny_config) is tiny_config
    assert get_config(dataclasses.asdict(tiny_config)) == tiny_config
    assert get_config({"n_layers": 3}) == GPTConfig(n_layers=3)


FIELDS = (
    "vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate, qkv_bias, tie_embeddings"
)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            "gpt3",
            "unknown 'gpt3'; allowed: gpt2-small, gpt2-medium, gpt2-large, gpt2-xl, smollm2-135m, "
            "smollm2-360m, smollm2-1.7b, llama3.2-1b, llama3.2-3b, qwen2.5-0.5b, qwen3-0.6b, "
            "qwen3-1.7b, auto, or a mapping of GPTConfig or LlamaConfig fields",
        ),
        ({"width": 3}, f"unknown field 'width'; allowed: {FIELDS}"),
        ({"emb_dim": 100}, "emb_dim 100 is not divisible by n_heads 12"),
        ({"n_layers": 0}, "n_layers is 0; it must be >= 1"),
        ({"vocab_size": -5}, "vocab_size is -5; it must be >= 1"),
        ({"drop_rate": 1.0}, "drop_rate 1.0 is outside [0, 1)"),
        ({"drop_rate": -0.1}, "drop_rate -0.1 is outside [0, 1)"),
        ({"drop_rate": float("nan")}, "drop_rate nan is outside [0, 1)"),
    ],
    ids=str,
)
def test_bad_configurations(architecture, message):
    with pytest.raises(InputError) as error:
        get_config(architecture)
    assert str(error.value) == f"architecture: {message}"


@pytest.mark.parametrize(
    "field",
    [
        {"emb_dim": "wide"},
        {"n_layers": None},
        {"n_heads": [12]},
        {"emb_dim": 768.0},
        {"drop_rate": "none"},
        {"qkv_bias": "no"},
    ],
    ids=str,
)
def test_fields_of_the_wrong_type(field: dict[str, Any]):
    (name,) = field
    with pytest.raises(InputError, match=rf"^architecture: .*{name}"):
        get_config(field)


def test_from_pretrained_knows_four_names():
    with pytest.raises(InputError) as error:
        GPTModel.from_pretrained("gpt2-tiny")
    assert str(error.value) == (
        "weights: unknown 'gpt2-tiny'; allowed: gpt2-small, gpt2-medium, gpt2-large, gpt2-xl"
    )


# --- Families ---


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_whole(family):
    """What the rest of the package asks of an entry, for every one that there is."""
    assert family.sizes.keys() == family.repositories.keys()
    assert family.labels.keys() == (family.sizes.keys() if family is GPT2 else set())
    grouped = {} if family is GPT2 else {"n_kv_groups": 2, "head_dim": 8}
    config = dataclasses.replace(
        next(iter(family.sizes.values())),
        vocab_size=97, context_length=16, emb_dim=32, n_heads=4, n_layers=2,
        tie_embeddings=False, **grouped,
    )  # fmt: skip
    assert family_of(config) is family
    model = family.model(config)
    state = model.state_dict()
    tensors = dict(family.to_hf(state))
    back = family.from_hf(tensors, config)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert family.from_hf_config(family.hf_config(config)) == config
    assert set(tensors) <= set(family.gguf_names(config.n_layers))
    book = family.book_state_dict(model)
    assert {name for name in book if not family.is_book_extra(name)} == set(state)
    hidden = model.hidden_states(torch.arange(8)[None])
    assert hidden.shape == (1, 8, config.emb_dim)
    layers = {name for name, _ in model.trf_blocks[0].named_modules()}
    for packed in (False, True):
        for tensor in family.activation_numbers(config, packed):
            assert tensor.numbers > 0
            assert layers >= set(tensor.needed_by)
    if family.tokenizer is None:  # it comes with the weights
        return
    tokenizer = family.tokenizer()
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("naïve"))) == "naïve".encode()
