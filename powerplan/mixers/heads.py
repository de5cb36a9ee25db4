"""Projections of the mixers that have query heads and key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from powerplan.choices import Kernels
from powerplan.mixers.base import HeadShape, Inherited, Mixer
from powerplan.mixers.formulas import Formulas
from powerplan.mixers.kept import Kept, Moment, kept, norm_kept
from powerplan.part import SAME, Size, problem


class GroupedHeads(Mixer, frozen=True, kw_only=True):
    """H query heads in groups that share G key/value heads (GQA; G = H is MHA, G = 1 is MQA).

    heads: query heads.
    kv_heads: key/value heads; each is shared by heads / kv_heads query heads.
    head_dim: features of a query and of a key, per head.
    v_head_dim: features of a value, per head.
    bias: true for query, key, value, gate and output projections, "qkv" for all but the output projection, "output" for
    that one alone.
    qk_norm: "head" is an RMSNorm over each head, 2k weights; "full" is one over all heads, (H + G)k weights.
    output_gate: a projection of the hidden state, Hv wide, that multiplies the output; "head" has one gate per head.
    """

    same_as: ClassVar[Mapping[str, str]] = {"kv_heads": "heads", "v_head_dim": "head_dim"}
    letters = "m H=heads G=kv_heads k=head_dim v=v_head_dim"
    swappable = True
    not_shared: ClassVar[frozenset[str]] = frozenset({"window", "p"})

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

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return the input, what the heads are made with, what `mix_kept` says, and the output gate.

        The rotation of queries and keys needs its cosines and sines, which fused kernels keep once for all layers.
        """
        gate = "H*v" if self.output_gate is True else "H" if self.output_gate else ""
        return (
            *kept(("input", "activations", "m")),
            *self.qk_norm_kept(kernels),
            *kept(("rotation", "activations", "" if kernels == "fused" else "(1 + cast)*k", True)),
            *self.mix_kept(context, kernels),
            *kept(("output gate", "activations", gate)),
            *kept(("gated output", "activations", gate and "H*v", True)),
        )

    def qk_norm_kept(self, kernels: Kernels) -> tuple[Kept, ...]:
        """Return what the norms of queries and keys keep."""
        if self.qk_norm == "none":
            return ()
        return norm_kept(kernels, "(H + G)*k", "H + G" if self.qk_norm == "head" else "2")

    def mix_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return what the kernel keeps: FlashAttention's queries, keys, values, outputs and log-sum-exps.

        The output projection reads the kernel's outputs, which it does not keep a second time.
        """
        return kept(
            ("queries, keys, values", "activations", "H*k + G*(k + v)"),
            ("outputs", "activations", "H*v"),
            ("log-sum-exps", "fp32", "H"),
        )

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the moment of the output gate and that of the kernel, by when the gate and its output are gone."""
        kernel = self.mix_moments(context, kernels)
        if not self.output_gate:
            return kernel
        gone = "m - 2*H*v" if self.output_gate is True else "m - H*v - H"
        return kept(("gradients", "activations", "2*H*v")), *(
            (*moment, *kept(("gate", "activations", gone))) for moment in kernel
        )

    def mix_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return what the kernel makes: in its backward pass gradients of its inputs, from that of its output.

        FlashAttention adds up the queries' gradients in fp32 and, where heads share keys and values, makes theirs for
        every head (csrc/flash_attn/flash_api.cpp: dq_accum, softmax_d, dk_expanded, dv_expanded).
        """
        gradients = kept(("gradients", "activations", "H*k + G*(k + v) + H*v"))
        if kernels == "torch":
            return (gradients,)
        shared = "H*(k + v)" if self.kv_heads < self.heads else ""
        return ((*gradients, *kept(("workspace", "fp32", "H*k + H"), ("workspace", "activations", shared))),)

    def own_heads(self) -> HeadShape:
        return HeadShape(self.heads, self.kv_heads, self.head_dim, self.v_head_dim)

    def whole_sizes(self) -> dict[str, int]:
        # A single key/value head stays the only one, however wide the model is.
        return {"heads": self.heads} | ({"kv_heads": self.kv_heads} if self.kv_heads > 1 else {})

    @classmethod
    def from_same_heads(cls, mixer: Mixer) -> Inherited | None:
        """Return every field that both kinds have, but for those that are `not_shared`.

        These are the window and the degree, which a swap asks about, and sizes that one of the kinds has in a sense of
        its own: blocks, chunks, how many of what a query picks.
        """
        if not isinstance(mixer, GroupedHeads):
            return None
        shared = set(cls.__struct_fields__) - cls.not_shared - mixer.not_shared
        fields = {field: getattr(mixer, field) for field in mixer.__struct_fields__ if field in shared}
        own = ("gated", "sinks", "shared_kv", "keys_as_values", "differential")
        lost = [field for field in own if field not in fields and getattr(mixer, field, False)]
        kind = cls.__struct_config__.tag
        return Inherited(fields, tuple(f"{field} is left out, {kind} has none" for field in lost))
