"""How the weights of a model are stored: formats of quantized matrices, with their scales, and where each stands.

A model without quantization, and every weight that no rule covers, is in the number format of `--dtype`. Embeddings
are covered where a rule names them; norms, biases, extras, short convolutions and learned positions never are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Literal

import msgspec

from powerplan.mixers.block import Block
from powerplan.mixers.matrices import Matrix, matrices_of
from powerplan.part import Part, Position, Size, check_in_layers, problem

PartName = Literal["mixers", "mlp", "experts", "shared_experts", "router", "lm_head", "embedding"]
"""A part of a model whose matrices a rule covers. The gate of a shared expert belongs to the router, projections to
a latent that experts work on to the shared experts."""

Bits = Annotated[int, msgspec.Meta(ge=1, le=32)]
NoBits = Annotated[int, msgspec.Meta(ge=0, le=64)]


class Rule(Part, frozen=True, kw_only=True):
    """The format of the matrices of some parts. A matrix has rows (outputs) and columns (inputs).

    parts: the parts of the model whose matrices it covers.
    bits: bits of each element.
    block: columns that share a scale; all of them where left out.
    block_rows: rows that share a scale.
    scale_bits: bits of the scale of a block; 0 for none.
    zero_bits: bits of the zero point of a block; 0 for none.
    scales_block: scales of a matrix that share a 32-bit scale of their own (double quantization).
    column_bits: bits kept for each column, such as its group.
    matrix_bits: bits kept once for a matrix, such as a scale.
    in_layers: the layers (from 0) that the rule holds in; all where left out. lm_head and embedding are in no layer.
    """

    parts: Annotated[tuple[PartName, ...], msgspec.Meta(min_length=1)]
    bits: Bits
    block: Size | None = None
    block_rows: Size = 1
    scale_bits: NoBits = 0
    zero_bits: NoBits = 0
    scales_block: Size | None = None
    column_bits: NoBits = 0
    matrix_bits: NoBits = 0
    in_layers: tuple[Position, ...] | None = None

    def check(self) -> None:
        check_in_layers(self.in_layers)
        if self.in_layers is not None and {"lm_head", "embedding"} & set(self.parts):
            raise problem("in_layers", "lm_head and embedding are in no layer")

    def bits_of(self, rows: int, columns: int) -> int:
        """Return the bits of one matrix: a block that the matrix does not fill has a scale too."""
        blocks = -(-rows // self.block_rows) * -(-columns // (self.block or columns))
        nested = 32 * -(-blocks // self.scales_block) if self.scales_block else 0
        scales = blocks * (self.scale_bits + self.zero_bits) + nested
        return rows * columns * self.bits + scales + columns * self.column_bits + self.matrix_bits


class Quantization(Part, frozen=True, kw_only=True):
    """How the weights of a model are stored.

    method: the name that reports use, such as mxfp4.
    rules: of the rules that cover a matrix, the first holds.
    """

    method: Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[\w .:/+-]+$")]
    rules: Annotated[tuple[Rule, ...], msgspec.Meta(min_length=1)]


class WeightFormats:
    """The rules of a quantization, ready to be asked: which holds for a part in a layer, and what it saves."""

    def __init__(self, quantization: Quantization) -> None:
        self._rules = [(rule, rule.in_layers and frozenset(rule.in_layers)) for rule in quantization.rules]

    def rule_of(self, part: str, layer: int | None) -> Rule | None:
        """Return the rule of a part in a layer, None for outside of layers; None where the part is wide there."""
        for rule, layers in self._rules:
            if part in rule.parts and (layers is None or layer in layers):
                return rule
        return None

    def bits_beyond(
        self, block: Block, hidden: int, wide_bits: Fraction, layers: Iterable[int], idle: bool
    ) -> Fraction:
        """Return the bits that a block has in these layers beyond `wide_bits` for each weight: mostly below 0.

        idle: whether experts that a token does not choose count.
        """
        matrices = matrices_of(block, hidden, idle)
        parts = sorted({matrix.part for matrix in matrices})
        beyond = Fraction(0)
        for rules, count in Counter(tuple(self.rule_of(part, layer) for part in parts) for layer in layers).items():
            by_part = dict(zip(parts, rules, strict=True))
            beyond += count * sum(
                (_beyond(matrix, by_part[matrix.part], wide_bits) for matrix in matrices), Fraction(0)
            )
        return beyond

    def table_bits_beyond(self, part: PartName, rows: int, columns: int, wide_bits: Fraction) -> Fraction:
        """Return the same for the embedding or the LM head."""
        return _beyond(Matrix(part, Fraction(1), rows, columns), self.rule_of(part, None), wide_bits)


def _beyond(matrix: Matrix, rule: Rule | None, wide_bits: Fraction) -> Fraction:
    _, copies, rows, columns = matrix
    return Fraction(0) if rule is None else copies * (rule.bits_of(rows, columns) - rows * columns * wide_bits)
