"""The matrices that the parameters of a block stand in: quantized formats keep scales for rows and blocks of them."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from powerplan.mixers.block import Block

NO_MATRIX = "short convolutions"
"""The component of matmul parameters that stand in no matrix: depthwise filters, which no method quantizes."""


class Matrix(NamedTuple):
    """`copies` matrices of one shape: rows (outputs) times columns (inputs). part: a word of quantization.PartName."""

    part: str
    copies: Fraction
    rows: int
    columns: int


def matrices_of(block: Block, hidden: int, idle: bool = False) -> list[Matrix]:
    """Return the matrices of a mixer or an FFN in a model of this hidden size.

    Their elements are the block's matmul parameters without short convolutions. A component whose shapes the block does
    not state, as those of extras, counts as square matrices of the hidden size, of which there may be a fraction.
    idle: whether experts that a token does not choose count.
    """
    stated = block.matrix_formulas(idle)
    matrices = []
    for component, *formulas in stated:
        terms = block.terms(tuple((component, formula) for formula in formulas), m=hidden)
        count, rows, columns = (int(term.value) for term in terms)
        if count and rows and columns:
            matrices.append(Matrix(block.part_of(component), Fraction(count), rows, columns))
    components = {component for component, *_ in stated} | {NO_MATRIX}
    for term in block.matmul_terms(hidden):
        if term.component not in components and term.value:
            squares = Fraction(term.value) / hidden**2
            matrices.append(Matrix(block.part_of(term.component), squares, hidden, hidden))
    return matrices
