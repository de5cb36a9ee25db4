"""Forgetting attention in pieces against its definition with all T x S weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import HEADS, MIXERS, spec_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from powerplan.errors import InputError
from powerplan.mixers import Forgetting
from powerplan.models import Cache, build_layer, build_model
from powerplan.models.mixers import pieces
from powerplan.models.mixers.forgetting import forgetting_attention


def by_definition(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, window: int | None = None) -> Tensor:
    """Softmax of products and of sums of log gates, which are added up key by key."""
    tokens, keys = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    rows = []
    for row in range(tokens):
        query = keys - tokens + row
        first = 0 if window is None else max(0, query + 1 - window)
        decay = [log_g[:, key + 1 : query + 1].sum(1) for key in range(first, query + 1)]
        scores = torch.einsum("bhk,bshk->bhs", q[:, row], k[:, first : query + 1]) / math.sqrt(q.shape[-1])
        weights = (scores + torch.stack(decay, -1)).softmax(-1)
        rows.append(torch.einsum("bhs,bshv->bhv", weights, v[:, first : query + 1]))
    return torch.stack(rows, 1)


def inputs(tokens: int, keys: int, dtype: torch.dtype = torch.float64, strongest: float = 2.0) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = [(2, tokens, 4, 6), (2, keys, 2, 6), (2, keys, 2, 5)]
    log_g = -strongest * torch.rand(2, keys, 4, dtype=dtype) ** 2
    return [x.requires_grad_() for x in (*(torch.randn(shape, dtype=dtype) for shape in shapes), log_g)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 30),
    st.none() | st.integers(1, 45),
    st.sampled_from([1, 7, 256]),
)
def test_pieces_equal_the_definition(tokens: int, before: int, window: int | None, longest: int) -> None:
    given = inputs(tokens, before + tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MAX_QUERIES", longest)
        out = forgetting_attention(*given, window)
    expected = by_definition(*given, window)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(result, given, grad) for result in (out, expected)))


def test_gates_of_1_leave_softmax_attention() -> None:
    q, k, v, log_g = inputs(30, 30)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(forgetting_attention(q, k, v, torch.zeros_like(log_g)), plain.transpose(1, 2))


def test_long_contexts_keep_their_precision_in_float32() -> None:
    """Sums of log gates reach -5,000 here, of which float32 has 2e-4: as scores, weights would be off by as much."""
    torch.manual_seed(0)
    tokens, keys = 4, 10_000
    q, k, v = (torch.randn(1, length, 1, 4, dtype=torch.float64) for length in (tokens, keys, keys))
    log_g = -torch.rand(1, keys, 1, dtype=torch.float64).float()
    exact = forgetting_attention(q, k, v, log_g.double())
    out = forgetting_attention(q.float(), k.float(), v.float(), log_g)
    assert (out - exact).abs().max() < 2e-6 * exact.abs().max()


def test_pieces_leave_out_keys_after_them() -> None:
    """Pieces of 256 of 1,024 queries meet 256, 512, 768 and 1,024 keys."""
    x = torch.empty(1, 1024, 2, 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        forgetting_attention(x, x, x, x[..., 0])
    assert counter.get_total_flops() == 2 * 2 * (8 + 8) * 256 * (256 + 512 + 768 + 1024)


def test_the_layer_equals_its_equations() -> None:
    """Without positions; the gates have a bias, and begin at a half."""
    torch.manual_seed(0)
    layer = build_layer(spec_of(Forgetting(**HEADS, qk_norm="head", output_gate=True)), dtype=torch.float64).mixer
    assert layer is not None
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.5)
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    projections: Any = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (project(x).unflatten(-1, (count, -1)) for project, count in zip(projections, (4, 2, 2), strict=True))
    norms: Any = (layer.q_norm, layer.k_norm)
    q, k = (F.rms_norm(part, (6,), norm.weight, 1e-6) for part, norm in zip((q, k), norms, strict=True))
    gate: Any = layer.forget_gate
    out = by_definition(q, k, v, (x @ gate.weight.T + gate.bias).sigmoid().log())
    parts: Any = (layer.output_gate, layer.o_proj)
    expected = (out.flatten(-2) * (x @ parts[0].weight.T).sigmoid()) @ parts[1].weight.T
    torch.testing.assert_close(layer(x), expected)
    begins: Any = build_model(spec_of(MIXERS["forgetting"])).layers[0].mixer
    assert begins.forget_gate.bias.abs().max() == 0


def test_a_cache_in_half_precision_stays_near_the_whole() -> None:
    """Log gates are rounded one by one, by 2^-9 of each at most."""
    torch.manual_seed(0)
    model = build_model(spec_of(MIXERS["forgetting"], repeat=2), dtype=torch.bfloat16)
    tokens, cache = torch.randint(9, (2, 200)), Cache()
    with torch.no_grad():
        outs = [model(part, cache) for part in tokens.split([150, *[1] * 50], 1)]
        whole = model(tokens)
    error = (torch.cat(outs, 1) - whole).float().square().mean().sqrt() / whole.float().square().mean().sqrt()
    assert error < 2**-7


@pytest.mark.parametrize("field", ["sinks", "shared_kv", "uncached", "keys_as_values", "differential"])
def test_fields_that_no_published_layer_has(field: str) -> None:
    heads = HEADS | ({"v_head_dim": HEADS["head_dim"]} if field == "keys_as_values" else {})
    with pytest.raises(InputError, match=f"forgetting layers with {field} are not built"):
        build_layer(spec_of(Forgetting(**heads, **{field: True})))
