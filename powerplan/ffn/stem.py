"""Gated FFNs whose up-projection is a table with a row for each token of the vocabulary."""

from __future__ import annotations

from typing import ClassVar

from powerplan.choices import Kernels
from powerplan.ffn.base import FFN, Picks, inner_gradients, inner_kept
from powerplan.mixers.formulas import Formulas, Term
from powerplan.mixers.kept import Kept, Moment, kept
from powerplan.part import Size


class Stem(FFN, frozen=True, kw_only=True, tag_field="kind", tag="stem"):
    """Gated FFN of width f whose up-projection is a table: row f of the token's id in place of a product.

    Parameters in matmuls: 2mf, gate and down. The table has Vf, of which a token reads f; it takes no FLOPs. A gated
    MLP has 3mf: a third of its weight FLOPs is gone.

    intermediate_size: width of the hidden layer, in features; that of a row too.
    vocab_size: tokens that have a row in the table; the model's vocab_size where left out.
    host: whether the table lives in the memory of the host, and takes none of a device; a token's row comes over the
    host link.
    """

    source = "Sadhukhan et al. 2026, arXiv 2601.10639 (STEM); facebookresearch/STEM, lingua/stem.py, StemFeedForward"
    saved_source = "flash-linear-attention, modules/activations.py, SwiGLUFunction.forward; the row in place of up"
    letters = "m f=intermediate_size V=vocab_size"
    rounded_widths: ClassVar[tuple[str, ...]] = ("intermediate_size",)
    is_table: ClassVar[bool] = True

    intermediate_size: Size
    vocab_size: Size
    host: bool = False

    @property
    def picks(self) -> Picks:
        return Picks(self.vocab_size, 1)

    def matmul_formulas(self) -> Formulas:
        return (("mlp", "2*m*f"),)

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return ("mlp", "1", "f", "m"), ("mlp", "1", "m", "f")

    def part_of(self, component: str) -> str:
        return "mlp"

    def other_formulas(self) -> Formulas:
        return (("row of the table", "f"),)

    def idle_terms(self, hidden: int) -> tuple[Term, ...]:
        return self.terms((("rows of the table", "(V - 1)*f"),))

    def host_terms(self, hidden: int) -> tuple[Term, ...]:
        return self.terms((("table on the host", "V*f" if self.host else ""),))

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return the input, the gate and the row, the token's id, and the input of the down projection."""
        ids = kept(("ids", "bytes", "8"))
        return (*kept(("input", "activations", "m")), *ids, *inner_kept("f", True, kernels))

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the moment of the activation function: gradients of the gate and of the row."""
        return (kept(("gradients", "activations", inner_gradients("f", True))),)
