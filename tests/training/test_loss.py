"""The summed loss: torch's own value and gradients, with no more logits at hand than a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sft.training import loss as loss_module
from lightning_sft.training.loss import sum_cross_entropy

M, D, V = 12, 6, 17
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T)[places], targets, reduction="sum")


def make_inputs(
    num_targets: int = 9, dtype: torch.dtype = torch.float64, m: int = M, v: int = V
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and head with gradients; targets at random places, some more than once."""
    generator = torch.Generator().manual_seed(num_targets)
    hidden = torch.randn(m, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, D, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(v, (num_targets,), generator=generator)
    places = torch.randint(m, (num_targets,), generator=generator)
    return hidden, weight, targets, places


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_SIZE", 3)


def assert_same(inputs: tuple[torch.Tensor, ...], **tolerances: float) -> None:
    """Value and both gradients equal those of torch's own cross-entropy."""
    tolerances = tolerances or EXACT
    hidden, weight, *_ = inputs
    expected = reference(*inputs)
    actual = sum_cross_entropy(*inputs)
    torch.testing.assert_close(actual, expected, **tolerances)
    wanted = torch.autograd.grad(expected / 7, (hidden, weight))  # divided, as a step does
    found = torch.autograd.grad(actual / 7, (hidden, weight))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)


# --- Parity ---


@pytest.mark.parametrize("num_targets", [1, 2, 9, 40])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 11, 12, 13, 512])
def test_value_and_gradients(monkeypatch, num_targets, chunk_size):
    monkeypatch.setattr(loss_module, "CHUNK_SIZE", chunk_size)
    assert_same(make_inputs(num_targets))


@pytest.mark.parametrize(
    "places",
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],  # all, in order
        [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        [4, 4, 4, 4, 4, 4, 4],  # all at one place
        [2, 0, 2, 1, 0, 2],  # a chunk's border within a run of duplicates
        [11],
        [0, 0, 11, 11],
    ],
    ids=str,
)
def test_places(small_chunks, places):
    hidden, weight, targets, _ = make_inputs(len(places))
    assert_same((hidden, weight, targets, torch.tensor(places)))


def test_equal_targets_at_one_place_count_each_time(small_chunks):
    hidden, weight, _, _ = make_inputs()
    inputs = hidden, weight, torch.tensor([5, 5, 5]), torch.tensor([2, 2, 2])
    assert_same(inputs)
    once = sum_cross_entropy(hidden, weight, torch.tensor([5]), torch.tensor([2]))
    torch.testing.assert_close(sum_cross_entropy(*inputs), 3 * once, **EXACT)


