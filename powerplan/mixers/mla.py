"""Multi-head latent attention: keys and values are kept as one low-rank latent per token."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from typing import Any, ClassVar, Literal

from powerplan.choices import Kernels
from powerplan.mixers.base import HeadShape, Inherited, Mixer
from powerplan.mixers.formulas import Convention, Formulas, Rational, Term, mean_keys, total
from powerplan.mixers.kept import Kept, Moment, kept, norm_kept
from powerplan.part import Size


class MLA(Mixer, frozen=True, kw_only=True, tag_field="kind", tag="mla"):
    """Multi-head latent attention (DeepSeek-V2): latent of L per token, plus r features of a shared RoPE key.

    parameters in matmuls: mq + qH(n + r), or mH(n + r) without q_lora_rank; m(L + r) + LH(n + v) + Hvm
    state: (L + r)t elements      state FLOPs per token, training and prefill: 2H(n + r + v) mean_keys
    decoding one token: 2H(2L + r)t, in absorbed form: queries attend to the latents, which are not expanded

    heads: query heads.
    q_lora_rank: features of the latent of a token's queries; one full projection makes them where left out.
    kv_lora_rank: features of the latent of a token's keys and values, which the cache keeps.
    qk_nope_head_dim: features of a query and of a key without positions, per head.
    qk_rope_head_dim: features with rotary positions, per head of the queries; all heads share one such key.
    v_head_dim: features of a value, per head.
    bias: on both down-projections and the output projection (attention_bias in DeepSeek's code).
    output_gate: a projection of the hidden state, Hv wide, that multiplies the output; "head" has one gate per head.
    """

    source = "DeepSeek-V2, arXiv 2405.04434, section 2.1 and Appendix C"
    letters = "m H=heads L=kv_lora_rank n=qk_nope_head_dim r=qk_rope_head_dim v=v_head_dim q=q_lora_rank"
    saved_source = "Dao 2023, arXiv 2307.08691, algorithms 1 and 2, over keys and values that are expanded"
    tracked = True
    state = "(L + r)*t"
    flops = "2*H*(n + r + v)*keys"
    entry = "L + r"
    swappable = True
    latent_heads = True
    rounded_widths: ClassVar[tuple[str, ...]] = ("kv_lora_rank", "q_lora_rank")

    heads: Size
    q_lora_rank: Size | None = None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    bias: bool = False
    output_gate: bool | Literal["head"] = False

    def matmul_formulas(self) -> Formulas:
        return (
            ("projections", "m*H*(n + r)" if self.q_lora_rank is None else "m*q + q*H*(n + r)"),
            ("projections", "m*(L + r) + L*H*(n + v) + H*v*m"),
            ("output gate", {False: "", True: "m*H*v", "head": "m*H"}[self.output_gate]),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        whole = (("projections", "1", "H*(n + r)", "m"),)
        query = (("projections", "1", "q", "m"), ("projections", "1", "H*(n + r)", "q"))
        return (
            *(whole if self.q_lora_rank is None else query),
            ("projections", "1", "L + r", "m"),
            ("projections", "1", "H*(n + v)", "L"),
            ("projections", "1", "m", "H*v"),
            ("output gate", "1" if self.output_gate else "0", "H" if self.output_gate == "head" else "H*v", "m"),
        )

    def other_formulas(self) -> Formulas:
        query = "" if self.q_lora_rank is None else "q + "
        return (("latent norms", f"{query}L"), ("biases", f"{query}L + r + m" if self.bias else ""))

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return the input, the latents and their norms, and the expanded heads as attention keeps them.

        Values are a part of what the latents are expanded to, H(n + v), and keep all of it. On a CPU, SDPA is flash
        attention where n + r = v, and else has all scores in fp32.
        """
        gate = {False: "", True: "H*v", "head": "H"}[self.output_gate]
        query = norm_kept(kernels, "q", "1") if self.q_lora_rank else ()
        latents = norm_kept(kernels, "L", "1")
        if kernels == "torch":
            # In fp32 the norm keeps the latents with the rotary features that stand beside them.
            latents = kept(("norms", "fp32", "2*L + 1 + (1 - cast)*r", True))
        heads, scores, sums = "2*H*(n + r) + H*(n + v)", "", "H"
        if kernels == "torch" and self.qk_nope_head_dim + self.qk_rope_head_dim != self.v_head_dim:
            heads, scores, sums = "", "2*H*(n + r) + H*t + H*v + (1 - cast)*H*n", ""
        return (
            *kept(("input", "activations", "m")),
            *query,
            *kept(("query latents", "activations", "q" if self.q_lora_rank else "")),
            *kept(("rotation", "activations", "" if kernels == "fused" else "(1 + cast)*r", True)),
            *latents,
            *kept(("latents", "activations", "L + r")),
            *kept(("queries, keys, values", "activations", heads), ("scores and heads", "fp32", scores)),
            *kept(("outputs", "activations", "H*v"), ("log-sum-exps", "fp32", sums)),
            *kept(("output gate", "activations", gate), ("gated output", "activations", gate and "H*v", True)),
        )

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the moment of the attention kernel, with the gradients of its inputs and of its output."""
        gradients = kept(("gradients", "activations", "2*H*(n + r) + 2*H*v"))
        if kernels == "fused":
            return ((*gradients, *kept(("workspace", "fp32", "H*(n + r) + H"))),)
        if self.qk_nope_head_dim + self.qk_rope_head_dim != self.v_head_dim:
            return (kept(("scores", "fp32", "2*H*t")),)
        return (gradients,)

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        return {"keys": mean_keys(context, convention.causal)}

    def decode_flops_terms(self, context: int) -> tuple[Term, ...]:
        return self.terms((("mla", "2*H*(2*L + r)*t"),), t=context)

    def head_shape(self, hidden: int) -> HeadShape:
        """Return grouped heads of the value head dim that take as many weights as this layer, as near as heads allow.

        They share 8 key/value heads, or as many as divide; m(H + G)k + mGv + Hvm with k = v is 2mv(H + G).
        """
        dim, kv_heads = self.v_head_dim, gcd(self.heads, 8)
        heads = Fraction(total(self.matmul_terms(hidden)), 2 * hidden * dim) - kv_heads
        return HeadShape(max(1, round(heads / kv_heads)) * kv_heads, kv_heads, dim, dim)

    def plain_heads(self, kind: str) -> Inherited:
        dims = {"head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim, "v_head_dim": self.v_head_dim}
        remark = "MLA's low-rank projections become full ones of the same heads: the weights change too"
        return Inherited({"heads": self.heads, **dims, "bias": self.bias}, (remark,))

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited | None:
        """Return MLA's fields; MLA in place of DSA loses the indexer."""
        if not isinstance(mixer, MLA):
            return None
        fields = {field: getattr(mixer, field) for field in MLA.__struct_fields__}
        return Inherited(fields, (f"the indexer is left out, {cls.__struct_config__.tag} has none",))

    @classmethod
    def from_heads(cls, heads: dict[str, Any], settings: dict[str, Any], remark: str) -> Inherited:
        """Return heads with the latents of DeepSeek-V3 (arXiv 2412.19437, section 4.2)."""
        dims = {"qk_nope_head_dim": heads["head_dim"], "v_head_dim": heads["v_head_dim"]}
        latents = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
        remark = f"{cls.__struct_config__.tag} with DeepSeek-V3's latents and a RoPE key of 64: the weights change too"
        return Inherited({"heads": heads["heads"], **latents, **dims}, (remark,))
