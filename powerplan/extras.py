"""Further parameters of a layer or a model: what belongs to no mixer, FFN, norm or embedding."""

from __future__ import annotations

from typing import Annotated

import msgspec

from powerplan.errors import hostile_characters, shown
from powerplan.mixers.block import Block
from powerplan.mixers.formulas import Formulas
from powerplan.part import MAX_SIZE, problem


class Extra(Block, frozen=True, kw_only=True):
    """Parameters by a name, as many as `vectors` times the hidden size and `elements` more.

    name: what reports call them.
    vectors: how many vectors of the hidden size there are.
    elements: how many parameters there are beside these vectors.
    matmul: activations are multiplied with them, so that each takes 2 weight FLOPs per token; else they are scales or
    biases.
    lookup: a table of which a token reads a row, as of the input embedding; it belongs to the model and not to a layer.
    """

    source = "the code of the model's family"
    letters = "m vectors=vectors elements=elements"

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=60)]
    vectors: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)] = 0
    elements: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE**2)] = 0
    matmul: bool = False
    lookup: bool = False

    def check(self) -> None:
        for character in hostile_characters(self.name):
            raise problem("name", f"holds a control character, {shown(character)}")
        if not self.vectors and not self.elements:
            raise problem("vectors", "vectors and elements are both 0, so there is nothing to count")
        if self.lookup and self.matmul:
            raise problem("lookup", "a table of rows is not multiplied with")

    @property
    def kind(self) -> str:
        return "extra"

    def matmul_formulas(self) -> Formulas:
        return ((self.name, self._formula if self.matmul else ""),)

    def part_of(self, component: str) -> str:
        return "extras"

    def other_formulas(self) -> Formulas:
        return ((self.name, "" if self.matmul else self._formula),)

    @property
    def _formula(self) -> str:
        parts = ("vectors*m" if self.vectors else "", "elements" if self.elements else "")
        return " + ".join(part for part in parts if part)

    def describe(self) -> str:
        return self.name
