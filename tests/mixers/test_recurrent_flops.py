"""State FLOPs of every recurrent mixer against plain implementations, as torch's FlopCounterMode sees them.

Recurrent forms token by token; chunked forms under `--causal full`, since dense products compute the masked half too,
and under `--causal exact` by counting the entries that the masks leave. No comparison of counts has a tolerance, and
the implementations agree with each other, so what is counted is the mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import plain_mixers as plain
import pytest
import torch
from kinds import variants
from torch.utils.flop_counter import FlopCounterMode

from powerplan.choices import Causal
from powerplan.mixers import (
    GLA,
    GSA,
    KDA,
    MIXERS,
    MLSTM,
    RGLRU,
    RWKV4,
    RWKV7,
    DeltaNet,
    GatedDeltaNet,
    Hyena,
    Lightning,
    LogLinear,
    Mamba1,
    Mamba2,
    RetNet,
    ShortConvolution,
    SparseStateExpansion,
    Wersa,
)
from powerplan.mixers.base import Mixer
from powerplan.mixers.formulas import Convention, total

Tensor = torch.Tensor
Run = Callable[[plain.Tally], Tensor]

HEADS, K, V, SLOTS, TOKENS, CHUNK = 3, 5, 4, 6, 37, 8
SIZES: dict[str, Any] = {"heads": HEADS, "head_dim": K, "v_head_dim": V}
CHUNKED = SIZES | {"chunk_size": CHUNK}
RANKS = {"decay_rank": 4, "rate_rank": 4, "gate_rank": 4}
SSM: dict[str, Any] = {"heads": 4, "groups": 2, "head_dim": V, "state_dim": K}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def gates(*shape: int) -> Tensor:
    """Return decays between 0.8 and 1: powers of them over a chunk stay in range."""
    return 0.8 + 0.2 * torch.sigmoid(normal(*shape))


def qkv(heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return normal(heads, TOKENS, K) / K, normal(heads, TOKENS, K) / K + 0.1, normal(heads, TOKENS, V)


def counted(run: Run) -> tuple[int, Tensor]:
    """Return the matmul FLOPs that the counter sees and the elementwise ones of the tally, and the result."""
    tally = plain.Tally()
    with FlopCounterMode(display=False) as counter:
        result = run(tally)
    return counter.get_total_flops() + tally.flops, result


def planned(mixer: Mixer, convention: Convention, tokens: int = TOKENS) -> int:
    flops = total(mixer.state_flops_terms(tokens, convention)) * tokens
    assert int(flops) == flops
    return int(flops)


BETA = torch.sigmoid(normal(HEADS, TOKENS, 1))
SCALAR, CHANNEL, FORGET = gates(HEADS, TOKENS, 1), gates(HEADS, TOKENS, K), gates(HEADS, TOKENS, SLOTS)
ONE = torch.ones_like(SCALAR)
FIXED = torch.tensor([0.9, 0.95, 0.99], dtype=torch.float64)[:, None, None].expand_as(SCALAR)
A, B = normal(HEADS, TOKENS, K) / K, normal(HEADS, TOKENS, K) / K
C_GROUPS, B_GROUPS = normal(2, TOKENS, K), normal(2, TOKENS, K)
HEAD_X, HEAD_DECAY, LEVELS = normal(4, TOKENS, V), gates(4, TOKENS, 1), torch.sigmoid(normal(4, TOKENS, 8))
CHOSEN = [[1 + index % 4, 1 + (index + 1 + index // 4 % 3) % 4] for index in range(TOKENS)]
EXPANDED = [plain.by_group(C_GROUPS, 4), plain.by_group(B_GROUPS, 4), HEAD_X, HEAD_DECAY]
WITH_ONES = (*qkv()[:2], plain.with_ones(qkv()[2]))
POLES, RESIDUES = torch.polar(gates(7, 3), normal(7, 3)), torch.complex(normal(7, 3), normal(3, 7).T)
FEATURES = [normal(K, SLOTS), normal(SLOTS, K).T]
SSM_STEP, SSM_RATE = torch.sigmoid(normal(TOKENS, 7)), -torch.sigmoid(normal(7, K))

STEPS: dict[str, tuple[Mixer, Run]] = {
    "retnet": (RetNet(**SIZES), lambda tally: plain.linear_steps(*qkv(), FIXED, None)),
    "lightning": (Lightning(**SIZES), lambda tally: plain.linear_steps(*qkv(), FIXED, None)),
    "gla": (GLA(**SIZES), lambda tally: plain.linear_steps(*qkv(), CHANNEL, tally)),
    "deltanet": (DeltaNet(**SIZES), lambda tally: plain.delta_steps(*qkv(), BETA, None, tally)),
    "gated_deltanet": (GatedDeltaNet(**SIZES), lambda tally: plain.delta_steps(*qkv(), BETA, SCALAR, tally)),
    "kda": (KDA(**SIZES), lambda tally: plain.delta_steps(*qkv(), BETA, CHANNEL, tally)),
    "rwkv7": (RWKV7(**SIZES, **RANKS), lambda tally: plain.rwkv7_steps(*qkv(), A, B, CHANNEL, tally)),
    "gsa": (GSA(**SIZES, slots=SLOTS), lambda tally: plain.gsa_steps(*qkv(), FORGET, tally)),
    "mamba1": (
        Mamba1(inner_size=7, state_dim=K, dt_rank=3),
        lambda tally: plain.mamba1_steps(
            normal(TOKENS, 7), SSM_STEP, SSM_RATE, normal(TOKENS, K), normal(TOKENS, K), tally
        ),
    ),
    "short_conv": (
        ShortConvolution(inner_size=7),
        lambda tally: plain.short_convolution(normal(TOKENS, 7), normal(3, 7)),
    ),
    "mlstm": (
        MLSTM(**SIZES),
        lambda tally: plain.normalised(plain.linear_steps(*WITH_ONES, SCALAR, tally)),
    ),
    "rglru": (RGLRU(heads=1, head_dim=7), lambda tally: plain.rglru_steps(normal(TOKENS, 7), gates(TOKENS, 7), tally)),
    "rwkv4": (
        RWKV4(inner_size=7),
        lambda tally: plain.rwkv4_steps(normal(TOKENS, 7), normal(TOKENS, 7), gates(7), normal(7), tally),
    ),
    "mamba2": (Mamba2(**SSM), lambda tally: plain.linear_steps(*EXPANDED, tally)),
    "log_linear": (LogLinear(**SSM), lambda tally: plain.log_linear_steps(*EXPANDED, LEVELS, tally)),
    "sse": (
        SparseStateExpansion(**SIZES, partitions=4, top_k=2),
        lambda tally: plain.sse_steps(*qkv(), CHANNEL, CHOSEN, 4, tally),
    ),
    "hyena": (
        Hyena(inner_size=7, state_dim=6),
        lambda tally: plain.modal_steps(normal(TOKENS, 7), POLES, RESIDUES, tally),
    ),
    "wersa": (
        Wersa(**SIZES, random_features=SLOTS),
        lambda tally: plain.normalised(plain.linear_steps(*featured(), ONE, None)),
    ),
}


def featured() -> tuple[Tensor, Tensor, Tensor]:
    """Return random features of queries and keys, and values with a column of ones."""
    q, k, v = qkv()
    projected = (plain.random_features(x, matrix) for x, matrix in zip((q, k), FEATURES, strict=True))
    return (*projected, plain.with_ones(v))


CHUNKS: dict[str, tuple[Mixer, Callable[[], Tensor]]] = {
    "retnet": (RetNet(**CHUNKED), lambda: plain.linear_chunks(*qkv(), FIXED, CHUNK)),
    "lightning": (Lightning(**CHUNKED), lambda: plain.linear_chunks(*qkv(), FIXED, CHUNK)),
    "gla": (GLA(**CHUNKED), lambda: plain.linear_chunks(*qkv(), CHANNEL, CHUNK)),
    "deltanet": (DeltaNet(**CHUNKED), lambda: plain.delta_chunks(*qkv(), BETA, ONE, CHUNK)),
    "gated_deltanet": (GatedDeltaNet(**CHUNKED), lambda: plain.delta_chunks(*qkv(), BETA, SCALAR, CHUNK)),
    "kda": (KDA(**CHUNKED), lambda: plain.delta_chunks(*qkv(), BETA, CHANNEL, CHUNK)),
    "rwkv7": (RWKV7(**CHUNKED, **RANKS), lambda: plain.rwkv7_chunks(*qkv(), A, B, CHANNEL, CHUNK)),
    "gsa": (GSA(**CHUNKED, slots=SLOTS), lambda: plain.gsa_chunks(*qkv(), FORGET, CHUNK)),
    "mlstm": (MLSTM(**CHUNKED), lambda: plain.normalised(plain.linear_chunks(*WITH_ONES, SCALAR, CHUNK))),
    "mamba2": (
        Mamba2(**SSM, chunk_size=CHUNK),
        lambda: plain.mamba2_chunks(C_GROUPS, B_GROUPS, HEAD_X, HEAD_DECAY, CHUNK),
    ),
    "wersa": (
        Wersa(**CHUNKED, random_features=SLOTS),
        lambda: plain.normalised(plain.linear_chunks(*featured(), ONE, CHUNK)),
    ),
}


def test_every_kind_without_a_cache_has_a_plain_implementation() -> None:
    """Power and linear attention have theirs in kernels/, which tests/models/test_flops.py counts."""
    kinds = [kind for kind, mixer in MIXERS.items() if next(variants(mixer)).state_size(1).entry == 0]
    assert set(STEPS) == set(kinds) - {"power", "linear"}
    no_chunks = {"mamba1", "rglru", "rwkv4", "short_conv"}
    by_identity = {"log_linear", "sse", "hyena"}  # Tests of their own, below or in another module.
    assert set(CHUNKS) == set(STEPS) - no_chunks - by_identity


@pytest.mark.parametrize("kind", STEPS)
def test_recurrent_form_token_by_token(kind: str) -> None:
    mixer, run = STEPS[kind]
    flops, result = counted(run)
    assert mixer.kind == kind
    assert result.isfinite().all()
    for causal in ("exact", "full"):
        if kind != "log_linear" or causal == "exact":
            assert planned(mixer, Convention(causal)) == flops  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CHUNKS)
def test_chunked_form_as_dense_products(kind: str) -> None:
    mixer, run = CHUNKS[kind]
    flops, result = counted(lambda tally: run())
    assert planned(mixer, Convention("full", "chunked")) == flops
    torch.testing.assert_close(result, STEPS[kind][1](plain.Tally()), rtol=1e-9, atol=1e-9)


def below(rows: int, offset: int) -> int:
    """Count the entries (i, j) of a mask with j <= i - offset."""
    return sum(j <= i - offset for i in range(rows) for j in range(rows))


def substitutions(rows: int) -> int:
    """Count the products of a forward substitution that no zero above a diagonal takes part in."""
    return sum(1 for i in range(rows) for j in range(i) for _ in range(j))


def masked(tokens: int, upper: int, strict: int, solves: bool) -> int:
    """Count FLOPs within chunks: multiply-adds of `upper` with the diagonal, of `strict` below it, per pair."""
    flops = 0
    for start in range(0, tokens, CHUNK):
        rows = min(CHUNK, tokens - start)
        flops += 2 * (upper * below(rows, 0) + strict * below(rows, 1))
        flops += 2 * substitutions(rows) if solves else 0
    return flops


WITHIN: dict[str, tuple[int, int, bool]] = {
    "retnet": (K + V, 0, False),
    "lightning": (K + V, 0, False),
    "gla": (K + V, 0, False),
    "mlstm": (K + V + 1, 0, False),
    "deltanet": (K + V + K + V, K, True),
    "gated_deltanet": (K + V + K + V, K, True),
    "kda": (K + V + K + V, K, True),
    "rwkv7": (K + V + K + V + K + V, K + K + V, True),
    "gsa": (K + SLOTS + SLOTS + V, 0, False),
    "wersa": (SLOTS + V + 1, 0, False),
}
"""Multiply-adds per pair of a chunk and head: with the diagonal, below it; and whether a matrix is inverted."""


@pytest.mark.parametrize("kind", WITHIN)
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, TOKENS, 5 * CHUNK])
def test_chunked_form_without_what_masks_cover(kind: str, tokens: int) -> None:
    mixer, _ = CHUNKS[kind]
    terms = mixer.state_flops_terms(tokens, Convention("exact", "chunked"))
    within = sum(one.value for one in terms if one.component.endswith("within chunks"))
    assert within * tokens == HEADS * masked(tokens, *WITHIN[kind])


@pytest.mark.parametrize("tokens", [1, CHUNK, TOKENS])
def test_mamba2_within_chunks_without_what_masks_cover(tokens: int) -> None:
    mixer = Mamba2(**SSM, chunk_size=CHUNK)
    *_, within = mixer.state_flops_terms(tokens, Convention("exact", "chunked"))
    assert within.value * tokens == masked(tokens, 2 * K + 4 * V, 0, False)  # C B^T once per group, then per head


@pytest.mark.parametrize("tokens", [1, 2, 16, TOKENS, 64])
@pytest.mark.parametrize("causal", ["exact", "full"])
def test_log_linear_in_chunks(tokens: int, causal: Causal) -> None:
    """The states that a chunk queries are the 1 bits of its index; under `full`, all bits of the last chunk's."""
    mixer = LogLinear(**SSM, chunk_size=CHUNK)
    q, k, v, decay = (x[:, :tokens] for x in (normal(4, 64, K), normal(4, 64, K), normal(4, 64, V), gates(4, 64, 1)))
    weight = torch.sigmoid(normal(4, 64, 8))[:, :tokens]
    flops, result = counted(lambda tally: plain.log_linear_chunks(q, k, v, decay, weight, CHUNK))
    torch.testing.assert_close(result, plain.log_linear_dense(q, k, v, decay, weight), rtol=1e-9, atol=1e-9)
    query, update, within = mixer.state_flops_terms(tokens, Convention(causal, "chunked"))
    inner = 4 * V * K
    chunks = [min(CHUNK, tokens - start) for start in range(0, tokens, CHUNK)]
    levels = [
        index.bit_count() if causal == "exact" else (len(chunks) - 1).bit_length() for index in range(len(chunks))
    ]
    states = sum(2 * inner * level * rows for level, rows in zip(levels, chunks, strict=True))
    assert query.value * tokens == states
    assert update.value == 2 * inner
    if causal == "full":
        # The plain one multiplies C and B per head, not per group, and meets the states that are not empty.
        per_head = sum(2 * (4 - 2) * K * rows * rows for rows in chunks)
        met = sum(2 * inner * index.bit_count() * rows for index, rows in enumerate(chunks))
        assert flops == states + (update.value + within.value) * tokens + per_head - states + met


