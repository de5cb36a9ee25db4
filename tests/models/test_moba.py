"""Mixture of block attention, block after block, against softmax attention with a mask of what is picked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import HEADS, spec_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from powerplan.mixers import MoBA
from powerplan.models import build_layer
from powerplan.models.mixers import pieces
from powerplan.models.mixers.moba import block_attention, block_means


def picked_keys(q: Tensor, k: Tensor, block_size: int, top_k: int) -> Tensor:
    """Return the mask [B, H, T, S] of what each query head sees; k [B, S, H, K] of the query heads."""
    batch, tokens, heads, _ = q.shape
    keys = k.shape[1]
    seen = torch.zeros(batch, heads, tokens, keys, dtype=torch.bool)
    for row in range(tokens):
        query = keys - tokens + row
        own = query // block_size
        seen[:, :, row, own * block_size : query + 1] = True
        if not own or top_k == 1:
            continue
        means = torch.stack([k[:, at * block_size : (at + 1) * block_size].mean(1) for at in range(own)], 2)
        scores = torch.einsum("bhk,bhnk->bhn", q[:, row], means)
        for at in scores.topk(min(own, top_k - 1)).indices.unbind(-1):
            for offset in range(block_size):
                seen[:, :, row].scatter_(2, at[..., None] * block_size + offset, True)
    return seen


def by_definition(q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    seen = picked_keys(q.detach(), k.detach(), block_size, top_k)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def inputs(tokens: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = [(2, tokens, 4, 6), (2, keys, 2, 6), (2, keys, 2, 5)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (7, 2**25), (256, 2**25)]),
)
def test_blocks_equal_the_definition(
    tokens: int, before: int, block_size: int, top_k: int, sizes: tuple[int, int]
) -> None:
    """Pieces of a single query too, and some after a cache."""
    q, k, v = inputs(tokens, before + tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MAX_QUERIES", sizes[0])
        patch.setattr(pieces, "MAX_NUMBERS", sizes[1])
        out = block_attention(q, k, v, block_means(k, block_size), block_size, top_k)
    expected = by_definition(q, k, v, block_size, top_k)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(result, (q, k, v), grad) for result in (out, expected)))


def test_all_blocks_are_softmax_attention() -> None:
    q, k, v = inputs(50, 50)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    out = block_attention(q, k, v, block_means(k, 7), 7, 8)
    torch.testing.assert_close(out, plain.transpose(1, 2))


@pytest.mark.parametrize("largest", [1.0, 40.0])
def test_large_scores_stay_finite_in_float32(largest: float) -> None:
    """Scores up to some thousands: weights of blocks are relative to the largest log-sum-exp."""
    exact = [(largest * x).detach().requires_grad_() for x in inputs(60, 60)]
    rounded = [x.detach().float().requires_grad_() for x in exact]
    results = [block_attention(q, k, v, block_means(k, 8), 8, 3) for q, k, v in (exact, rounded)]
    torch.testing.assert_close(results[1].double(), results[0], rtol=1e-3, atol=1e-3 * largest)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(results[1].sum(), rounded))


def test_half_precision_is_as_near_as_softmax_attention() -> None:
    exact = [x.detach() for x in inputs(60, 60, torch.float32)]
    errors = []
    for run in (
        lambda q, k, v: block_attention(q, k, v, block_means(k, 8), 8, 8),
        lambda q, k, v: by_definition(q, k, v, 8, 8),
    ):
        whole = run(*exact)
        half = run(*(x.bfloat16() for x in exact))
        assert half.dtype == torch.bfloat16
        errors.append((half.float() - whole).square().mean().sqrt())
    assert errors[0] <= 2 * errors[1]


def test_what_is_executed_grows_with_the_picks_and_not_with_the_context() -> None:
    """Beside the scores of mean keys: blocks of 16 queries over 16 keys, and 16 keys for each pick."""
    x = torch.randn(1, 320, 2, 8)
    counts = {}
    for tokens in (160, 320):
        with FlopCounterMode(display=False) as counter:
            block_attention(x[:, :tokens], x[:, :tokens], x[:, :tokens], block_means(x[:, :tokens], 16), 16, 3)
        scores = 2 * 2 * 8 * tokens * (tokens // 16 - 1)
        counts[tokens] = counter.get_total_flops() - scores
    first = 2 * 2 * (8 + 8) * 16 * 16 * (1 + 2 + 8 * 3)
    assert counts == {160: first, 320: first + 2 * 2 * (8 + 8) * 16 * 16 * 10 * 3}


def test_the_layer_equals_its_equations() -> None:
    """A norm over each head, then the gate."""
    torch.manual_seed(0)
    settings = MoBA(**HEADS, block_size=4, top_k=2, output_norm=True, output_gate=True)
    layer: Any = build_layer(spec_of(settings, position_embeddings=64), dtype=torch.float64).mixer
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.5)
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    q, k, v = (
        project(x).unflatten(-1, (count, -1))
        for project, count in ((layer.q_proj, 4), (layer.k_proj, 2), (layer.v_proj, 2))
    )
    out = F.rms_norm(by_definition(q, k, v, 4, 2), (5,), layer.output_norm.weight, 1e-6).flatten(-2)
    torch.testing.assert_close(layer(x), (out * layer.output_gate(x).sigmoid()) @ layer.o_proj.weight.T)
