"""What every mixer, every FFN and every extra answers: its parameters, as formulas over its fields, and its widths."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import ClassVar, Self

import msgspec

from powerplan.mixers.formulas import Formulas, Rational, Term, term
from powerplan.mixers.kept import Keeping
from powerplan.part import Part


class Block(Keeping, Part, frozen=True, kw_only=True):
    """A mixer or an FFN: a part of a spec that has parameters.

    source: papers and code that the formulas follow, with section and equation; `--explain` prints it.
    letters: the letters of the formulas, in the order in which `--explain` lists them, and the field that each stands
    for. m, the hidden size of the model, has none.
    whole_widths: the fields that grow in proportion to the hidden size and must stay whole numbers.
    rounded_widths: the fields that grow with it to the nearest integer, at least 1.
    """

    source = ""
    letters = ""
    whole_widths: ClassVar[tuple[str, ...]] = ()
    rounded_widths: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        """The word that names this class in a spec."""
        return str(self.__struct_config__.tag)

    def whole_sizes(self) -> dict[str, int]:
        """Return the `whole_widths` and their values."""
        return {field: getattr(self, field) for field in self.whole_widths}

    def widened(self, factor: Fraction) -> Self:
        """Return this block for a model whose hidden size is `factor` times as large."""
        sizes = {field: int(size * factor) for field, size in self.whole_sizes().items()}
        for field in self.rounded_widths:
            if getattr(self, field):
                sizes[field] = max(1, round(getattr(self, field) * factor))
        return msgspec.structs.replace(self, **sizes)

    def terms(self, formulas: Formulas, **values: Rational) -> tuple[Term, ...]:
        """Evaluate those of `formulas` that are not empty, with `values` for letters beside or in place of fields."""
        fields = _fields_of(self.letters).items()
        symbols = {letter: int((field and getattr(self, field)) or 0) for letter, field in fields} | values
        return tuple(term(component, formula, symbols) for component, formula in formulas if formula)

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that activations are multiplied with; each takes 2 weight FLOPs per token."""
        return self.terms(self.matmul_formulas(), m=hidden)

    def matmul_formulas(self) -> Formulas:
        raise NotImplementedError

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        """Return component, count, rows and columns of the matrices of those components whose shapes are stated.

        idle: whether experts that a token does not choose count.
        """
        return ()

    def part_of(self, component: str) -> str:
        """Return the part of a model, as rules of a quantization name it, that a component of the matmuls is in."""
        return "mixers"

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that a token uses outside matrix products: norms, biases, sinks."""
        return self.terms(self.other_formulas(), m=hidden)

    def other_formulas(self) -> Formulas:
        return ()

    def idle_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that are stored and that a token does not use: experts that are not chosen."""
        return ()

    def describe(self) -> str:
        """Return the name that reports use, such as "attention, window 4,096"."""
        return self.kind.replace("_", " ")


@cache
def _fields_of(letters: str) -> dict[str, str]:
    return {letter: field for letter, _, field in (pair.partition("=") for pair in letters.split())}
