"""Projections of the mixers that have query heads and key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from powerplan.mixers.base import SAME, HeadShape, Inherited, Mixer, Size, problem
from powerplan.mixers.formulas import Formulas


class GroupedHeads(Mixer, frozen=True, kw_only=True):
    """H query heads in groups that share G key/value heads (GQA; G = H is MHA, G = 1 is MQA).

    kv_heads, v_head_dim: the same as heads and head_dim where left out.
    bias: true for query, key, value, gate and output projections, "qkv" for all but the output projection, "output"
    for that one alone.
    qk_norm: "head" is an RMSNorm over each head, 2k weights; "full" is one over all heads, (H + G)k weights.
    output_gate: a projection of the hidden state, Hv wide, that multiplies the output; "head" has one gate per head.
    """

    same_as: ClassVar[Mapping[str, str]] = {"kv_heads": "heads", "v_head_dim": "head_dim"}
    letters = "m H=heads G=kv_heads k=head_dim v=v_head_dim"
    swappable = True

    heads: Size
    kv_heads: Size = SAME
    head_dim: Size
    v_head_dim: Size = SAME
    bias: bool | Literal["qkv", "output"] = False
    qk_norm: Literal["none", "head", "full"] = "none"
    output_gate: bool | Literal["head"] = False

    def check(self) -> None:
        if self.heads % self.kv_heads:
            raise problem("kv_heads", f"kv_heads {self.kv_heads} does not divide heads {self.heads}")

    def matmul_formulas(self) -> Formulas:
        return (
            ("projections", "m*(H + G)*k + m*G*v + H*v*m"),
            self._output_gate,
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (
            ("projections", "1", "H*k", "m"),
            ("projections", "1", "G*k", "m"),
            ("projections", "1", "G*v", "m"),
            ("projections", "1", "m", "H*v"),
            ("output gate", "1" if self.output_gate else "0", "H" if self.output_gate == "head" else "H*v", "m"),
        )

    @property
    def _output_gate(self) -> tuple[str, str]:
        return "output gate", {False: "", True: "m*H*v", "head": "m*H"}[self.output_gate]

    @property
    def input_bias(self) -> bool:
        """Whether the projections of the hidden state have biases."""
        return self.bias in (True, "qkv")

    def other_formulas(self) -> Formulas:
        return (
            ("biases", "(H + G)*k + G*v" if self.input_bias else ""),
            ("biases", "m" if self.bias in (True, "output") else ""),
            ("biases", "H*v" if self.input_bias and self.output_gate is True else ""),
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
        own = ("gated", "sinks", "shared_kv", "keys_as_values", "differential")
        lost = [field for field in own if field not in fields and getattr(mixer, field, False)]
        kind = cls.__struct_config__.tag
        return Inherited(fields, tuple(f"{field} is left out, {kind} has none" for field in lost))
