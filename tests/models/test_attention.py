"""Softmax attention against its definition with all T^2 weights: windows, sinks, queries after a cache."""

from __future__ import annotations

import math
import warnings

import pytest
import specs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from powerplan.models.mixers import attention
from powerplan.models.mixers.attention import lse_argument, softmax_attention
from powerplan.models.mixers.sinks import all_pairs_with_sinks, flash_with_sinks, rescale_for_sinks, sdpa_with_sinks


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None = None) -> Tensor:
    """Softmax attention with all T x S weights. [B, T, H, K], [B, S, G, K], [B, S, G, V], [H] -> [B, T, H, V]."""
    repeats, tokens, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    seen = seen if window is None else seen.triu(keys - tokens + 1 - window)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1)[..., :keys], v)


@settings(max_examples=40)
@given(specs.windows, specs.contexts.filter(lambda tokens: tokens < 200))
def test_windows_equal_the_definition(window: int | None, tokens: int) -> None:
    torch.manual_seed(tokens)
    q = torch.randn(2, tokens, 4, 6, dtype=torch.float64)
    k, v = torch.randn(2, tokens, 2, 6, dtype=torch.float64), torch.randn(2, tokens, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(softmax_attention(q, k, v, window), by_definition(q, k, v, window))


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_queries_after_a_cache_in_blocks_equal_the_definition(tokens: int, before: int, has_sinks: bool) -> None:
    torch.manual_seed(tokens)
    q = torch.randn(2, tokens, 4, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, before + tokens, 2, 6, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES_PER_MASK", 7)
        out = softmax_attention(q, k, v, None, sinks)
    torch.testing.assert_close(out, by_definition(q, k, v, None, sinks))


def test_a_window_costs_no_square() -> None:
    with FlopCounterMode(display=False) as counter:
        for tokens in (4096, 8192):
            x = torch.empty(1, tokens, 2, 8, device="meta")
            softmax_attention(x, x, x, 256)
    shorter, longer = 4096 / 256 - 1, 8192 / 256 - 1
    first = 2 * 2 * 256**2 * 16  # One block that sees itself alone.
    expected = sum(first + count * 2 * first for count in (shorter, longer))
    assert counter.get_total_flops() == expected


@settings(max_examples=40)
@given(specs.windows, st.integers(1, 60), st.integers(0, 60), st.integers(1, 9))
def test_sinks_equal_the_definition(window: int | None, tokens: int, before: int, values: int) -> None:
    torch.manual_seed(tokens)
    shapes = [(2, tokens, 4, 6), (2, before + tokens, 2, 6), (2, before + tokens, 2, values), (4,)]
    q, k, v, sinks = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    out, expected = softmax_attention(q, k, v, window, sinks), by_definition(q, k, v, window, sinks)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v, sinks), grad), torch.autograd.grad(expected, (q, k, v, sinks), grad)
    )


@pytest.mark.parametrize("causal", [True, False])
def test_sinks_by_all_pairs_equal_those_by_flash(causal: bool) -> None:
    """GPUs use all pairs where a few tokens follow a cache."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(4, dtype=torch.float64)
    mask = None if causal else torch.ones(9, 9, dtype=torch.bool).tril(2).triu(-3)
    out = all_pairs_with_sinks(q, k, v, sinks, mask, causal)
    torch.testing.assert_close(out, flash_with_sinks(q, k, v, sinks, mask, causal))


def test_flex_attention_gives_the_log_sum_exp_that_sinks_need() -> None:
    torch.manual_seed(0)
    q, k, v, sinks = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says that it is not compiled.
        out, lse = flex_attention(q, k, v, **lse_argument())  # type: ignore[misc]
    with_sinks = rescale_for_sinks(out, getattr(lse, "lse", lse), sinks)
    torch.testing.assert_close(with_sinks, sdpa_with_sinks(q, k, v, sinks))
