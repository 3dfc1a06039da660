"""Attention written out and fused: the same numbers, for any heads, masks and kinds of number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_sft.models import attention
from lightning_sft.models.attention import _write_out, attend


def tensors(heads: int, groups: int, queries: int, keys: int, dtype=torch.float64):
    rng = torch.Generator().manual_seed(3)
    shapes = [(3, heads, queries, 8), (3, groups, keys, 8), (3, groups, keys, 8)]
    return [torch.randn(shape, generator=rng, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_written_out_equals_the_fused_kernel(heads, groups, masked):
    query, key, value = tensors(heads, groups, 5, 7 if masked else 5)
    mask = None
    if masked:
        ends = torch.tensor([[1, 2, 3, 4, 5], [3, 4, 5, 6, 7], [2, 3, 4, 5, 6]])
        mask = (torch.arange(7) < ends[:, :, None])[:, None]
    wanted = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    found = _write_out(query, key, value, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), (query, key, value))
    grads = torch.autograd.grad((found * weight).sum(), (query, key, value))
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("queries", "keys", "dtype", "written_out"),
    [
        (64, 64, torch.bfloat16, True),
        (500, 500, torch.bfloat16, False),
        (1, 500, torch.bfloat16, True),
        (64, 64, torch.float32, False),
        (1, 64, torch.float32, False),
    ],
)
def test_which_way_is_taken(monkeypatch, queries, keys, dtype, written_out):
    taken = []
    monkeypatch.setattr(attention, "_write_out", lambda *inputs: taken.append(1) or inputs[0])
    mask = torch.ones(3, 1, queries, keys, dtype=torch.bool)
    with torch.no_grad():
        attend(*tensors(4, 2, queries, keys, dtype), mask)
    assert bool(taken) is written_out
    taken.clear()
    attend(*tensors(4, 2, queries, keys, dtype), mask)
    assert not taken  # training holds no scores


def test_half_precision_is_near_the_exact_result():
    query, key, value = (tensor.detach() for tensor in tensors(6, 2, 40, 40))
    wanted = _write_out(query, key, value, None)
    with torch.no_grad():
        found = attend(*(tensor.bfloat16() for tensor in (query, key, value)))
    assert (found - wanted).abs().max() < 0.03
