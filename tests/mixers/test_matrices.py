"""The matrices of a block hold its matmul parameters, and a rule's bits of them are those by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS
from specs import specs

from powerplan.accounting import Accounting
from powerplan.dtypes import DTYPE_BYTES, Dtypes
from powerplan.ffn import MLP, MoE
from powerplan.mixers import DSA, KDA, MIXERS, MLA, Attention, GatedDeltaNet, Mamba1, Mamba2
from powerplan.mixers.base import Block
from powerplan.mixers.formulas import total
from powerplan.mixers.matrices import NO_MATRIX, Matrix, matrices_of
from powerplan.quantization import Quantization, Rule
from powerplan.serving import Serving


def elements(block: Block, hidden: int, idle: bool = False) -> Fraction:
    return sum((copies * rows * columns for _, copies, rows, columns in matrices_of(block, hidden, idle)), Fraction(0))


@settings(max_examples=150, deadline=None)
@given(spec=specs)
def test_matrices_hold_the_matmul_parameters(spec: Any) -> None:
    hidden = spec.hidden_size
    for use in spec.layer_uses():
        for block in use.layer.blocks:
            matmul = [term for term in block.matmul_terms(hidden) if term.component != NO_MATRIX]
            assert elements(block, hidden) == total(matmul)
            if isinstance(block, MoE):
                into = 2 if block.gated else 1
                width = block.latent_size or hidden
                idle = (block.experts - block.top_k) * (into + 1) * width * block.intermediate_size
                assert elements(block, hidden, idle=True) == total(matmul) + idle


HEADS = {"heads": 8, "kv_heads": 2, "head_dim": 16}
LATENT = {
    "heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
SHAPES: list[tuple[Block, list[tuple[str, int, int, int]]]] = [
    (
        Attention(**HEADS),
        [("mixers", 1, 128, 64), ("mixers", 1, 32, 64), ("mixers", 1, 32, 64), ("mixers", 1, 64, 128)],
    ),
    (
        MLA(**LATENT),
        [
            ("mixers", 1, 24, 64),
            ("mixers", 1, 192, 24),
            ("mixers", 1, 48, 64),
            ("mixers", 1, 224, 40),
            ("mixers", 1, 64, 96),
        ],
    ),
    (
        DSA(**LATENT, index_heads=4, index_head_dim=10, top_k=2),
        [
            ("mixers", 1, 24, 64),
            ("mixers", 1, 192, 24),
            ("mixers", 1, 48, 64),
            ("mixers", 1, 224, 40),
            ("mixers", 1, 64, 96),
            ("mixers", 1, 40, 24),
            ("mixers", 1, 10, 64),
            ("mixers", 1, 4, 64),
        ],
    ),
    (MLP(intermediate_size=96), [("mlp", 2, 96, 64), ("mlp", 1, 64, 96)]),
    (
        MoE(experts=6, top_k=2, intermediate_size=96, shared_intermediate_size=32, shared_gate=True),
        [
            ("router", 1, 6, 64),
            ("experts", 4, 96, 64),
            ("experts", 2, 64, 96),
            ("shared_experts", 2, 32, 64),
            ("shared_experts", 1, 64, 32),
            ("router", 1, 1, 64),
        ],
    ),
]


@pytest.mark.parametrize(("block", "shapes"), SHAPES, ids=lambda value: value.kind if isinstance(value, Block) else "")
def test_shapes_by_hand(block: Block, shapes: list[tuple[str, int, int, int]]) -> None:
    assert matrices_of(block, 64) == [Matrix(part, Fraction(copies), *shape) for part, copies, *shape in shapes]


def rule(**fields: Any) -> Rule:
    return Rule(parts=("mlp",), **fields)


BITS = [
    # kv_a_proj_with_mqa of DeepSeek-V3 in fp8: 576 rows are five blocks of 128, the last of them half full.
    (rule(bits=8, block=128, block_rows=128, scale_bits=32), 576, 7168, 8 * 576 * 7168 + 32 * 5 * 56),
    (rule(bits=4, block=32, scale_bits=8), 3, 40, 4 * 120 + 8 * 3 * 2),
    (rule(bits=4, block=128, scale_bits=16, zero_bits=4, column_bits=32), 8, 256, 4 * 2048 + 20 * 16 + 32 * 256),
    (rule(bits=4, block=64, scale_bits=8, scales_block=256), 100, 256, 4 * 25_600 + 8 * 400 + 32 * 2),
    (rule(bits=8, scale_bits=32), 10, 20, 8 * 200 + 32 * 10),
    (rule(bits=4, block=16, scale_bits=8, matrix_bits=32), 4, 32, 4 * 128 + 8 * 8 + 32),
]


@pytest.mark.parametrize(("own", "rows", "columns", "bits"), BITS)
def test_bits_of_a_matrix(own: Rule, rows: int, columns: int, bits: int) -> None:
    assert own.bits_of(rows, columns) == bits


ALL = ("mixers", "mlp", "experts", "shared_experts", "router", "lm_head", "embedding")


@settings(max_examples=80, deadline=None)
@given(
    spec=specs,
    batch=st.integers(1, 20),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    parts=st.sets(st.sampled_from(ALL), min_size=1),
)
def test_a_rule_without_scales_is_another_dtype(spec: Any, batch: int, dtype: str, parts: set[Any]) -> None:
    """Elements of 8 bits and no scales: as many bytes as elements, at every batch."""
    import msgspec

    def bytes_of(parts: tuple[Any, ...]) -> list[Fraction]:
        quantization = Quantization(method="test", rules=(Rule(parts=parts, bits=8),))
        accounting = Accounting(msgspec.structs.replace(spec, quantization=quantization))
        serving = Serving(accounting, 64, Dtypes(dtype))
        one = serving.step(1).weight_bytes
        assert one == accounting.read_bytes(Dtypes(dtype)) == serving.row.decode_weight_bytes_per_token
        tied = any(use.layer.tied for use in accounting.uses)  # Stored once, and read at each use.
        assert tied or serving.step(batch).weight_bytes <= serving.stored_bytes
        return [serving.stored_bytes, one, serving.step(batch).weight_bytes]

    plain = Serving(Accounting(spec), 64, Dtypes(dtype))
    before = [plain.stored_bytes, plain.step(1).weight_bytes, plain.step(batch).weight_bytes]
    alone = [bytes_of((part,)) for part in sorted(parts)]
    together = bytes_of(tuple(sorted(parts)))
    for place, value in enumerate(before):
        assert together[place] - value == sum(one[place] - value for one in alone)


def test_every_kind_answers() -> None:
    assert set(KINDS) == set(MIXERS)
    for mixer in (KDA, GatedDeltaNet, Mamba1, Mamba2):
        assert mixer.matrix_formulas is not Block.matrix_formulas
