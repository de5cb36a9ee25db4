"""The scan of the state, forward and backward: one program walks a sequence with a block of the state in registers.

Forward, from the first chunk to the last: the state before the chunk is stored, decays by exp(a_M), and takes in
exp(a_M - a_t) phi(k_t) v_t^T of every token t. Backward, from the last chunk to the first, the same happens to the
gradient of the state after the chunk, which takes in exp(a_t) scale^P phi(q_t) y_t^T of every query head of the group,
with y the gradient of the sum of weighted values. Legend: prologue.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import phi_rows, rounded, weights_of_rows
from powerplan.kernels.triton.prologue import chunk_bounds, divisor, load_columns, load_sum, load_sums, token_block


@triton.jit
def scan_kernel(
    p_x,
    p_v,
    p_log_g_cumsum,
    p_inverse_norm,
    p_grad_norm,
    p_start_kv,
    p_start_key,
    p_state_kv,
    p_state_key,
    p_end_kv,
    p_end_key,
    p_forward_kv,
    p_forward_key,
    p_grad_gate_carry,
    p_chunks,
    p_first_chunk,
    p_steps,
    s_xt,
    s_xh,
    s_vt,
    s_vh,
    groups,
    state_blocks,
    rows,
    carry_parts,
    power_scale,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REPEATS: tl.constexpr,
    STEPS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEYED: tl.constexpr,
    HAS_START: tl.constexpr,
    WANT_END: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the state at every chunk border of N sequences. Grid: state_blocks N G programs, STEPS steps of phi each.

    Forward, slot c of the state is the state before chunk c. Backward, it is the gradient of the state after chunk c;
    after the last chunk of a sequence that is zero and not written, unless the walk has a start.

    x: [tokens, G, K] in, keys. Backward: [tokens, H, K], queries.
    v: [tokens, G, V] in, values. Backward: [tokens, H, V], gradient of the output.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
    inverse_norm, grad_norm: [tokens, H] float32 in, backward where NORMALIZE (grad_norm_kernel).
    start_kv: [N, G, rows, V] float32 in, where HAS_START: initial states. Backward: gradients of the final states.
    start_key: [N, G, rows] float32 in, likewise, where KEYED.
    state_kv: [slots, G, rows, V] bf16 or float32 out.
    state_key: [slots, G, rows] float32 out, where KEYED.
    end_kv: [N, G, rows, V] float32 out, where WANT_END: final states. Backward: gradients of the initial states.
    end_key: [N, G, rows] float32 out, likewise, where KEYED.
    forward_kv: [slots, G, rows, V] in, backward where GATED: state_kv of the forward pass.
    forward_key: [slots, G, rows] float32 in, likewise state_key.
    grad_gate_carry: [slots, G, carry_parts] float32 out, backward where GATED: the first state_blocks parts.
        The gates of a chunk act on later tokens only through the state after it, S. This holds that share of their
        gradient, <dS, S>, in one part for each program, and 0 for the last chunk of a sequence; the caller sums them.
    chunks: [slots, 4] int64 in.
    first_chunk: [N + 1] int64 in, the first slot of each sequence.
    steps: [steps, P + 1] int32 in.
    KEYED: whether the normaliser is summed here: where there is one, but for P = 2 (prepare.py).
    REPEATS: query heads of a group in x and v: 1 forward. BLOCK: tokens that a product sums over.
    """
    ROWS: tl.constexpr = STEPS * STEP_ROWS
    i_state_block = tl.program_id(0) % state_blocks
    i_step = i_state_block * STEPS
    i_state = tl.program_id(0) // state_blocks
    i_sequence = i_state // groups
    i_group = (i_state % groups).to(tl.int64)
    o_row = i_step * STEP_ROWS + tl.arange(0, ROWS)
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    o_kv = o_row[:, None] * V + o_v[None, :]
    first_row = i_state.to(tl.int64) * rows
    b_weight = weights_of_rows(p_steps, i_step, P, STEPS, STEP_ROWS)

    # Start. The block stays in registers for the whole sequence, in float32: 256 rows of 64 values are 64 KB, 64
    # registers for each of 256 threads. Forward it holds sums of phi(k) without weights, which come in when it is
    # stored: once a row and chunk, and not once a row and token.
    b_kv = tl.zeros([ROWS, BV], tl.float32)
    b_key = tl.zeros([ROWS], tl.float32)
    if HAS_START:
        b_kv = tl.load(p_start_kv + first_row * V + o_kv, mask=m_v, other=0.0)
        if KEYED:
            b_key = tl.load(p_start_key + first_row + o_row)
        if not BACKWARD:
            b_unweighted = 1.0 / divisor(b_weight)
            b_kv *= b_unweighted[:, None]
            b_key *= b_unweighted

    first_chunk, stop_chunk = tl.load(p_first_chunk + i_sequence), tl.load(p_first_chunk + i_sequence + 1)
    for index in range(stop_chunk - first_chunk):
        i_chunk = first_chunk + index
        if BACKWARD:
            i_chunk = stop_chunk - 1 - index
        start, stop = chunk_bounds(p_chunks, i_chunk)
        p_carry = p_grad_gate_carry + (i_chunk * groups + i_group) * carry_parts + i_state_block
        if BACKWARD and GATED and index == 0:
            tl.store(p_carry, 0.0)

        # Store, once a chunk: in bf16, with 2,304 rows of 64 values (K = V = 64, P = 2) and chunks of 1,024 tokens, all
        # programs of a head store 288 bytes a token. In between the state never leaves the registers.
        if HAS_START or index > 0 or not BACKWARD:
            slot = (i_chunk * groups + i_group) * rows
            b_stored_kv = b_kv
            b_stored_key = b_key
            if not BACKWARD:
                b_stored_kv = b_kv * b_weight[:, None]
                b_stored_key = b_key * b_weight
            # States are operands of the other kernels, which load them as they are: rounded once, here, and not once
            # for each block of queries and keys that reads them.
            tl.store(p_state_kv + slot * V + o_kv, rounded(b_stored_kv, OPERAND, PRECISION), mask=m_v)
            if KEYED:
                tl.store(p_state_key + slot + o_row, b_stored_key)
            # <dS, S> while dS is here: the state after this chunk is the one before the next. It costs one more read
            # of the forward states. A part for each program, not an atomic sum, so that results repeat bit for bit.
            if BACKWARD and GATED and index > 0:
                slot += groups * rows
                b_forward_kv = tl.load(p_forward_kv + slot * V + o_kv, mask=m_v, other=0.0).to(tl.float32)
                b_carry = tl.sum(b_forward_kv * b_kv, 1)
                if KEYED:
                    b_carry += tl.load(p_forward_key + slot + o_row) * b_key
                tl.store(p_carry, tl.sum(b_carry, 0))

        # What the last chunk of the walk adds is needed for the end of the walk only.
        if WANT_END or index < stop_chunk - first_chunk - 1:
            # Decay over the whole chunk: log_g <= 0, so that the factor exp(a_M) lies in [0, 1].
            if GATED:
                # A slot without tokens stops at 0, and the first gate stands in for its last one.
                b_total, b_total_rest = load_sum(p_log_g_cumsum, tl.maximum(stop - 1, 0), groups, i_group)
                b_kv *= tl.exp(b_total)
                b_key *= tl.exp(b_total)

            # Accumulate the chunk's tokens, BLOCK at a time; backward once for each query head of the group.
            token_blocks = tl.cdiv(stop - start, BLOCK)
            for i_block in range(token_blocks * REPEATS):
                i_head = i_group * REPEATS + i_block // token_blocks
                o_t, m_t = token_block(start + (i_block % token_blocks) * BLOCK, stop, BLOCK)
                p_head = p_x + i_head * s_xh
                b_phi = phi_rows(p_head, s_xt, o_t, m_t, p_steps, i_step, K, P, BK, STEPS, BLOCK, OPERAND)
                b_v = load_columns(p_v + i_head * s_vh, s_vt, o_t, m_t, 0, V, BV)
                # What multiplies a token goes into its values, not into phi: 64 multiplications a token instead of 256
                # (V = 64, ROWS = 256). The exponents, a_M - a_t forward and a_t backward, are <= 0: tokens that have
                # decayed become 0, and nothing overflows.
                b_factor = tl.full([BLOCK], 1.0, tl.float32)
                if GATED:
                    b_cumsum, b_rest = load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group)
                    b_factor = tl.exp(b_cumsum if BACKWARD else (b_total - b_cumsum) + (b_total_rest - b_rest))
                b_key_factor = b_factor
                if BACKWARD:
                    b_factor *= power_scale
                    o_query = o_t * (groups * REPEATS) + i_head
                    if KEYED:
                        b_key_factor = b_factor * tl.load(p_grad_norm + o_query, mask=m_t, other=0.0)
                    if NORMALIZE:
                        b_factor *= tl.load(p_inverse_norm + o_query, mask=m_t, other=0.0)
                if GATED or BACKWARD:
                    b_v = b_v.to(tl.float32) * b_factor[:, None]
                # [ROWS, BLOCK] @ [BLOCK, BV] -> [ROWS, BV]
                b_left, b_right = rounded(b_phi, OPERAND, PRECISION), rounded(b_v, OPERAND, PRECISION)
                b_kv = tl.dot(b_left, b_right, b_kv, input_precision=PRECISION)
                # The normaliser's column is summed outside the matrix unit: a 65th column would pad to 128.
                if KEYED:
                    if GATED or BACKWARD:
                        b_key += tl.sum(b_phi.to(tl.float32) * b_key_factor[None, :], 1)
                    else:
                        b_key += tl.sum(b_phi.to(tl.float32), 1)

    # End.
    if WANT_END:
        if not BACKWARD:
            b_kv *= b_weight[:, None]
            b_key *= b_weight
        tl.store(p_end_kv + first_row * V + o_kv, b_kv, mask=m_v)
        if KEYED:
            tl.store(p_end_key + first_row + o_row, b_key)