@settings(max_examples=50)
@given(
    pairs=st.lists(st.tuples(st.integers(0, V - 1), st.integers(0, M - 1)), min_size=1),
    chunk_size=st.integers(1, 14),
)
def test_arbitrary_targets(pairs, chunk_size):
    hidden, weight, _, _ = make_inputs()
    targets, places = map(torch.tensor, zip(*pairs, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_SIZE", chunk_size)
        assert_same((hidden, weight, targets, places))


def test_float32_and_extreme_logits(small_chunks):
    assert_same(make_inputs(dtype=torch.float32), atol=1e-5, rtol=1e-5)
    hidden, weight, targets, places = make_inputs(dtype=torch.float32)
    inputs = (hidden.detach() * 1e3).requires_grad_(), weight, targets, places
    assert torch.isfinite(sum_cross_entropy(*inputs))
    assert_same(inputs, atol=1e-2, rtol=1e-5)  # gradients of the head reach 1e3


def test_gradients_add_up_over_two_uses(small_chunks):
    """A tied head: the embedding's gradient and the head's come together in one tensor."""
    _, weight, targets, places = make_inputs()

    def tied(loss: Any) -> torch.Tensor:
        return loss(weight[:M] * 2.0, weight, targets, places)

    ours, theirs = (torch.autograd.grad(tied(f), weight) for f in (sum_cross_entropy, reference))
    torch.testing.assert_close(ours, theirs, **EXACT)


# --- Special cases ---


def test_no_targets_give_a_zero_with_a_graph():
    hidden, weight, targets, places = make_inputs(0)
    loss = sum_cross_entropy(hidden, weight, targets, places)
    assert loss.item() == 0.0
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_without_gradients_none_are_made(small_chunks, monkeypatch):
    inputs = make_inputs()
    expected = reference(*inputs).detach()
    made, bincount = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *a, **k: made.append(1) or bincount(*a, **k))
    with torch.no_grad():
        loss = sum_cross_entropy(*inputs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, **EXACT)
    frozen = inputs[0].detach(), inputs[1].detach(), *inputs[2:]
    torch.testing.assert_close(sum_cross_entropy(*frozen), expected, **EXACT)
    assert made == []
    sum_cross_entropy(*inputs)
    assert made  # control: the gradients' own step, chunk by chunk


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(small_chunks, frozen):
    hidden, weight, targets, places = make_inputs()
    free = weight if frozen == "hidden" else hidden
    (expected,) = torch.autograd.grad(reference(hidden, weight, targets, places), free)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    sum_cross_entropy(hidden, weight, targets, places).backward()
    assert free.grad is not None
    torch.testing.assert_close(free.grad, expected, **EXACT)
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_bf16_autocast_is_close(small_chunks):
    hidden, weight, targets, places = make_inputs(40, torch.float32)
    wanted = torch.autograd.grad(reference(hidden, weight, targets, places), (hidden, weight))
    expected = reference(hidden, weight, targets, places)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = sum_cross_entropy(hidden, weight, targets, places)
    assert actual.dtype == torch.float32
    # bfloat16 keeps 8 bits: 1 in 256.
    torch.testing.assert_close(actual, expected, atol=0.0, rtol=1 / 256)
    found = torch.autograd.grad(actual, (hidden, weight))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < theirs.norm() / 64
    assert not torch.equal(found[1], wanted[1])  # control: autocast was on


# --- What is held ---


class Recorder(TorchDispatchMode):
    """Sizes of all tensors that operations return, and how many states meet the head."""

    def __init__(self, vocab_size: int, emb_dim: int) -> None:
        super().__init__()
        self.vocab_size, self.emb_dim, self.largest, self.rows = vocab_size, emb_dim, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
            products = (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
            # Logits lie either way round; the head's gradient sums over states, not over D.
            if func in products and self.vocab_size in out.shape:
                inner = next(a for a in args if isinstance(a, torch.Tensor)).shape[1]
                if inner == self.emb_dim:
                    self.rows += out.numel() // self.vocab_size
        return out


def test_a_larger_vocabulary_gets_fewer_positions():
    assert loss_module.count_chunk_positions(50_257) == 512
    assert loss_module.count_chunk_positions(61) == 512
    assert loss_module.count_chunk_positions(150_000) == 171
    assert loss_module.CHUNK_BYTES >= 171 * 150_000 * 4
    assert loss_module.count_chunk_positions(10**9) == 1


@pytest.mark.parametrize("limit", [("CHUNK_SIZE", 16), ("CHUNK_BYTES", 16 * 997 * 4)])
@pytest.mark.parametrize("with_grad", [True, False])
def test_no_more_than_a_chunk_of_logits(monkeypatch, with_grad, limit):
    monkeypatch.setattr(loss_module, *limit)
    num_states, vocab_size = 160, 997
    inputs = make_inputs(80, torch.float32, num_states, vocab_size)
    with torch.set_grad_enabled(with_grad):
        with Recorder(vocab_size, inputs[0].shape[1]) as recorder:
            loss = sum_cross_entropy(*inputs)
            if with_grad:
                loss.backward()
        with Recorder(vocab_size, inputs[0].shape[1]) as control:
            reference(*inputs)
    used = len(inputs[3].unique())
    assert used / 5 < recorder.largest / vocab_size <= 16  # five chunks of like size
    assert recorder.rows == used < 80  # nothing twice, nothing unsupervised
    assert control.largest == control.rows * vocab_size == num_states * vocab_size
