"""One token of decoding: every state is read once, updated, queried, and written once. No gradients.

Legend of the kernels: prologue.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from powerplan.kernels.embedding import multisets
from powerplan.kernels.state import divisor
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import power_of_two

BLOCK = 64
"""Rows of the state that one program reads: 16 KB at V = 64, 32 registers for each of 128 threads."""


@triton.jit
def load_phi(p_x, p_features, p_root, o_d, m_d, dim, P: tl.constexpr):
    """Return the entries o_d of phi(x) in the shared layout (embedding.py), in float32.

    x: features of one token and head, in.
    features: [P, dim] int32 in, the P features that each entry multiplies.
    root: [dim] float32 in, the root of each entry's multinomial.
    """
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
    p_kv,
    p_key,
    p_features,
    p_root,
    p_new_kv,
    p_new_key,
    p_partial_out,
    p_partial_norm,
    dim,
    state_blocks,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BV: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Update BLOCK rows of one state with a token, and query them with its REPEATS queries. Grid: state_blocks N G.

    All tensors are contiguous. D = dim entries of phi, in the layout that states are passed in: no conversion.

    q: [N, G, REPEATS, K] in.
    k: [N, G, K] in.
    v: [N, G, V] in.
    log_g: [N, G] in, where GATED.
    kv: [N, G, D, V] float32 in.
    key: [N, G, D] float32 in, where NORMALIZE.
    features: [P, D] int32 in (load_phi).
    root: [D] float32 in (load_phi).
    new_kv: [N, G, D, V] float32 out, exp(log_g) kv + phi(k) v^T.
    new_key: [N, G, D] float32 out, exp(log_g) key + phi(k), where NORMALIZE.
    partial_out: [state_blocks, N G REPEATS, V] float32 out, this block's part of phi(q)^T new_kv.
    partial_norm: [state_blocks, N G REPEATS] float32 out, likewise of phi(q).new_key, where NORMALIZE.
    """
    i_block = tl.program_id(0) % state_blocks
    i_state = (tl.program_id(0) // state_blocks).to(tl.int64)
    states = tl.num_programs(0) // state_blocks
    o_d = i_block * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < dim
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    m_kv = m_d[:, None] & m_v[None, :]
    o_kv = (i_state * dim + o_d)[:, None] * V + o_v[None, :]

    # Load, decay, add, store: 8 bytes for each of the D V values, the whole cost of a step, for 2 (1 + REPEATS) FLOPs.
    gate = 1.0
    if GATED:
        gate = tl.exp(tl.load(p_log_g + i_state).to(tl.float32))
    b_phi_k = load_phi(p_k + i_state * K, p_features, p_root, o_d, m_d, dim, P)
    b_v = tl.load(p_v + i_state * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_kv = tl.load(p_kv + o_kv, mask=m_kv, other=0.0) * gate + b_phi_k[:, None] * b_v[None, :]
    tl.store(p_new_kv + o_kv, b_kv, mask=m_kv)
    if NORMALIZE:
        b_key = tl.load(p_key + i_state * dim + o_d, mask=m_d, other=0.0) * gate + b_phi_k
        tl.store(p_new_key + i_state * dim + o_d, b_key, mask=m_d)

    # Query the new rows while they are in registers. Every block stores a part of its own: V values for each query,
    # where it has read BLOCK V. Atomic sums would add in another order every time, and not give the same bits again.
    for i_repeat in tl.static_range(REPEATS):
        i_query = i_state * REPEATS + i_repeat
        b_phi_q = load_phi(p_q + i_query * K, p_features, p_root, o_d, m_d, dim, P)
        o_part = i_block.to(tl.int64) * states * REPEATS + i_query
        tl.store(p_partial_out + o_part * V + o_v, tl.sum(b_phi_q[:, None] * b_kv, 0), mask=m_v)
        if NORMALIZE:
            tl.store(p_partial_norm + o_part, tl.sum(b_phi_q * b_key, 0))


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
    state_blocks = -(-dim // BLOCK)
    new_kv, new_key = kv.new_empty(kv.shape), key.new_empty(key.shape)
    partial_out = kv.new_empty(state_blocks, count, heads, value_dim)
    partial_norm = kv.new_empty(state_blocks, count, heads) if normalize else key
    arguments = {
        "p_q": q.contiguous(),
        "p_k": k.contiguous(),
        "p_v": v.contiguous(),
        "p_log_g": kv if log_g is None else log_g.contiguous(),
        "p_kv": kv.contiguous(),
        "p_key": key.contiguous(),
        "p_features": features,
        "p_root": root,
        "p_new_kv": new_kv,
        "p_new_key": new_key,
        "p_partial_out": partial_out,
        "p_partial_norm": partial_norm,
        "dim": dim,
        "state_blocks": state_blocks,
        "K": k.shape[2],
        "V": value_dim,
        "P": p,
        "BV": power_of_two(value_dim),
        "REPEATS": heads // groups,
        "BLOCK": BLOCK,
        "GATED": log_g is not None,
        "NORMALIZE": normalize,
    }
    launch(decode_kernel, count * groups * state_blocks, arguments)
    out = partial_out.sum(0)
    # With a normaliser the scale cancels.
    out = out / divisor(partial_norm.sum(0))[..., None] if normalize else out * scale**p
    return out.to(v.dtype), new_kv, new_key
