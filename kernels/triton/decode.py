"""One token of decoding: every state is read once, updated, queried, and written once, in two launches. No gradients.

Legend of the kernels: prologue.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from powerplan.kernels.embedding import multisets
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import power_of_two
from powerplan.kernels.triton.prologue import divisor

VALUES = 4096
"""Values of the state that one program reads: 16 KB, 32 registers for each of 128 threads.

Two (P = 4) to four (P = 2) programs fit on an SM, with 32 to 64 KB under way; 3 TB/s on 132 SMs at a latency of 0.7 us
take 16 KB. At 64 values a row a program has 64 rows, and for each of its queries stores one row of output where it
reads and writes 64.
"""

MOST_ROWS = 64
"""Rows of the state that one program reads at most: with 128, at V = 32, two values spill on some GPUs."""

COLUMNS = 16
"""Values that one program of combine_kernel sums over all blocks: 64 bytes of a row, as each block stores them."""


@triton.jit
def load_phi(p_x, b_entry, m_d, P: tl.constexpr):
    """Return entries of phi(x) in the shared layout (embedding.py), in float32.

    x: features of one token and head, in.
    entry: what _table holds for these entries.
    """
    b_phi = (b_entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    for i_factor in tl.static_range(P):
        b_phi *= tl.load(p_x + ((b_entry >> (8 * i_factor)) & 255), mask=m_d, other=0.0).to(tl.float32)
    return b_phi


@triton.jit
def decode_kernel(
    p_q,
    p_k,
    p_v,
    p_log_g,
    p_kv,
    p_key,
    p_table,
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
    KV_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Update BLOCK rows of one state with a token, and query them with its REPEATS queries. Grid: state_blocks N G.

    All tensors but kv and key are contiguous. D = dim entries of phi, in the layout that states are passed in: no
    conversion.

    q: [N, G, REPEATS, K] in.
    k: [N, G, K] in.
    v: [N, G, V] in.
    log_g: [N, G] in, where GATED.
    kv: [N, G, D, V] float32 in, KV_ROW elements from row to row.
    key: [N, G, D] float32 in, KEY_ROW elements from entry to entry, where NORMALIZE.
    table: [D] int64 in (_table).
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
    o_row = i_state * dim + o_d

    # Load, decay, add, store: 8 bytes for each of the D V values, the whole cost of a step, for 2 (1 + REPEATS) FLOPs.
    # All of the state is asked for before any of it is stored: the compiler moves no load over a store.
    b_kv = tl.load(p_kv + o_row[:, None] * KV_ROW + o_v[None, :], mask=m_kv, other=0.0)
    if NORMALIZE:
        b_key = tl.load(p_key + o_row * KEY_ROW, mask=m_d, other=0.0)
    b_entry = tl.load(p_table + o_d, mask=m_d, other=0)
    b_v = tl.load(p_v + i_state * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    gate = 1.0
    if GATED:
        gate = tl.exp(tl.load(p_log_g + i_state).to(tl.float32))
    b_phi_k = load_phi(p_k + i_state * K, b_entry, m_d, P)
    b_kv = b_kv * gate + b_phi_k[:, None] * b_v[None, :]
    tl.store(p_new_kv + o_row[:, None] * V + o_v[None, :], b_kv, mask=m_kv)
    if NORMALIZE:
        b_key = b_key * gate + b_phi_k
        tl.store(p_new_key + o_row, b_key, mask=m_d)

    # Query the new rows while they are in registers. Every block stores a part of its own: V values for each query,
    # where it has read BLOCK V. Atomic sums would add in another order every time, and not give the same bits again.
    for i_repeat in tl.static_range(REPEATS):
        i_query = i_state * REPEATS + i_repeat
        b_phi_q = load_phi(p_q + i_query * K, b_entry, m_d, P)
        o_part = i_block.to(tl.int64) * states * REPEATS + i_query
        tl.store(p_partial_out + o_part * V + o_v, tl.sum(b_phi_q[:, None] * b_kv, 0), mask=m_v)
        if NORMALIZE:
            tl.store(p_partial_norm + o_part, tl.sum(b_phi_q * b_key, 0))


@triton.jit
def combine_kernel(
    p_partial_out,
    p_partial_norm,
    p_out,
    state_blocks,
    power_scale,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Sum the parts of COLUMNS values of one query's output, and normalise. Grid: N H cdiv(V, COLUMNS).

    partial_out: [state_blocks, N H, V] float32 in (decode_kernel).
    partial_norm: [state_blocks, N H] float32 in, where NORMALIZE.
    out: [N H, V] out.
    power_scale: scale^P. Where NORMALIZE it cancels, and decides with the sum of weights whether that counts as 0.
    BLOCK: parts summed at a time.
    """
    i_query = (tl.program_id(0) // tl.cdiv(V, COLUMNS)).to(tl.int64)
    queries = tl.num_programs(0) // tl.cdiv(V, COLUMNS)
    o_v = tl.program_id(0) % tl.cdiv(V, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    m_v = o_v < V
    b_sum = tl.zeros([BLOCK, COLUMNS], tl.float32)
    b_norm = tl.zeros([BLOCK], tl.float32)
    for first in range(0, state_blocks, BLOCK):
        o_block = first + tl.arange(0, BLOCK)
        m_block = o_block < state_blocks
        o_part = o_block.to(tl.int64) * queries + i_query
        m_part = m_block[:, None] & m_v[None, :]
        b_sum += tl.load(p_partial_out + o_part[:, None] * V + o_v[None, :], mask=m_part, other=0.0)
        if NORMALIZE:
            b_norm += tl.load(p_partial_norm + o_part, mask=m_block, other=0.0)
    b_out = tl.sum(b_sum, 0)
    b_out *= power_scale
    if NORMALIZE:
        b_out /= divisor(tl.sum(b_norm, 0) * power_scale)
    tl.store(p_out + i_query * V + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)


@lru_cache(maxsize=16)
def _table(key_dim: int, p: int, device: torch.device) -> Tensor:
    """Return an integer for each entry of phi, [D] int64: one load of 8 bytes for what phi is made of.

    The p features that the entry multiplies are its lower bytes, and the root of its multinomial, in the bits of a
    float32, its upper half.
    """
    features, root = multisets(key_dim, p)
    factors = features.long() << (8 * torch.arange(p))
    entries: Tensor = factors.sum(1) + (root.float().view(torch.int32).long() << 32)
    return entries.to(device)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Return x, [N, G, D] or [N, G, D, V], as N G D rows, and the elements from the start of one to that of the next.

    A state that a prefill returned has its normaliser as the last of V + 1 columns: kv and key are views of that, and
    to copy them would take as long as the step. A copy stands for what has no rows at even distances.
    """
    rows = x.flatten(0, 2)
    if x.ndim == 4 and x.shape[3] > 1 and x.stride(3) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, kv: Tensor, key: Tensor, p: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output [N, H, V] and the new kv and key; key is empty where there is no normaliser.

    q [N, H, K], k [N, G, K], v [N, G, V], log_g [N, G], kv [N, G, D, V] and key [N, G, D] in float32.
    """
    count, groups, dim, value_dim = kv.shape
    heads, normalize = q.shape[1], key.numel() > 0
    block = min(MOST_ROWS, VALUES // power_of_two(value_dim))
    state_blocks = -(-dim // block)
    new_kv, new_key = kv.new_empty(kv.shape), key.new_empty(key.shape)
    partial_out = kv.new_empty(state_blocks, count, heads, value_dim)
    partial_norm = kv.new_empty(state_blocks, count, heads) if normalize else key
    kv_rows, kv_row = _rows(kv)
    key_rows, key_row = _rows(key) if normalize else (key, 1)
    arguments = {
        "p_q": q.contiguous(),
        "p_k": k.contiguous(),
        "p_v": v.contiguous(),
        "p_log_g": kv if log_g is None else log_g.contiguous(),
        "p_kv": kv_rows,
        "p_key": key_rows,
        "p_table": _table(k.shape[2], p, q.device),
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
        "KV_ROW": kv_row,
        "KEY_ROW": key_row,
        "REPEATS": heads // groups,
        "BLOCK": block,
        "GATED": log_g is not None,
        "NORMALIZE": normalize,
    }
    launch(decode_kernel, count * groups * state_blocks, arguments)
    out = v.new_empty(count, heads, value_dim)
    arguments = {
        "p_partial_out": partial_out,
        "p_partial_norm": partial_norm,
        "p_out": out,
        "state_blocks": state_blocks,
        "power_scale": scale**p,
        "V": value_dim,
        "COLUMNS": COLUMNS,
        "BLOCK": 64,
        "NORMALIZE": normalize,
    }
    launch(combine_kernel, count * heads * -(-value_dim // COLUMNS), arguments)
    return out, new_kv, new_key
