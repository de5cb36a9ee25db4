"""What the three kernels of attention within a chunk share: tiles by TMA in pairs, and decays.

A program owns a block of rows, queries (output.py, queries.py) or keys (keys.py), and walks over blocks of columns, the
others. Columns that all rows see are whole; the last ones before the diagonal are not, and need a mask.

The product of the step before runs while this step's weights are made: its left operand, made in registers, is handed
to the wait that completes it, so that no other value takes these registers. Legend: ../prologue.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from powerplan.kernels.call import SMALLEST_NORM
from powerplan.kernels.triton.hopper.gluon import copy_tile, gl

LOG2E = gl.constexpr(1.4426950408889634)
SMALLEST = gl.constexpr(SMALLEST_NORM)


@gluon.jit
def owned_rows(p_chunks, groups, token_blocks, ROWS: gl.constexpr, REPEATS: gl.constexpr):
    """Return the chunk's index, first token and end, the key/value head, the head, and the program's first row.

    The last blocks of a chunk come first: for queries they are the longest.
    """
    i_program = gl.program_id(0)
    i_block = token_blocks - 1 - i_program % token_blocks
    i_head = (i_program // token_blocks) % (groups * REPEATS)
    i_chunk = i_program // (token_blocks * groups * REPEATS)
    start = gl.load(p_chunks + i_chunk * 4).to(gl.int32)
    stop = gl.load(p_chunks + i_chunk * 4 + 1).to(gl.int32)
    return i_chunk, start, stop, i_head // REPEATS, i_head, start + i_block * ROWS


@gluon.jit
def state_at(p_chunks, i_chunk, COLUMN: gl.constexpr, HAS_EDGE: gl.constexpr):
    """Return whether the state on a chunk's side is there; COLUMN 2: the one before it, 3: the one after it."""
    at_edge = gl.load(p_chunks + i_chunk * 4 + COLUMN)
    there = at_edge == 0
    if HAS_EDGE:
        there = at_edge >= 0
    return there


@gluon.jit
def copy_pair(a_desc, b_desc, row, a_column, b_column, a_ring, b_ring, bars, slot, wanted):
    """Start the copies of one block of columns of a and b into their places in the rings."""
    SIZE: gl.constexpr = (a_ring.shape[2] + b_ring.shape[2]) * a_ring.shape[1] * 2
    mbarrier.expect(bars.index(slot), SIZE, pred=wanted)
    copy_tile(a_desc, [row, a_column], bars.index(slot), a_ring.index(slot), pred=wanted)
    copy_tile(b_desc, [row, b_column], bars.index(slot), b_ring.index(slot), pred=wanted)


@gluon.jit
def whole_state(desc, i_chunk, groups, i_group, bars, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return one of the states [slots G ROWS, COLUMNS], whole, in shared memory; the last of `bars` is for it alone."""
    state = gl.allocate_shared_memory(desc.dtype, [ROWS, COLUMNS], desc.layout)
    bar = bars.index(bars.shape[0] - 1)
    mbarrier.expect(bar, ROWS * COLUMNS * 2)
    copy_tile(desc, [(i_chunk * groups + i_group) * ROWS, 0], bar, state)
    mbarrier.wait(bar, 0)
    return state


@gluon.jit
def anew(x):
    """Return x, an int32 that the compiler takes for another: what follows from it is computed again, and not kept."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def rows_and_columns(
    first, stop, heads, i_head, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DIM: gl.constexpr, SUMS: gl.constexpr
):
    """Return the offsets [ROWS, COLUMNS] of a block of x [tokens, heads, DIM], and which of them are in it."""
    o_t = first + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    o_f = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    mask = gl.expand_dims(o_t < stop, 1) & gl.expand_dims(o_f < DIM, 0)
    return gl.expand_dims((o_t.to(gl.int64) * heads + i_head) * DIM, 1) + gl.expand_dims(o_f, 0), mask


@gluon.jit
def power(b_s, P: gl.constexpr):
    """Return s^P, with P from 1 to 4."""
    if P == 1:
        b_power = b_s
    elif P == 2:
        b_power = b_s * b_s
    elif P == 3:
        b_power = b_s * b_s * b_s
    else:
        b_square = b_s * b_s
        b_power = b_square * b_square
    return b_power


