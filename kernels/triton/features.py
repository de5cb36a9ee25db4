"""Steps of phi and powers of scores, made from features in registers: phi is never stored. Legend: prologue.py.

A step is one outer product of two slices of 8 features of a token, `lead` and `last`, times P - 2 single features where
P > 2 (layout.py). How often a step counts, its weight, stands in its row of the table of steps.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from powerplan.kernels.triton.prologue import load_column, load_columns, load_rows

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter, which knows no assembly."""


@triton.jit
def rounded(b_x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Return x as an operand of a product: in OPERAND, and where PRECISION is "tf32", rounded to tf32's 10 bits.

    A GPU takes tf32 operands from float32 and ignores their last 13 bits. Cut off like that, every operand errs towards
    0, by 2^-11 on average, and sums of terms of one sign keep that error. Rounded to nearest, errors have both signs.
    16-bit values need no rounding: fp16 has 10 bits, too.
    """
    if PRECISION == "tf32" and b_x.dtype == tl.float32:
        if INTERPRETED:
            # As cvt.rna does: halves go away from 0, inf and NaN stay.
            b_bits = b_x.to(tl.int32, bitcast=True)
            b_bits = tl.where(tl.abs(b_x) < float("inf"), b_bits + 0x1000, b_bits) & -0x2000
            b_operand = b_bits.to(tl.float32, bitcast=True)
        else:
            # Three instructions: compare, add, and. Written in Triton as above it is five.
            b_operand = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [b_x], tl.float32, True, 1)
    else:
        b_operand = b_x.to(OPERAND)
    return b_operand


@triton.jit
def add_product(b_left, b_right, b_sum, P: tl.constexpr, PRECISION: tl.constexpr):
    """Return sum + left @ right, for one of the many steps of phi.

    A product in float32 is a chain of multiply-adds in each thread that starts from the sum. At P = 4 and K = 32 its
    links are 143,360 roundings to the sum's precision. So there they start from 0, and the sum is rounded once for the
    64 rows of a step: at K = 16 errors of the output are 6 times as large without that. For P < 4 there are fewer rows,
    and what keeps the product apart takes registers.
    """
    if P == 4 and b_left.dtype == tl.float32 and PRECISION == "ieee":
        b_product = tl.dot(b_left, b_right, input_precision=PRECISION)
        # A plain addition of a product is what Triton puts back at the start of the chain.
        b_sum = tl.math.fma(b_product, tl.full(b_sum.shape, 1.0, tl.float32), b_sum)
    else:
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def fine_product(b_left, b_right, b_sum, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Return sum + left @ right, for a small product that much follows from: the normaliser's, for P = 2.

    left are 16-bit values or float32 ones as they came in. A right operand of tf32 goes in as two, its rounded value
    and what that leaves: the normaliser's gradient counts in every gate.
    """
    b_high = rounded(b_right, OPERAND, PRECISION)
    b_sum = tl.dot(b_left.to(OPERAND), b_high, b_sum, input_precision=PRECISION)
    if PRECISION == "tf32":
        b_low = rounded(b_right - b_high, OPERAND, PRECISION)
        b_sum = tl.dot(b_left.to(OPERAND), b_low, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def squared(
    p_x,
    s_t,
    o_t,
    m_t,
    p_square,
    has_state,
    K: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return x Z for ROWS tokens o_t, [ROWS, BK] in float32; 0 where there is no state. For P = 2: x^T Z x is norm.

    square: Z, [BK, BK] in, symmetric: the sum of k k^T before the chunk, or its gradient after it.

    By slices of Z: a whole one, 128 x 128 in float32, would take half of all registers. Products of float32, outside
    the matrix unit, are unrolled over the slice.
    """
    MOST: tl.constexpr = 16 if PRECISION == "ieee" and tl.float32 == OPERAND else 32
    SLICE: tl.constexpr = BK if BK < MOST else MOST
    o_k = tl.arange(0, BK)
    o_slice = tl.arange(0, SLICE)
    b_product = tl.zeros([ROWS, BK], tl.float32)
    for first in range(0, tl.where(has_state, BK, 0), SLICE):
        b_x = load_columns(p_x, s_t, o_t, m_t, first, K, SLICE)
        b_square = tl.load(p_square + (first + o_slice)[:, None] * BK + o_k[None, :])
        # [ROWS, SLICE] @ [SLICE, BK] -> [ROWS, BK]
        b_product = fine_product(b_x, b_square.to(tl.float32), b_product, OPERAND, PRECISION)
    return b_product


@triton.jit
def single_features(p_x, s_t, o_t, m_t, p_step, P: tl.constexpr):
    """Return the product of the single features of a step (P > 2), [tokens], in float32."""
    b_single = load_column(p_x, s_t, o_t, m_t, tl.load(p_step))
    if P == 4:
        b_single *= load_column(p_x, s_t, o_t, m_t, tl.load(p_step + 1))
    return b_single


@triton.jit
def outer(b_lead, b_last, ROWS: tl.constexpr):
    """Return the products of all pairs, [tokens, 8] x [tokens, 8] -> [tokens, 64]."""
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
    """Return one step of phi of the tokens o_t, without weights: [ROWS, 64], for P = 1 [ROWS, BK].

    For the left operand of a product: in the layout that the matrix unit reads it in, a thread holds the same two
    features of `last` in every step, so that sm_90 takes phi from registers and shared memory never sees it.
    """
    if P == 1:
        b_phi = load_columns(p_x, s_t, o_t, m_t, 0, K, BK).to(OPERAND)
    else:
        # Load: 8 neighbouring features each, 16 bytes of a token in bf16.
        b_lead = load_columns(p_x, s_t, o_t, m_t, tl.load(p_step + P - 2), K, 8)
        b_last = load_columns(p_x, s_t, o_t, m_t, tl.load(p_step + P - 1), K, 8).to(OPERAND)
        # Multiply: the single features go into the 8 leads in float32, and not into the 64 products.
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
    """Return STEPS steps of phi of ROWS tokens, without weights, time last: [STEPS 64, ROWS], for P = 1 [BK, ROWS].

    For products over time, as the scan's: there phi^T is the left operand.
    """
    if P == 1:
        b_phi = load_rows(p_x, s_t, o_t, m_t, tl.arange(0, BK), K).to(OPERAND)
    else:
        # Offsets: 8 features for each of the STEPS steps, looked up in the table.
        p_step = p_steps + (i_step + tl.arange(0, STEPS)) * (P + 1)
        o_8 = tl.arange(0, 8)
        o_lead = tl.reshape(tl.load(p_step + P - 2)[:, None] + o_8[None, :], [STEPS * 8])
        o_last = tl.reshape(tl.load(p_step + P - 1)[:, None] + o_8[None, :], [STEPS * 8])
        # Load.
        b_lead = load_rows(p_x, s_t, o_t, m_t, o_lead, K)
        b_last = load_rows(p_x, s_t, o_t, m_t, o_last, K).to(OPERAND)
        # Multiply: a single feature is loaded once for each of the 8 leads it goes into, so that all factors have one
        # shape.
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
def weights_of_rows(p_steps, i_step, P: tl.constexpr, STEPS: tl.constexpr, STEP_ROWS: tl.constexpr):
    """Return the weights of the rows of STEPS steps, [STEPS STEP_ROWS] in float32; 0 in steps that only pad."""
    b_weight = tl.load(p_steps + (i_step + tl.arange(0, STEPS)) * (P + 1) + P).to(tl.float32)
    return tl.reshape(b_weight[:, None] + tl.zeros([STEPS, STEP_ROWS], tl.float32), [STEPS * STEP_ROWS])


@triton.jit
def power(b_s, P: tl.constexpr):
    """Return s^P."""
    b_power = b_s
    for _ in tl.static_range(P - 1):
        b_power *= b_s
    return b_power


@triton.jit
def power_derivative(b_s, P: tl.constexpr):
    """Return P s^(P-1)."""
    b_derivative = tl.full(b_s.shape, P, tl.float32)
    for _ in tl.static_range(P - 1):
        b_derivative *= b_s
    return b_derivative
