"""Softmax attention: multi-head, grouped-query and multi-query, with a sliding window, with a forget gate."""

from __future__ import annotations

from typing import ClassVar

from powerplan.mixers.base import Window
from powerplan.mixers.formulas import Convention, Formulas, Rational, Term, mean_keys, term
from powerplan.mixers.heads import GroupedHeads


class Attention(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="attention"):
    """Softmax attention over the whole context, or over the last `window` keys (the token itself included).

    parameters in matmuls: m(H + G)k + mGv + Hvm      state: G(k + v) min(t, w) elements
    state FLOPs per token: 2H(k + v) mean_keys, the same in both forms (QK^T and AV, 2 FLOPs per multiply-add)
    sinks: one learned logit per query head (gpt-oss), parameters outside matmuls.
    """

    source = (
        "Vaswani et al. 2017, arXiv 1706.03762, section 3.2; Ainslie et al. 2023, arXiv 2305.13245, section 2.2 (GQA)"
    )
    not_inherited: ClassVar[frozenset[str]] = frozenset({"window"})
    state = "G*(k + v)*kept"
    flops = "2*H*(k + v)*keys"
    entry = "G*(k + v)"

    window: Window | None = None
    sinks: bool = False

    @property
    def window_size(self) -> int | None:
        return self.window

    @property
    def family(self) -> str:
        return "window" if self.window and self.kind == "attention" else self.kind

    @property
    def label(self) -> str:
        return self.describe().removeprefix("attention, ")

    def kept(self, context: int) -> int:
        """Return the number of tokens whose keys and values are kept."""
        return context if self.window is None else min(context, self.window)

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("sinks", "H" if self.sinks else ""))

    def state_values(self, context: int) -> dict[str, int]:
        return {"kept": self.kept(context)}

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        return {"keys": mean_keys(context, convention.causal, self.window)}

    def describe(self) -> str:
        return self.kind if self.window is None else f"{self.kind}, window {self.window:,}"


class Forgetting(Attention, frozen=True, kw_only=True, tag_field="kind", tag="forgetting"):
    """Forgetting attention (FoX): softmax attention whose scores decay by a gate per query head and token.

    parameters in matmuls: attention's, and mH for the gate, with H biases
    state: (G(k + v) + H) min(t, w), the cumulative log-gate of each head beside keys and values
    state FLOPs per token: 2H(k + v) keys, as attention; the decay is added to the scores, which is elementwise
    Parameters checked against flash-linear-attention. The key and value shift of the Pro block is not counted.
    """

    source = "Lin et al. 2025, arXiv 2503.02130, section 3; flash-linear-attention, layers/forgetting_attn.py"
    entry = "G*(k + v) + H"

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("forget gate", "m*H"))

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("biases", "H"))

    def state_terms(self, context: int) -> tuple[Term, ...]:
        symbols = {"G": self.kv_heads, "k": self.head_dim, "v": self.v_head_dim, "H": self.heads}
        return (term(self.describe(), "(G*(k + v) + H)*kept", symbols | self.state_values(context)),)
