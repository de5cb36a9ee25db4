"""What training keeps of a layer's activations: bytes per token from the forward to the backward pass, and beside it."""

from __future__ import annotations

from fractions import Fraction

from powerplan.mixers.base import Block
from powerplan.run.recipe import Recipe
from powerplan.spec import Layer, ModelSpec


def kept_bytes(spec: ModelSpec, layer: Layer, context: int, recipe: Recipe) -> Fraction:
    """Return the bytes per token that a layer keeps from the forward to the backward pass."""
    if recipe.recompute == "full":
        return spec.hidden_size * recipe.activation_bytes
    return _all_bytes(spec, layer, recipe)


def peak_bytes(spec: ModelSpec, layer: Layer, context: int, recipe: Recipe) -> Fraction:
    """Return the bytes per token that exist at most in a layer's backward pass, beside what layers keep."""
    again = _all_bytes(spec, layer, recipe) if recipe.recompute == "full" else Fraction(0)
    return again + 4 * spec.hidden_size * recipe.activation_bytes


def _all_bytes(spec: ModelSpec, layer: Layer, recipe: Recipe) -> Fraction:
    norms = spec.norms_of(layer) * spec.hidden_size
    return (norms + sum(_elements(block, spec.hidden_size) for block in layer.blocks)) * recipe.activation_bytes


def _elements(block: Block, hidden: int) -> int:
    """Return the input of a block and the outputs of its matrices, in elements per token."""
    formulas = [("rows", f"({count})*({rows})") for _, count, rows, _ in block.matrix_formulas(idle=False)]
    return hidden + sum(int(term.value) for term in block.terms(tuple(formulas), m=hidden))


def loss_bytes(spec: ModelSpec, recipe: Recipe) -> tuple[Fraction, Fraction]:
    """Return the bytes per token of logits and cross entropy: what stays for all tokens, and what exists at the peak."""
    return Fraction(0), Fraction(12 * spec.vocab_size)
