"""Projections of the mixers that have query heads and key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from powerplan.mixers.base import SAME, HeadShape, Inherited, Mixer, Size, problem
from powerplan.mixers.formulas import Formulas


class GroupedHeads(Mixer, frozen=True, kw_only=True):
    """H query heads in groups that share G key/value heads (GQA; G = H is MHA, G = 1 is MQA).

    kv_heads, v_head_dim: the same as heads and head_dim where left out.
    bias: true for query, key, value, gate and output projections, "qkv" for all but the output projection.
    qk_norm: "head" is an RMSNorm over each head, 2k weights; "full" is one over all heads, (H + G)k weights.
    output_gate: a projection of the hidden state, Hv wide, that multiplies the output.
    """

    same_as: ClassVar[Mapping[str, str]] = {"kv_heads": "heads", "v_head_dim": "head_dim"}
    letters = "m H=heads G=kv_heads k=head_dim v=v_head_dim"
    swappable = True

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

    def matmul_formulas(self) -> Formulas:
        return (
            ("projections", "m*(H + G)*k + m*G*v + H*v*m"),
            ("output gate", "m*H*v" if self.output_gate else ""),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (
            ("projections", "1", "H*k", "m"),
            ("projections", "1", "G*k", "m"),
            ("projections", "1", "G*v", "m"),
            ("projections", "1", "m", "H*v"),
            ("output gate", "1" if self.output_gate else "0", "H*v", "m"),
        )

    def other_formulas(self) -> Formulas:
        return (
            ("biases", "(H + G)*k + G*v" if self.bias else ""),
            ("biases", "m" if self.bias is True else ""),
            ("biases", "H*v" if self.bias and self.output_gate else ""),
            ("qk-norm", {"none": "", "head": "2*k", "full": "(H + G)*k"}[self.qk_norm]),
        )

    def own_heads(self) -> HeadShape:
        return HeadShape(self.heads, self.kv_heads, self.head_dim, self.v_head_dim)

    def whole_sizes(self) -> dict[str, int]:
        # A single key/value head stays the only one, however wide the model is.
        return {"heads": self.heads} | ({"kv_heads": self.kv_heads} if self.kv_heads > 1 else {})

    @classmethod
    def from_same_heads(cls, mixer: Mixer) -> Inherited | None:
        """Return every field that both kinds have, but for the window and the degree, which a swap asks about."""
        if not isinstance(mixer, GroupedHeads):
            return None
        shared = set(cls.__struct_fields__) - {"window", "p"}
        fields = {field: getattr(mixer, field) for field in mixer.__struct_fields__ if field in shared}
        lost = [field for field in ("gated", "sinks") if field not in fields and getattr(mixer, field, False)]
        kind = cls.__struct_config__.tag
        return Inherited(fields, tuple(f"{field} is left out, {kind} has none" for field in lost))
