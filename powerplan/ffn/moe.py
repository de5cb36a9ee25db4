"""Mixtures of experts, routed and shared, on the hidden state or on a latent of it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from powerplan.choices import Kernels
from powerplan.ffn.base import FFN, Picks, inner_gradients, inner_kept
from powerplan.mixers.formulas import Formulas, Term
from powerplan.mixers.kept import Kept, Moment, kept
from powerplan.part import MAX_SIZE, Size, problem


class MoE(FFN, frozen=True, kw_only=True, tag_field="kind", tag="moe"):
    """Mixture of E experts of width f, of which `top_k` (a) are active per token, and shared experts of total width s.

    Parameters in matmuls per token: router mE, active experts a x 3mf (2mf plain), shared experts 3ms (2ms plain), and
    m for a `shared_gate`. A latent of l features takes 2ml, and routed experts have l in place of m. The other E - a
    experts are stored and not used by the token.

    experts: routed experts of the layer.
    top_k: routed experts that a token uses.
    intermediate_size: width of one expert, in features.
    shared_intermediate_size: width of all shared experts together, in features; 0 without them.
    gated: whether one more projection gates each expert (SwiGLU, GeGLU).
    bias: on every routed expert.
    router_bias: one for each choice of the router.
    shared_gate: a gate of one number on the shared experts.
    latent_size: features that the input of routed experts is projected to, and back from; they work on the hidden state
    where left out.
    zero_experts: more choices of the router that compute nothing (LongCat); `top_k` stands for the most that a token
    can use, as no more than that many of its choices are experts.
    groups: equal parts of the routed experts, for routers that pick groups first (node-limited routing).
    top_groups: groups that a token's experts are of; all of them where left out. Both change no count of weights or
    FLOPs, only where a token is sent to in training.
    """

    source = "Shazeer et al. 2017, arXiv 1701.06538, section 2; DeepSeekMoE, arXiv 2401.06066 (shared)"
    tracked = True
    letters = "m E=experts a=top_k f=intermediate_size s=shared_intermediate_size l=latent_size Z=zero_experts"
    rounded_widths: ClassVar[tuple[str, ...]] = ("intermediate_size", "shared_intermediate_size", "latent_size")

    experts: Size
    top_k: Size
    intermediate_size: Size
    shared_intermediate_size: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)] = 0
    gated: bool = True
    bias: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    latent_size: Size | None = None
    zero_experts: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)] = 0
    groups: Size = 1
    top_groups: Size | None = None

    def check(self) -> None:
        if self.top_k > self.experts:
            raise problem("top_k", f"top_k {self.top_k} is more than the {self.experts} experts there are")
        if self.shared_gate and not self.shared_intermediate_size:
            raise problem("shared_gate", "shared_gate is set, and there is no shared expert to gate")
        if self.experts % self.groups:
            raise problem("groups", f"groups {self.groups} does not divide the {self.experts} experts")
        chosen = self.groups if self.top_groups is None else self.top_groups
        if chosen > self.groups:
            raise problem("top_groups", f"top_groups {chosen} is more than the {self.groups} groups there are")
        if self.top_k > chosen * (self.experts // self.groups):
            within = chosen * (self.experts // self.groups)
            raise problem("top_groups", f"top_groups {chosen} have {within} experts, less than the top_k {self.top_k}")

    def matmul_formulas(self) -> Formulas:
        return (
            ("router", "m*(E + Z)" if self.zero_experts else "m*E"),
            ("latent projections", "2*m*l" if self.latent_size else ""),
            ("active experts", f"a*{self._matrices}"),
            ("shared experts", ("3*m*s" if self.gated else "2*m*s") if self.shared_intermediate_size else ""),
            ("shared experts", "m" if self.shared_gate else ""),
        )

    def other_formulas(self) -> Formulas:
        router = "E + Z" if self.zero_experts else "E"
        return (
            ("biases", router if self.router_bias else ""),
            ("biases", f"a*({self._biases})" if self.bias else ""),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        experts, into, width = "E" if idle else "a", "2" if self.gated else "1", self._width
        return (
            ("router", "1", "E + Z", "m"),
            ("latent projections", "1" if self.latent_size else "0", "l", "m"),
            ("latent projections", "1" if self.latent_size else "0", "m", "l"),
            ("active experts", f"{into}*{experts}", "f", width),
            ("active experts", experts, width, "f"),
            ("shared experts", into, "s", "m"),
            ("shared experts", "1", "m", "s"),
            ("shared gate", "1" if self.shared_gate else "0", "1", "m"),
        )

    def part_of(self, component: str) -> str:
        shared = "shared_experts"  # Every token uses the latent projections too, and no list of experts names them.
        parts = {"active experts": "experts", "shared experts": shared, "latent projections": shared}
        return parts.get(component, "router")

    @property
    def picks(self) -> Picks:
        return Picks(self.experts, self.top_k)

    def dispatched(self, hidden: int) -> int:
        """Return the elements that a token sends to its experts, one way: one input for each of them."""
        return self.top_k * (self.latent_size or hidden)

    def nodes_sent_to(self, nodes: int) -> int | None:
        """Return how many of `nodes` nodes that share the experts a token is sent to at most; None without a limit.

        Groups lie whole on nodes, or on several where there are more nodes than groups (DeepSeek-V3, arXiv 2412.19437,
        section 2.1.2).
        """
        if self.top_groups is None or self.top_groups == self.groups:
            return None
        return min(self.top_groups * -(-nodes // self.groups), self.top_k, nodes)

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return the input, the router's numbers, the buffers of rows sent to experts, and what these keep.

        Rows exist three times: as sent, as returned, and times their weights. Indices have 8 bytes: the choices, the
        order of the rows, and the tokens of the rows.
        """
        rows, shared = f"a*{self._width}", self.shared_intermediate_size
        gate = "m + 1" if self.shared_gate else ""
        return (
            *kept(("input", "activations", "m"), ("latents", "activations", "2*l" if self.latent_size else "")),
            *kept(("router", "fp32", "a" if self.top_k > 1 else "E + 2"), ("router", "activations", "a")),
            *kept(("dispatch", "bytes", "24*a"), ("dispatch", "activations", f"3*{rows}")),
            *inner_kept("a*f", self.gated, kernels),
            *(inner_kept("s", self.gated, kernels) if shared else ()),
            *kept(("shared gate", "activations", gate)),
        )

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the moment of the shared experts, whose backward pass is the first, and that of the routed ones."""
        rows, shared = f"2*a*{self._width} + a", self.shared_intermediate_size
        if not shared:
            return (kept(("gradients", "activations", rows)),)
        kept_by_shared = " + ".join(part.formula for part in inner_kept("s", self.gated, kernels))
        if self.shared_gate:
            kept_by_shared += " + m + 1"
        return (
            kept(("gradients", "activations", inner_gradients("s", self.gated))),
            kept(("gradients", "activations", f"{rows} + m - ({kept_by_shared})")),
        )

    def idle_terms(self, hidden: int) -> tuple[Term, ...]:
        per_expert = f"{self._matrices} + {self._biases}" if self.bias else self._matrices
        return self.terms((("idle experts", f"(E - a)*({per_expert})"),), m=hidden)

    @property
    def _matrices(self) -> str:
        """The weights of one routed expert."""
        return f"{3 if self.gated else 2}*{self._width}*f"

    @property
    def _biases(self) -> str:
        """The biases of one routed expert."""
        return f"{'2*f' if self.gated else 'f'} + {self._width}"

    @property
    def _width(self) -> str:
        """The letter of the width that routed experts work on."""
        return "l" if self.latent_size else "m"

    def describe(self) -> str:
        return f"moe, {self.top_k} of {self.experts:,}"
