"""The gradient that comes back through phi, to queries and to keys. Legend: prologue.py."""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import add_product, outer, rounded
from powerplan.kernels.triton.prologue import load_column, load_columns


@triton.jit
def grad_through_phi(
    p_x,
    s_t,
    o_t,
    m_t,
    b_y,
    b_y_key,
    p_kv,
    p_key,
    p_steps,
    steps,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEYS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the gradient of x, [ROWS, BK] in float32, where that of phi(x) is kv y + key y_key; and phi(x)^T kv.

    Queries: kv, key is the state before the chunk, y the gradient of phi(q)^T kv and y_key that of phi(q).key.
    Keys: kv, key is the gradient of the state after the chunk, y the values that phi(k) multiplies and y_key its
    factor in the sum of keys. phi(k) carries the weights of steps, and phi(k)^T kv is the gradient of y.

    x: ROWS tokens o_t of one head, stride s_t, in.
    y: [ROWS, BV] OPERAND.
    y_key: [ROWS] float32, where NORMALIZE.
    kv: [rows, V] in.
    key: [rows] float32 in, where NORMALIZE and P is not 2 (there the gradient comes from squared in features.py).
    steps: how many there are in the table p_steps, or 0 where there is no state: then both results are 0.
    KEYS: whether x are keys; if not, the second result is 0.
    """
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    b_phi_kv = tl.zeros([ROWS, BV], tl.float32)
    if P == 1:
        # phi(x) = x: one step of K rows, with weight 1.
        o_row = tl.arange(0, BK)
        m_row = o_row < tl.where(steps > 0, K, 0)
        b_x = load_columns(p_x, s_t, o_t, m_t, 0, K, BK).to(OPERAND)
        b_kv = tl.load(p_kv + o_row[:, None] * V + o_v[None, :], mask=m_row[:, None] & m_v, other=0.0).to(OPERAND)
        # [ROWS, BV] @ [BV, BK] -> [ROWS, BK]
        b_dx = tl.dot(b_y, tl.trans(b_kv), input_precision=PRECISION)
        if NORMALIZE:
            b_dx += b_y_key[:, None] * tl.load(p_key + o_row, mask=m_row, other=0.0)[None, :]
        if KEYS:
            # [ROWS, BK] @ [BK, BV] -> [ROWS, BV]
            b_phi_kv = tl.dot(b_x, b_kv, b_phi_kv, input_precision=PRECISION)
    else:
        # dx in tiles of 8 features. Which tiles a step adds to is known at run time only, and registers cannot be
        # indexed, so every step adds to all BK / 8 tiles through a mask that leaves zero in the others.
        o_tile = tl.arange(0, BK // 8)
        o_feature = o_tile[:, None] * 8 + tl.arange(0, 8)[None, :]
        b_dx_tiles = tl.zeros([ROWS, BK // 8, 8], tl.float32)
        for i_step in range(steps):
            # Load the slices of x in every step, 2 x 16 bytes a token in bf16 and mostly from a cache, as they could
            # not be picked from x in registers.
            p_step = p_steps + i_step * (P + 1)
            lead, last = tl.load(p_step + P - 2), tl.load(p_step + P - 1)
            b_lead = load_columns(p_x, s_t, o_t, m_t, lead, K, 8)
            b_last = load_columns(p_x, s_t, o_t, m_t, last, K, 8)
            if P > 2:
                b_single = load_column(p_x, s_t, o_t, m_t, tl.load(p_step))
                if P == 4:
                    b_first = b_single
                    b_second = load_column(p_x, s_t, o_t, m_t, tl.load(p_step + 1))
                    b_single = b_first * b_second
            if KEYS:
                weight = tl.load(p_step + P).to(tl.float32)

            # Gradient of the step's 64 rows of phi.
            o_row = i_step * 64 + tl.arange(0, 64)
            b_kv = tl.load(p_kv + o_row[:, None] * V + o_v[None, :], mask=m_v, other=0.0).to(OPERAND)
            # [ROWS, BV] @ [BV, 64] -> [ROWS, 64]
            b_dphi = tl.dot(b_y, tl.trans(b_kv), input_precision=PRECISION)
            if NORMALIZE and P != 2:
                b_dphi += b_y_key[:, None] * tl.load(p_key + o_row)[None, :]

            # Accumulate phi(k)^T kv while kv is here: it is read once for both products.
            if KEYS:
                b_dphi *= weight
                b_weighted_lead = b_lead.to(tl.float32) * weight
                if P > 2:
                    b_weighted_lead *= b_single[:, None]
                b_phi = outer(b_weighted_lead.to(OPERAND), b_last.to(OPERAND), ROWS)
                b_phi = rounded(b_phi, OPERAND, PRECISION)
                # [ROWS, 64] @ [64, BV] -> [ROWS, BV]
                b_phi_kv = add_product(b_phi, b_kv, b_phi_kv, P, PRECISION)

            # Back through the product single lead last^T: a sum over 8 for each of its factors.
            b_dphi = tl.reshape(b_dphi, [ROWS, 8, 8])
            b_dlead = tl.sum(b_dphi * b_last.to(tl.float32)[:, None, :], 2)
            b_dlast = tl.sum(b_dphi * b_lead.to(tl.float32)[:, :, None], 1)
            if P > 2:
                b_dsingle = tl.sum(b_dlead * b_lead.to(tl.float32), 1)
                m_first = (o_feature == tl.load(p_step))[None, :, :]
                if P == 3:
                    b_dx_tiles += tl.where(m_first, b_dsingle[:, None, None], 0.0)
                else:
                    m_second = (o_feature == tl.load(p_step + 1))[None, :, :]
                    b_dx_tiles += tl.where(m_first, (b_dsingle * b_second)[:, None, None], 0.0)
                    b_dx_tiles += tl.where(m_second, (b_dsingle * b_first)[:, None, None], 0.0)
                b_dlead *= b_single[:, None]
                b_dlast *= b_single[:, None]
            b_dx_tiles += tl.where((o_tile == lead // 8)[None, :, None], b_dlead[:, None, :], 0.0)
            b_dx_tiles += tl.where((o_tile == last // 8)[None, :, None], b_dlast[:, None, :], 0.0)
        b_dx = tl.reshape(b_dx_tiles, [ROWS, BK])
    return b_dx, b_phi_kv
