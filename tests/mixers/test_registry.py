"""What holds for every kind of mixer and FFN. A new kind (docs/extending.md) is noticed here, and tested like all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import get_args

import pytest
from kinds import KINDS, variants
from specs import by_kind

from powerplan.choices import Kernels
from powerplan.extras import Extra
from powerplan.ffn import FFNS, multiplied_terms
from powerplan.mixers import MIXERS, Mixer
from powerplan.mixers.block import Block
from powerplan.mixers.formulas import SYMBOLS, Convention, Term, term
from powerplan.spec import Layer, LayerGroup, ModelSpec, Norm

BLOCKS: dict[str, type[Block]] = {**MIXERS, **FFNS}


def test_the_kinds_are_these() -> None:
    assert tuple(MIXERS) == KINDS, "a kind was added or removed: docs/extending.md lists what belongs to it"


def test_random_specs_hold_every_kind() -> None:
    assert list(by_kind) == list(MIXERS)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_kind_says_what_it_counts_and_after_whom(kind: str) -> None:
    own = vars(BLOCKS[kind])
    assert own["__doc__"]
    assert own["source"]


def terms_of(block: Block) -> Iterator[Term]:
    for terms in (block.other_terms, block.idle_terms):
        yield from terms(8)
    yield from multiplied_terms(block, 8)
    if isinstance(block, Mixer):
        yield from block.state_terms(100)
        yield from block.decode_flops_terms(100)
        for form in ("recurrent", "chunked"):
            yield from block.state_flops_terms(100, Convention(form=form))  # type: ignore[arg-type]
    yield from saved_terms_of(block)


def saved_terms_of(block: Block) -> Iterator[Term]:
    """Yield what training keeps of the block and what exists beside, with the kernels of a GPU and with torch's."""
    for kernels in get_args(Kernels):
        own = block.runs_on(kernels)
        moments = block.working_formulas(100, own)
        parts = [*block.saved_formulas(100, own), *(part for moment in moments for part in moment)]
        formulas = tuple((part.component, part.formula) for part in parts)
        yield from block.terms(formulas, m=8, t=100, cast=1, **block.saved_values(100, own))


def terms_outside_layers() -> Iterator[Term]:
    layer = Layer(ffn=FFNS["mlp"](intermediate_size=2))  # type: ignore[call-arg]
    layers = (LayerGroup.of([layer]),)
    norm = Norm(embedding=True)
    spec = ModelSpec(name="x", vocab_size=9, hidden_size=8, position_embeddings=5, norm=norm, layers=layers)
    for terms in (
        spec.embedding_terms,
        spec.position_terms,
        spec.head_terms,
        lambda: spec.norm_terms(layer),
        lambda: Extra(name="x", vectors=2, elements=3).other_terms(8),
        spec.final_norm_terms,
        spec.embedding_norm_terms,
    ):
        assert terms()
        yield from terms()


def letters_of(formula: str) -> set[str]:
    return set(re.findall("[A-Za-z]+", formula))


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_letter_has_a_meaning_and_a_value(kind: str) -> None:
    for block in variants(BLOCKS[kind]):
        for one in terms_of(block):
            assert letters_of(one.formula) <= SYMBOLS.keys() & one.symbols.keys()


def test_every_meaning_belongs_to_a_letter() -> None:
    """Nothing stands in SYMBOLS that no formula uses any more."""
    used = {
        letter
        for part in BLOCKS.values()
        for block in variants(part)
        for one in terms_of(block)
        for letter in letters_of(one.formula)
    }
    used |= {letter for one in terms_outside_layers() for letter in letters_of(one.formula)}
    assert used == set(SYMBOLS)


def test_a_letter_without_a_meaning_fails_at_once() -> None:
    with pytest.raises(AssertionError, match=r"m\*Q: SYMBOLS does not say what Q stands for"):
        term("gate", "m*Q", {"m": 2, "Q": 3})
