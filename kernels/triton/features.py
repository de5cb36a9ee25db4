"""What the kernels share: slices of features, steps of phi from them, powers of scores.

Legend of the kernels: i_ index, p_ pointer, s_ stride, o_ offsets, m_ mask, b_ block of values. BM rows of queries, BN
of keys, BK and BV head dims padded to powers of two, 64 rows to a step of phi (layout.py).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_columns(p_x, s_t, o_t, m_t, first, K: tl.constexpr, WIDTH: tl.constexpr):
    """Features first : first + WIDTH of tokens o_t, [tokens, WIDTH]; 0 where masked and from K on."""
    o_f = first + tl.arange(0, WIDTH)
    return tl.load(p_x + o_t[:, None] * s_t + o_f[None, :], mask=m_t[:, None] & (o_f < K)[None, :], other=0.0)


@triton.jit
def load_rows(p_x, s_t, o_t, m_t, o_f, K: tl.constexpr):
    """Features o_f of tokens o_t with time last, [features, tokens]; 0 where masked and from K on."""
    return tl.load(p_x + o_t[None, :] * s_t + o_f[:, None], mask=m_t[None, :] & (o_f < K)[:, None], other=0.0)


@triton.jit
def load_column(p_x, s_t, o_t, m_t, feature):
    """One feature of tokens o_t, [tokens], in float32."""
    return tl.load(p_x + o_t * s_t + feature, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def single_features(p_x, s_t, o_t, m_t, p_step, P: tl.constexpr):
    """Product of the single features of a step (p > 2), [tokens]."""
    b_single = load_column(p_x, s_t, o_t, m_t, tl.load(p_step))
    if P == 4:
        b_single *= load_column(p_x, s_t, o_t, m_t, tl.load(p_step + 1))
    return b_single


@triton.jit
def outer(b_lead, b_last, ROWS: tl.constexpr):
    """Products of all pairs, [tokens, 8] x [tokens, 8] -> [tokens, 64]."""
    return tl.reshape(b_lead[:, :, None] * b_last[:, None, :], [ROWS, 64])


@triton.jit
def phi_columns(
    p_x,
    s_t,
    o_t,
    m_t,
    p_step,
    K: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One step of phi of the tokens o_t, without weights: [ROWS, 64], for p = 1 [ROWS, BK]."""
    if P == 1:
        b_phi = load_columns(p_x, s_t, o_t, m_t, 0, K, BK).to(OPERAND)
    else:
        b_lead = load_columns(p_x, s_t, o_t, m_t, tl.load(p_step + P - 2), K, 8)
        b_last = load_columns(p_x, s_t, o_t, m_t, tl.load(p_step + P - 1), K, 8).to(OPERAND)
        if P > 2:
            b_lead = b_lead * single_features(p_x, s_t, o_t, m_t, p_step, P)[:, None]
        b_phi = outer(b_lead.to(OPERAND), b_last, ROWS)
    return b_phi


@triton.jit
def phi_rows(
    p_x,
    s_t,
    o_t,
    m_t,
    p_steps,
    i_step,
    K: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """STEPS steps of phi of ROWS tokens, without weights, time last: [STEPS 64, ROWS], for p = 1 [BK, ROWS]."""
    if P == 1:
        b_phi = load_rows(p_x, s_t, o_t, m_t, tl.arange(0, BK), K).to(OPERAND)
    else:
        p_step = p_steps + (i_step + tl.arange(0, STEPS)) * (P + 1)
        o_8 = tl.arange(0, 8)
        o_lead = tl.reshape(tl.load(p_step + P - 2)[:, None] + o_8[None, :], [STEPS * 8])
        o_last = tl.reshape(tl.load(p_step + P - 1)[:, None] + o_8[None, :], [STEPS * 8])
        b_lead = load_rows(p_x, s_t, o_t, m_t, o_lead, K)
        b_last = load_rows(p_x, s_t, o_t, m_t, o_last, K).to(OPERAND)
        if P > 2:
            o_same = tl.zeros([STEPS, 8], tl.int32)
            o_single = tl.reshape(tl.load(p_step)[:, None] + o_same, [STEPS * 8])
            b_lead = b_lead.to(tl.float32) * load_rows(p_x, s_t, o_t, m_t, o_single, K).to(tl.float32)
            if P == 4:
                o_single = tl.reshape(tl.load(p_step + 1)[:, None] + o_same, [STEPS * 8])
                b_lead *= load_rows(p_x, s_t, o_t, m_t, o_single, K).to(tl.float32)
        b_lead = tl.reshape(b_lead.to(OPERAND), [STEPS, 8, 1, ROWS])
        b_phi = tl.reshape(b_lead * tl.reshape(b_last, [STEPS, 1, 8, ROWS]), [STEPS * 64, ROWS])
    return b_phi


@triton.jit
def weight_of_steps(p_steps, i_step, P: tl.constexpr, STEPS: tl.constexpr, STEP_ROWS: tl.constexpr):
    """Weights of the rows of STEPS steps, [STEPS STEP_ROWS] in float32."""
    b_weight = tl.load(p_steps + (i_step + tl.arange(0, STEPS)) * (P + 1) + P).to(tl.float32)
    return tl.reshape(b_weight[:, None] + tl.zeros([STEPS, STEP_ROWS], tl.float32), [STEPS * STEP_ROWS])


@triton.jit
def power(b_s, P: tl.constexpr):
    """b_s^P."""
    b_power = b_s
    for _ in tl.static_range(P - 1):
        b_power *= b_s
    return b_power


@triton.jit
def slope_of_power(b_s, P: tl.constexpr):
    """P b_s^(P-1)."""
    b_slope = tl.full(b_s.shape, P, tl.float32)
    for _ in tl.static_range(P - 1):
        b_slope *= b_s
    return b_slope