@gluon.jit
def divisor(b_x):
    """Return what to divide by, as in ../prologue.py."""
    b_divisor = gl.where(gl.abs(b_x) < float("inf"), b_x, float("nan"))
    return gl.where(gl.abs(b_x) < SMALLEST, float("inf"), b_divisor)


@gluon.jit
def load_reference(p_log_g_cumsum, i_token, groups, i_group, GATED: gl.constexpr):
    """Return both words of log_g_cumsum of one token; 0 without gates."""
    word = 0.0
    rest = 0.0
    if GATED:
        p_words = p_log_g_cumsum + (i_token * groups + i_group) * 2
        word = gl.load(p_words)
        rest = gl.load(p_words + 1)
    return word, rest


@gluon.jit
def load_gate(p_log_g_cumsum, o_t, stop, word, rest, groups, i_group, GATED: gl.constexpr):
    """Return log_g_cumsum of tokens less that of the reference, word + rest, in powers of two.

    0 where there is no such token, and without gates. Sums are small near the reference, and so are their roundings.
    """
    if GATED:
        p_words = p_log_g_cumsum + (o_t * groups + i_group) * 2
        b_gate = gl.load(p_words, mask=o_t < stop, other=word) - word
        b_gate = (b_gate + (gl.load(p_words + 1, mask=o_t < stop, other=rest) - rest)) * LOG2E
    else:
        b_gate = o_t.to(gl.float32) * 0.0
    return b_gate


@gluon.jit
def key_columns(
    p_log_g_cumsum, first, stop, word, rest, whole, groups, i_group, SIZE: gl.constexpr, GATED: gl.constexpr
):
    """Return what `decays` takes of SIZE keys from `first` on, one value a thread, to be stored for all threads."""
    o_s = first + gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    b_gate = load_gate(p_log_g_cumsum, o_s, stop, word, rest, groups, i_group, GATED)
    return gl.where(whole, gl.exp2(-b_gate), b_gate)


@gluon.jit
def query_columns(
    p_log_g_cumsum, first, stop, word, rest, whole, groups, i_group, SIZE: gl.constexpr, GATED: gl.constexpr
):
    """`key_columns` of queries; nothing is left of those of the next sequence."""
    o_t = first + gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    b_gate = load_gate(p_log_g_cumsum, o_t, stop, word, rest, groups, i_group, GATED)
    b_gate = gl.where(o_t < stop, b_gate, float("-inf"))
    return gl.where(whole, gl.exp2(b_gate), b_gate)


@gluon.jit
def query_shares(p_grad_norm, first, stop, heads, i_head, SIZE: gl.constexpr, NORMALIZE: gl.constexpr):
    """Return u, the gradient of norm, of SIZE queries from `first` on, one value a thread."""
    o_t = first + gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    if NORMALIZE:
        b_u = gl.load(p_grad_norm + (o_t.to(gl.int64) * heads + i_head), mask=o_t < stop, other=0.0)
    else:
        b_u = o_t.to(gl.float32) * 0.0
    return b_u


@gluon.jit
def new_columns(COUNT: gl.constexpr, SIZE: gl.constexpr):
    """Return places for COUNT vectors of SIZE values in shared memory."""
    return gl.allocate_shared_memory(gl.float32, [COUNT, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def decays(b_rows, b_factors, b_columns, o_rows, o_columns, whole, power_scale, OF_KEYS: gl.constexpr):
    """Return scale^P exp(a_query - a_key) for each row and column; 0 where a query does not see a key.

    rows: a - reference of each row. factors: exp(a - reference) times scale^P, or exp(reference - a) of keys.
    columns: of whole columns their exp(reference - a), or exp(a - reference) of queries, else their a - reference.

    The reference lies between rows and columns: every exponent is at most 0, and whole columns take no exponential for
    each pair.
    """
    if whole:
        b_decay = gl.expand_dims(b_factors, 1) * gl.expand_dims(b_columns, 0)
    else:
        if OF_KEYS:
            m_seen = gl.expand_dims(o_columns, 0) >= gl.expand_dims(o_rows, 1)
            b_exponent = gl.expand_dims(b_columns, 0) - gl.expand_dims(b_rows, 1)
        else:
            m_seen = gl.expand_dims(o_columns, 0) <= gl.expand_dims(o_rows, 1)
            b_exponent = gl.expand_dims(b_rows, 1) - gl.expand_dims(b_columns, 0)
        b_decay = gl.exp2(gl.where(m_seen, b_exponent, float("-inf"))) * power_scale
    return b_decay
