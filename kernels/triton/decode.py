"""One token of decoding: the state is read once, written once, and asked in between. No gradients."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from powerplan.kernels.embedding import multisets
from powerplan.kernels.state import divisor
from powerplan.kernels.triton.layout import power_of_two
from powerplan.kernels.triton.shapes import launch

BLOCK = 64
"""Rows of the state that one program reads: 16 KB at V = 64, 32 registers a thread."""


@triton.jit
def load_phi(p_x, p_features, p_root, o_d, m_d, dim, P: tl.constexpr):
    """Entries o_d of phi(x) in the shared layout, in float32. features [P, D] int32, root [D]."""
    b_phi = tl.load(p_root + o_d, mask=m_d, other=0.0)
    for i_factor in tl.static_range(P):
        o_feature = tl.load(p_features + i_factor * dim + o_d, mask=m_d, other=0)
        b_phi *= tl.load(p_x + o_feature, mask=m_d, other=0.0).to(tl.float32)
    return b_phi


@triton.jit
def decode_kernel(
    p_q,
    p_k,
    p_v,
    p_log_g,
    p_state,
    p_key,
    p_features,
    p_root,
    p_new_state,
    p_new_key,
    p_sums,
    p_norms,
    dim,
    tiles,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BV: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """new_state = exp(log_g) state + phi(k) v^T; sums [tiles, N H, V] and norms [tiles, N H] of phi(q) over BLOCK rows.

    q [N, G, REPEATS, K], k [N, G, K], v [N, G, V], log_g [N, G], state [N, G, D, V], key [N, G, D], all contiguous.
    """
    i_tile = tl.program_id(0) % tiles
    i_head = (tl.program_id(0) // tiles).to(tl.int64)
    heads = tl.num_programs(0) // tiles
    o_d = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < dim
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    m_tile = m_d[:, None] & m_v[None, :]
    o_tile = (i_head * dim + o_d)[:, None] * V + o_v[None, :]
    gate = 1.0
    if GATED:
        gate = tl.exp(tl.load(p_log_g + i_head).to(tl.float32))
    b_phi = load_phi(p_k + i_head * K, p_features, p_root, o_d, m_d, dim, P)
    b_v = tl.load(p_v + i_head * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_state = tl.load(p_state + o_tile, mask=m_tile, other=0.0) * gate + b_phi[:, None] * b_v[None, :]
    tl.store(p_new_state + o_tile, b_state, mask=m_tile)
    if NORMALIZE:
        b_key = tl.load(p_key + i_head * dim + o_d, mask=m_d, other=0.0) * gate + b_phi
        tl.store(p_new_key + i_head * dim + o_d, b_key, mask=m_d)
    for i_repeat in tl.static_range(REPEATS):
        i_query = i_head * REPEATS + i_repeat
        b_asked = load_phi(p_q + i_query * K, p_features, p_root, o_d, m_d, dim, P)
        o_sum = i_tile.to(tl.int64) * heads * REPEATS + i_query
        tl.store(p_sums + o_sum * V + o_v, tl.sum(b_asked[:, None] * b_state, 0), mask=m_v)
        if NORMALIZE:
            tl.store(p_norms + o_sum, tl.sum(b_asked * b_key, 0))


@lru_cache(maxsize=16)
def _tables(key_dim: int, p: int, device: torch.device) -> tuple[Tensor, Tensor]:
    features, root = multisets(key_dim, p)
    return features.T.to(device=device, dtype=torch.int32).contiguous(), root.to(device=device, dtype=torch.float32)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, kv: Tensor, key: Tensor, p: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output [N, H, V] and the new kv and key; key is empty where there is no normaliser.

    q [N, H, K], k [N, G, K], v [N, G, V], log_g [N, G], kv [N, G, D, V] and key [N, G, D] in float32.
    """
    count, groups, dim, value_dim = kv.shape
    heads, normalize = q.shape[1], key.numel() > 0
    features, root = _tables(k.shape[2], p, q.device)
    tiles = -(-dim // BLOCK)
    new_kv, new_key = kv.new_empty(kv.shape), key.new_empty(key.shape)
    sums = kv.new_empty(tiles, count, heads, value_dim)
    norms = kv.new_empty(tiles, count, heads) if normalize else key
    arguments = {
        "p_q": q.contiguous(),
        "p_k": k.contiguous(),
        "p_v": v.contiguous(),
        "p_log_g": kv if log_g is None else log_g.contiguous(),
        "p_state": kv.contiguous(),
        "p_key": key.contiguous(),
        "p_features": features,
        "p_root": root,
        "p_new_state": new_kv,
        "p_new_key": new_key,
        "p_sums": sums,
        "p_norms": norms,
        "dim": dim,
        "tiles": tiles,
        "K": k.shape[2],
        "V": value_dim,
        "P": p,
        "BV": power_of_two(value_dim),
        "REPEATS": heads // groups,
        "BLOCK": BLOCK,
        "GATED": log_g is not None,
        "NORMALIZE": normalize,
    }
    launch(decode_kernel, count * groups * tiles, arguments)
    out = sums.sum(0)
    # With a normaliser the scale cancels.
    out = out / divisor(norms.sum(0))[..., None] if normalize else out * scale**p
    return out.to(v.dtype), new_kv, new_key
