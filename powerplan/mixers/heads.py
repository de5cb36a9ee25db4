"""Projections of the mixers that have query heads and key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from powerplan.mixers.base import SAME, Mixer, Size, problem
from powerplan.mixers.formulas import Term, term
from powerplan.mixers.shape import HeadShape, Inherited


class GroupedHeads(Mixer, frozen=True, kw_only=True):
    """H query heads in groups that share G key/value heads (GQA; G = H is MHA, G = 1 is MQA).

    kv_heads, v_head_dim: the same as heads and head_dim where left out.
    bias: true for query, key, value, gate and output projections, "qkv" for all but the output projection.
    qk_norm: "head" is an RMSNorm over each head, 2k weights; "full" is one over all heads, (H + G)k weights.
    output_gate: a projection of the hidden state, Hv wide, that multiplies the output.
    """

    same_as: ClassVar[Mapping[str, str]] = {"kv_heads": "heads", "v_head_dim": "head_dim"}
    swappable: ClassVar[bool] = True

    heads: Size
    kv_heads: Size = SAME
    head_dim: Size
    v_head_dim: Size = SAME
    bias: bool | Literal["qkv"] = False
    qk_norm: Literal["none", "head", "full"] = "none"
    output_gate: bool = False

    def check(self) -> None:
        if self.heads % self.kv_heads:
            raise problem("kv_heads", f"kv_heads {self.kv_heads} does not divide heads {self.heads}")

    def head_symbols(self, hidden: int) -> dict[str, int]:
        return {"m": hidden, "H": self.heads, "G": self.kv_heads, "k": self.head_dim, "v": self.v_head_dim}

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        symbols = self.head_symbols(hidden)
        terms = [term("projections", "m*(H + G)*k + m*G*v + H*v*m", symbols)]
        if self.output_gate:
            terms.append(term("output gate", "m*H*v", symbols))
        return tuple(terms)

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        symbols = self.head_symbols(hidden)
        terms = []
        if self.bias:
            terms.append(term("biases", "(H + G)*k + G*v", symbols))
            if self.bias is True:
                terms.append(term("biases", "m", symbols))
            if self.output_gate:
                terms.append(term("biases", "H*v", symbols))
        if self.qk_norm != "none":
            terms.append(term("qk-norm", "2*k" if self.qk_norm == "head" else "(H + G)*k", symbols))
        return tuple(terms)

    def own_heads(self) -> HeadShape:
        return HeadShape(self.heads, self.kv_heads, self.head_dim, self.v_head_dim)

    def whole_widths(self) -> dict[str, int]:
        # A single key/value head stays the only one, however wide the model is.
        return {"heads": self.heads} | ({"kv_heads": self.kv_heads} if self.kv_heads > 1 else {})

    @classmethod
    def from_same_heads(cls, mixer: Mixer) -> Inherited | None:
        """Return every field that both kinds have, but for the window and the degree, which a swap asks about."""
        if not isinstance(mixer, GroupedHeads):
            return None
        fields = {
            field: getattr(mixer, field)
            for field in mixer.__struct_fields__
            if field in cls.__struct_fields__ and field not in ("window", "p")
        }
        lost = [field for field in ("gated", "sinks") if field not in fields and getattr(mixer, field, False)]
        kind = cls.__struct_config__.tag
        return Inherited(fields, tuple(f"{field} is left out, {kind} has none" for field in lost))

    def plain_heads(self, kind: str) -> Inherited:
        return plain_heads_of(self, kind)


def plain_heads_of(mixer: Any, kind: str) -> Inherited:
    """Return heads and head dims of a mixer that has them, for a kind with projections of its own."""
    heads = {field: getattr(mixer, field) for field in ("heads", "head_dim", "v_head_dim")}
    return Inherited(heads, (f"{kind} has projections of its own for the same heads: the weights change too",))
