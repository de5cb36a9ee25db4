"""Softmax attention: multi-head, grouped-query and multi-query, with or without a sliding window."""

from __future__ import annotations

from typing import ClassVar

from powerplan.mixers.base import StateSize, Window
from powerplan.mixers.formulas import Convention, Rational, Term, mean_keys, term
from powerplan.mixers.heads import GroupedHeads


class Attention(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="attention"):
    """Softmax attention over the whole context, or over the last `window` keys (the token itself included).

    parameters in matmuls: m(H + G)k + mGv + Hvm      state: G(k + v) min(t, w) elements
    state FLOPs per token: 2H(k + v) mean_keys, the same in both forms (QK^T and AV, 2 FLOPs per multiply-add)
    sinks: one learned logit per query head (gpt-oss), parameters outside matmuls.
    """

    source: ClassVar[str] = (
        "Vaswani et al. 2017, arXiv 1706.03762, section 3.2; Ainslie et al. 2023, arXiv 2305.13245, section 2.2 (GQA)"
    )

    not_inherited: ClassVar[frozenset[str]] = frozenset({"window"})

    window: Window | None = None
    sinks: bool = False

    @property
    def window_size(self) -> int | None:
        return self.window

    @property
    def keeps_every_key(self) -> bool:
        return self.window is None

    @property
    def family(self) -> str:
        return self.kind if self.window is None else "window"

    @property
    def label(self) -> str:
        return self.kind if self.window is None else f"window {self.window:,}"

    def kept(self, context: int) -> int:
        """Return the number of tokens whose keys and values are kept."""
        return context if self.window is None else min(context, self.window)

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        terms = super().other_terms(hidden)
        return (*terms, term("sinks", "H", self.head_symbols(hidden))) if self.sinks else terms

    def state_terms(self, context: int) -> tuple[Term, ...]:
        symbols = {"G": self.kv_heads, "k": self.head_dim, "v": self.v_head_dim, "kept": self.kept(context)}
        return (term(self.describe(), "G*(k + v)*kept", symbols),)

    def state_size(self, context: int) -> StateSize:
        entry = self.kv_heads * (self.head_dim + self.v_head_dim)
        return StateSize(cache=entry * self.kept(context), entry=entry)

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        keys = mean_keys(context, convention.causal, self.window)
        symbols: dict[str, Rational] = {"H": self.heads, "k": self.head_dim, "v": self.v_head_dim, "keys": keys}
        return (term(self.describe(), "2*H*(k + v)*keys", symbols),)

    def describe(self) -> str:
        return "attention" if self.window is None else f"attention, window {self.window:,}"
