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
from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.mixers import DSA, KDA, MIXERS, MLA, RGLRU, Attention, Compressed
from powerplan.mixers.block import Block
from powerplan.mixers.formulas import total
from powerplan.mixers.matrices import NO_MATRIX, Matrix, matrices_of
from powerplan.quantization import Quantization, Rule
from powerplan.serving import Serving
from powerplan.spec import LayerGroup, ModelSpec, Norm


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
    (
        Attention(**HEADS, shared_kv=True, output_gate="head"),
        [("mixers", 1, 128, 64), ("mixers", 1, 64, 128), ("mixers", 1, 8, 64)],
    ),
    (
        Attention(**HEADS, keys_as_values=True),
        [("mixers", 1, 128, 64), ("mixers", 1, 32, 64), ("mixers", 1, 64, 128)],
    ),
    (
        DSA(**LATENT, shared_index=True, output_gate=True),
        [
            ("mixers", 1, 24, 64),
            ("mixers", 1, 192, 24),
            ("mixers", 1, 48, 64),
            ("mixers", 1, 224, 40),
            ("mixers", 1, 64, 96),
            ("mixers", 1, 96, 64),
        ],
    ),
    (
        KDA(heads=8, head_dim=16, gate_rank=12, conv_size=4),
        [
            ("mixers", 1, 384, 64),
            ("mixers", 1, 64, 128),
            ("mixers", 1, 12, 64),
            ("mixers", 1, 128, 12),
            ("mixers", 1, 8, 64),
            ("mixers", 1, 12, 64),
            ("mixers", 1, 128, 12),
        ],
    ),
    (
        KDA(heads=8, head_dim=16, full_rank="both"),
        [
            ("mixers", 1, 384, 64),
            ("mixers", 1, 64, 128),
            ("mixers", 1, 128, 64),
            ("mixers", 1, 8, 64),
            ("mixers", 1, 128, 64),
        ],
    ),
    (
        Compressed(heads=8, head_dim=16, q_lora_rank=24, output_groups=4, output_rank=10, index_heads=3),
        [
            ("mixers", 1, 24, 64),
            ("mixers", 1, 128, 24),
            ("mixers", 1, 16, 64),
            ("mixers", 4, 10, 32),
            ("mixers", 1, 64, 40),
            ("mixers", 2, 32, 64),
            ("mixers", 2, 256, 64),
            ("mixers", 1, 384, 24),
            ("mixers", 1, 3, 64),
        ],
    ),
    (
        RGLRU(heads=4, head_dim=16),
        [("mixers", 2, 64, 64), ("mixers", 1, 64, 64), ("mixers", 8, 16, 16)],
    ),
    (
        MoE(experts=6, top_k=2, intermediate_size=96, latent_size=16, zero_experts=3, gated=False),
        [
            ("router", 1, 9, 64),
            ("shared_experts", 1, 16, 64),
            ("shared_experts", 1, 64, 16),
            ("experts", 2, 96, 16),
            ("experts", 2, 16, 96),
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
    for mixer in MIXERS.values():
        assert mixer.matrix_formulas is not Block.matrix_formulas


@settings(max_examples=80, deadline=None)
@given(spec=specs)
def test_every_matmul_component_states_its_matrices(spec: Any) -> None:
    """Fractions of square matrices stand for none of them, but for extras, which no rule covers."""
    for use in spec.layer_uses():
        for block in use.layer.blocks:
            components = {term.component for term in block.matmul_terms(spec.hidden_size)} - {NO_MATRIX}
            if isinstance(block, Extra):
                assert {matrix.part for matrix in matrices_of(block, spec.hidden_size)} <= {"extras"}
                continue
            stated = {component for component, *_ in block.matrix_formulas(idle=False)}
            assert components <= stated


def test_tied_layers_are_stored_once_and_read_at_each_use() -> None:
    """3 x 64 x 64 weights in 4 bits, stored for one layer of three; the extra of 64 x 64 in bf16."""
    mlp, extra = MLP(intermediate_size=64), Extra(name="projection", elements=64 * 64, matmul=True)
    layers = (LayerGroup(ffn=mlp), LayerGroup(repeat=2, ffn=mlp, tied=True))
    quantization = Quantization(method="test", rules=(Rule(parts=("mixers", "mlp"), bits=4),))
    norm = Norm(kind="none", final=False)
    fields: dict[str, Any] = {"name": "x", "vocab_size": 10, "hidden_size": 64, "norm": norm, "extras": (extra,)}
    accounting = Accounting(ModelSpec(**fields, layers=layers, quantization=quantization))
    weights = 3 * 64 * 64
    assert accounting.stored_bytes(Dtypes("bf16")) == weights / 2 + 2 * (64 * 64 + 2 * 10 * 64)
    assert accounting.read_bytes(Dtypes("bf16")) == 3 * weights / 2 + 2 * (64 * 64 + 10 * 64)
