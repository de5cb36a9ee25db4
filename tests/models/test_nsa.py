"""Native sparse attention in pieces against its equations, query by query, with masks of what is picked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import HEADS, spec_of
from torch import Tensor

from powerplan.mixers import NSA
from powerplan.models import build_layer
from powerplan.models.mixers import nsa, pieces


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query: [B, H, K], [B, n, H, K], [B, n, H, V]."""
    weights = (torch.einsum("bhk,bnhk->bhn", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhn,bnhv->bhv", weights, v), weights


def scores_of_blocks(weights: Tensor, query: int, mixer: NSA) -> Tensor:
    """Return the scores [B, G, m] of the blocks up to the query's own: tokens in common, counted one by one."""
    groups = weights.unflatten(1, (mixer.kv_heads, -1)).sum(2)
    own = query // mixer.select_size
    scores = torch.zeros(*groups.shape[:2], own + 1, dtype=weights.dtype)
    for at in range(own + 1):
        block = set(range(at * mixer.select_size, (at + 1) * mixer.select_size))
        for index in range(groups.shape[2]):
            start = index * mixer.compress_stride
            scores[..., at] += groups[..., index] * len(block & set(range(start, start + mixer.compress_size)))
    scores[..., max(0, own - 1)] = 1e9
    scores[..., 0] = 2e9
    scores[..., own] = 3e9
    return scores


def by_definition(q: Tensor, k: Tensor, v: Tensor, mixer: NSA) -> tuple[Tensor, Tensor]:
    """Return the outputs of the compressed branch and of the picked one."""
    tokens, keys = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    size, stride = mixer.compress_size, mixer.compress_stride
    compressed, picked = [], []
    for row in range(tokens):
        query = keys - tokens + row
        starts = [start for start in range(0, query + 1, stride) if start + size <= query + 1]
        weights = torch.zeros(q.shape[0], q.shape[2], 0, dtype=q.dtype)
        out = torch.zeros(q.shape[0], q.shape[2], v.shape[3], dtype=q.dtype)
        if starts:
            means = (torch.stack([x[:, at : at + size].mean(1) for at in starts], 1) for x in (k, v))
            out, weights = attend(q[:, row], *means)
        compressed.append(out)
        scores = scores_of_blocks(weights.detach(), query, mixer)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : mixer.select_count]
        outs = torch.empty_like(out)
        for batch in range(q.shape[0]):
            for head in range(q.shape[2]):
                blocks = best[batch, head // (q.shape[2] // mixer.kv_heads)].tolist()
                seen = [at for at in range(query + 1) if at // mixer.select_size in blocks]
                one = slice(batch, batch + 1), slice(head, head + 1)
                outs[batch, head] = attend(q[:, row][one], k[one[0], seen, one[1]], v[one[0], seen, one[1]])[0]
        picked.append(outs)
    return torch.stack(compressed, 1), torch.stack(picked, 1)


def inputs(tokens: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = [(2, tokens, 4, 6), (2, keys, 2, 6), (2, keys, 2, 5)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def run(q: Tensor, k: Tensor, v: Tensor, mixer: NSA) -> tuple[Tensor, Tensor]:
    means = [nsa.block_means(x, mixer.compress_size, mixer.compress_stride) for x in (k, v)]
    return nsa.sparse_attention(q, k, v, (means[0], means[1]), mixer)


settings_of_nsa = st.builds(
    NSA,
    **{name: st.just(value) for name, value in HEADS.items()},
    compress_size=st.integers(1, 9),
    compress_stride=st.integers(1, 9),
    select_size=st.integers(1, 9),
    select_count=st.integers(1, 5),
)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 25), st.integers(0, 20), settings_of_nsa, st.sampled_from([1, 7, 256]))
def test_pieces_equal_the_definition(tokens: int, before: int, mixer: NSA, longest: int) -> None:
    given = inputs(tokens, before + tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MAX_QUERIES", longest)
        outs = run(*given, mixer)
    expected = by_definition(*given, mixer)
    torch.testing.assert_close(outs, expected)
    grads = [torch.randn_like(out) for out in outs]
    both = [
        torch.autograd.grad(sum((o * g).sum() for o, g in zip(result, grads, strict=True)), given)  # type: ignore
        for result in (outs, expected)
    ]
    torch.testing.assert_close(*both)


def test_scores_are_those_of_the_paper() -> None:
    """Equation 9 counts blocks from 1: the score of block j is the sum of p[(l'/d) j - m - n], m < l'/d and n < l/d."""
    mixer = NSA(**HEADS, compress_size=6, compress_stride=2, select_size=8)
    blocks = 5
    weights = torch.rand(2, 20, dtype=torch.float64)
    expected = torch.zeros(2, blocks, dtype=torch.float64)
    for block in range(1, blocks + 1):
        for m in range(8 // 2):
            for n in range(6 // 2):
                index = 8 // 2 * block - m - n
                if 1 <= index <= 20:
                    expected[:, block - 1] += weights[:, index - 1]
    torch.testing.assert_close(nsa._shared(weights, blocks, mixer), 2 * expected)


def test_a_piece_gathers_no_more_than_fits() -> None:
    """1 k keys of a query for 4 groups of 64 + 64 features are 524,288 numbers: 64 queries at once."""
    mixer = NSA(heads=16, kv_heads=4, head_dim=64)
    sizes = []

    class Gathers(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.gather.default:
                sizes.append(out.numel())
            return out

    q, k, v = (torch.empty(1, 4096, heads, 64, device="meta") for heads in (16, 4, 4))
    with Gathers(), torch.no_grad():
        run(q, k, v, mixer)
    assert set(sizes) == {64 * 4 * 1024 * 64}
    assert len(sizes) == 2 * (4096 - 1024) // 64


def test_the_layer_is_the_gated_sum_of_its_branches() -> None:
    torch.manual_seed(0)
    mixer = NSA(**HEADS, compress_size=5, compress_stride=3, select_size=4, select_count=2, window=3)
    layer: Any = build_layer(spec_of(mixer, position_embeddings=64), dtype=torch.float64).mixer
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    q, k, v, _ = layer.project(x)
    compressed, picked = by_definition(q, k, v, mixer)
    keys, values = (part.repeat_interleave(2, 2) for part in (k, v))
    near = [slice(max(0, row - 2), row + 1) for row in range(19)]
    window = torch.stack([attend(q[:, at.stop - 1], keys[:, at], values[:, at])[0] for at in near], 1)
    gates = (x @ layer.branch_gates.weight.T).sigmoid().unflatten(-1, (4, 3))
    out = sum(gates[..., at, None] * branch for at, branch in enumerate((compressed, picked, window)))
    torch.testing.assert_close(layer(x), out.flatten(-2) @ layer.o_proj.weight.T)  # type: ignore[union-attr]
