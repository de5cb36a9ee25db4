"""How the kernels begin: which block of which chunk a program owns, where its tokens lie, and the loads they share.

Legend of the kernels. Prefixes: i_ index, p_ pointer, s_ stride (in elements), o_ offsets, m_ mask, b_ block of values
that a program holds in registers. Capitals are constants of the compiler.

    G, H        key/value heads (`groups`), and query heads: H = G REPEATS, head h reads key/value head h // REPEATS
    K, V        head dims of q and k, and of v; BK, BV: the same, padded to powers of two
    P           degree of the power; power_scale = scale^P
    BM, BN      rows of a block of queries, and of a block of keys; token_blocks is how many a chunk has
    s_xt, s_xh  strides of x over tokens and over heads; features lie side by side
    kv, key     the state, [rows, V] and [rows]: sums of phi(k) v^T, and of phi(k) for the normaliser
    rows        rows of phi (layout.py), padded to a multiple of the block of rows that a program of the scan owns;
                state_blocks is how many of these blocks a state has
    steps       steps of phi, STEP_ROWS rows each: 64, for P = 1 BK; p_steps is their table, [steps, P + 1]
    a           log_g_cumsum: cumsum(log_g) from the start of the chunk on; a_M is that of its last token. It is kept in
                two words, a and what rounding left of it: after 1,000 gates of -100 one word is off by 0.004, and so
                is the logarithm of every weight, of neighbours too. exp(a) alone needs the first word only.
    GATED       whether there is a log_g
    NORMALIZE   whether there is a normaliser: norm is the sum of a query's weights
    OPERAND     dtype of the factors of products, PRECISION how tl.dot multiplies them (config.py); sums are in float32

Sequences lie end to end, [tokens, heads, dim]. A row of the table of chunks, [slots, 4] in int64, holds the first token
of the chunk, the one after its last, 1 where it is the first chunk of its sequence, and 1 where it is the last one.
Offsets of tokens are int64 as the table is: 1M tokens of 16 heads of 128 are 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.call import LOWEST_LOG_GATE, SMALLEST_NORM

CHUNK_COLUMNS = tl.constexpr(4)
"""Columns of the table of chunks."""

FIRST_IN_SEQUENCE = tl.constexpr(2)
"""The column that holds 1 where a chunk is the first of its sequence, so that there may be no state before it."""

LAST_IN_SEQUENCE = tl.constexpr(3)
"""The column that holds 1 where a chunk is the last of its sequence, so that there may be no state after it."""

SMALLEST = tl.constexpr(SMALLEST_NORM)

LOWEST = tl.constexpr(LOWEST_LOG_GATE)
"""The lowest log_g that counts; lower ones, -inf included, count as this one."""


@triton.jit
def owned_block(token_blocks, groups, REPEATS: tl.constexpr):
    """Return the program's block of tokens in the chunk, its chunk and key/value head in int64, and its query head.

    The block runs fastest, then the query heads of a group: neighbours in time read the same state, from L2.
    """
    i_program = tl.program_id(0)
    i_block = i_program % token_blocks
    i_repeat = (i_program // token_blocks) % REPEATS
    i_group = ((i_program // (token_blocks * REPEATS)) % groups).to(tl.int64)
    i_chunk = (i_program // (token_blocks * REPEATS * groups)).to(tl.int64)
    return i_block, i_chunk, i_group, i_group * REPEATS + i_repeat


@triton.jit
def chunk_bounds(p_chunks, i_chunk):
    """Return the first token of a chunk, and the one after its last; equal where the slot is not used."""
    return tl.load(p_chunks + i_chunk * CHUNK_COLUMNS), tl.load(p_chunks + i_chunk * CHUNK_COLUMNS + 1)


@triton.jit
def chunk_flag(p_chunks, i_chunk, COLUMN: tl.constexpr):
    """Return FIRST_IN_SEQUENCE or LAST_IN_SEQUENCE of a chunk: 1 or 0."""
    return tl.load(p_chunks + i_chunk * CHUNK_COLUMNS + COLUMN)


@triton.jit
def token_block(first, stop, SIZE: tl.constexpr):
    """Return the offsets of SIZE tokens from `first` on, and which of them come before `stop`."""
    o_t = first + tl.arange(0, SIZE)
    return o_t, o_t < stop


@triton.jit
def load_columns(p_x, s_t, o_t, m_t, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load features first : first + WIDTH of tokens o_t, [tokens, WIDTH]; 0 where masked and from DIM on."""
    o_f = first + tl.arange(0, WIDTH)
    return tl.load(p_x + o_t[:, None] * s_t + o_f[None, :], mask=m_t[:, None] & (o_f < DIM)[None, :], other=0.0)


@triton.jit
def load_rows(p_x, s_t, o_t, m_t, o_f, DIM: tl.constexpr):
    """Load features o_f of tokens o_t with time last, [features, tokens]; 0 where masked and from DIM on."""
    return tl.load(p_x + o_t[None, :] * s_t + o_f[:, None], mask=m_t[None, :] & (o_f < DIM)[:, None], other=0.0)


@triton.jit
def load_column(p_x, s_t, o_t, m_t, feature):
    """Load one feature of tokens o_t, [tokens], in float32."""
    return tl.load(p_x + o_t * s_t + feature, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def load_gates(p_x, o_t, m_t, groups, i_group):
    """Load one key/value head of x [tokens, G] (log_g, gradients of its sums) for tokens o_t; 0 where masked."""
    return tl.load(p_x + o_t * groups + i_group, mask=m_t, other=0.0)


@triton.jit
def load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group):
    """Load both words of a of tokens o_t; 0 where masked."""
    p_words = p_log_g_cumsum + (o_t * groups + i_group) * 2
    return tl.load(p_words, mask=m_t, other=0.0), tl.load(p_words + 1, mask=m_t, other=0.0)


@triton.jit
def load_sum(p_log_g_cumsum, i_token, groups, i_group):
    """Load both words of a of one token."""
    p_words = p_log_g_cumsum + (i_token * groups + i_group) * 2
    return tl.load(p_words), tl.load(p_words + 1)


@triton.jit
def decay_between(b_later, b_later_rest, b_earlier, b_earlier_rest, m_seen):
    """Return exp(a_later - a_earlier) where a query sees a key, else 0.

    later, earlier: [BM, 1] and [1, BN] float32, a of the queries and of the keys, or transposed, [1, BM] and [BN, 1];
    rest: their second words. seen: [BM, BN] or transposed.

    The mask comes before exp: where the key is the later one the exponent is positive, up to 100 a token (api.py takes
    no gate below -100), float32 ends at exp(88.7), and inf times a mask of 0 is NaN. exp(-inf) is exactly 0.
    """
    b_exponent = (b_later - b_earlier) + (b_later_rest - b_earlier_rest)
    return tl.exp(tl.where(m_seen, b_exponent, float("-inf")))


@triton.jit
def divisor(b_x):
    """Return what to divide by: infinite where x counts as 0, so that a query that sees nothing gets 0 and not NaN.

    NaN where x has overflowed: a finite number divided by it would be 0.
    """
    b_divisor = tl.where(tl.abs(b_x) < float("inf"), b_x, float("nan"))
    return tl.where(tl.abs(b_x) < SMALLEST, float("inf"), b_divisor)