def test_log_linear_is_what_its_definition_says() -> None:
    dense = plain.log_linear_dense(*EXPANDED, LEVELS)
    torch.testing.assert_close(STEPS["log_linear"][1](plain.Tally()), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", range(1, 70))
def test_log_linear_keeps_a_state_for_each_bit(tokens: int) -> None:
    mixer = LogLinear(**SSM, conv_size=0)
    assert mixer.state_size(tokens).recurrent == len(f"{tokens:b}") * 4 * V * K
    queried = sum(index.bit_count() for index in range(tokens))
    terms = {one.component: one.value for one in mixer.state_flops_terms(tokens, Convention())}
    assert terms["log-linear: query state"] * tokens == 2 * 4 * V * K * queried


def test_sparse_state_expansion_in_chunks_is_gla_on_more_tokens() -> None:
    """Each chosen partition is one more GLA over the tokens that chose it; none of them knows its first chunk."""
    sse = SparseStateExpansion(**CHUNKED, partitions=4, top_k=2)
    gla = GLA(**CHUNKED)
    convention = Convention("exact", "chunked")
    query, update, within = (one.value for one in gla.state_flops_terms(TOKENS, convention))
    queried, updated, inside = (one.value for one in sse.state_flops_terms(TOKENS, convention))
    assert (updated, inside) == (3 * update, 3 * within)
    assert queried == query + 2 * 2 * HEADS * K * V


def test_published_flops_of_kda_beside_the_count() -> None:
    """Kimi Linear, equation 13: 6 T d^2 + 3 T C d + T C^2 per head; ours has five products and a cheaper inverse."""
    d, c, tokens = 128, 64, 1_048_576
    mixer = KDA(heads=1, head_dim=d, chunk_size=c)
    published = 6 * tokens * d * d + 3 * tokens * c * d + tokens * c * c
    within = (5 * c + 3) * d + (c - 1) * (c - 2) // 3  # (c - 1) k + 2 (c + 1) (k + v), and the inverse
    assert planned(mixer, Convention("exact", "chunked"), tokens) == (6 * d * d + within) * tokens - 4 * d * d * c
    assert published == (6 * d * d + 3 * c * d + c * c) * tokens
