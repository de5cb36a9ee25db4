"""Softmax attention whose scores are gated: the Forgetting Transformer."""

from __future__ import annotations

from typing import ClassVar

from powerplan.mixers.attention import Attention
from powerplan.mixers.base import StateSize
from powerplan.mixers.formulas import Term, term


class Forgetting(Attention, frozen=True, kw_only=True, tag_field="kind", tag="forgetting"):
    """Forgetting attention (FoX): softmax attention whose scores decay by a gate per query head and token.

    parameters in matmuls: attention's, and mH for the gate, with H biases
    state: (G(k + v) + H) min(t, w), the cumulative log-gate of each head beside keys and values
    state FLOPs per token: 2H(k + v) keys, as attention; the decay is added to the scores, which is elementwise
    Parameters checked against flash-linear-attention. The key and value shift of the Pro block is not counted.
    """

    source: ClassVar[str] = (
        "Lin et al. 2025, arXiv 2503.02130, section 3; flash-linear-attention, layers/forgetting_attn.py"
    )

    @property
    def family(self) -> str:
        return self.kind

    @property
    def label(self) -> str:
        return self.describe()

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().matmul_terms(hidden), term("forget gate", "m*H", self.head_symbols(hidden)))

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().other_terms(hidden), term("biases", "H", self.head_symbols(hidden)))

    def state_terms(self, context: int) -> tuple[Term, ...]:
        symbols = {"G": self.kv_heads, "k": self.head_dim, "v": self.v_head_dim, "H": self.heads}
        return (term(self.describe(), "(G*(k + v) + H)*kept", symbols | {"kept": self.kept(context)}),)

    def state_size(self, context: int) -> StateSize:
        entry = self.kv_heads * (self.head_dim + self.v_head_dim) + self.heads
        return StateSize(cache=entry * self.kept(context), entry=entry)

    def describe(self) -> str:
        return "forgetting" if self.window is None else f"forgetting, window {self.window:,}"
