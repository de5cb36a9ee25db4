"""Dense FFNs."""

from __future__ import annotations

from typing import ClassVar

from powerplan.choices import Kernels
from powerplan.ffn.base import FFN, inner_gradients, inner_kept
from powerplan.mixers.formulas import Formulas
from powerplan.mixers.kept import Kept, Moment, kept
from powerplan.part import Size


class MLP(FFN, frozen=True, kw_only=True, tag_field="kind", tag="mlp"):
    """Dense FFN of width f. Parameters in matmuls: 3mf gated (SwiGLU, GeGLU), 2mf plain.

    intermediate_size: width of the hidden layer, in features.
    gated: whether one more projection gates it (SwiGLU, GeGLU).
    bias: on every projection.
    """

    source = "Vaswani et al. 2017, arXiv 1706.03762, section 3.3; Shazeer 2020, arXiv 2002.05202 (gated)"
    saved_source = "flash-linear-attention, modules/activations.py, SwiGLUFunction.forward; the down projection's input"
    tracked = True
    letters = "m f=intermediate_size"
    rounded_widths: ClassVar[tuple[str, ...]] = ("intermediate_size",)

    intermediate_size: Size
    gated: bool = True
    bias: bool = False

    def matmul_formulas(self) -> Formulas:
        return (("mlp", "3*m*f" if self.gated else "2*m*f"),)

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return ("mlp", "2" if self.gated else "1", "f", "m"), ("mlp", "1", "m", "f")

    def part_of(self, component: str) -> str:
        return "mlp"

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return the input, gate and up (torch: SiLU of the gate too), and the input of the down projection."""
        return (*kept(("input", "activations", "m")), *inner_kept("f", self.gated, kernels))

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the moment of the activation function, by when the down projection's input is gone."""
        return (kept(("gradients", "activations", inner_gradients("f", self.gated))),)

    def other_formulas(self) -> Formulas:
        biases = "2*f + m" if self.gated else "f + m"
        return (("biases", biases if self.bias else ""),)
