"""Memory layers: a token looks up a few of many values, which product keys find."""

from __future__ import annotations

from typing import ClassVar

from powerplan.ffn.base import FFN, Picks
from powerplan.mixers.formulas import Formulas, Term
from powerplan.part import Size, problem


class Memory(FFN, frozen=True, kw_only=True, tag_field="kind", tag="memory"):
    """Memory layer: H queries find `picks` values each, out of the product of two sets of `subkeys` keys.

    There are subkeys^2 values of v features (of the hidden size m where `value_size` is left out).
    Parameters in matmuls: queries 2Hkm, keys 2 H subkeys k, values H picks v, a value projection vm, a gate mv.
    With neurons a value is an expert of one neuron (PEER): its vector u of m features, or of `pre` features behind an
    input projection of m pre, is multiplied with the input: H picks m, or H picks pre, more.
    Keys are weights: that each is scored counts as weight FLOPs, also where heads share them. The best of picks^2 sums
    of two scores are found without matmuls and count nothing, nor do products with a Tucker core.
    All other values are stored and not used by the token.

    keys: keys of each of the two sets; there are as many values as pairs of them.
    heads: queries of a token, each of which finds `top_k` values.
    top_k: values that a query finds.
    key_dim: features of a key, which half of a query is compared with.
    value_size: features of a value; those of the hidden state where left out.
    neurons: whether a value is an expert of one neuron, with a vector for its input beside that for its output.
    input_size: features that the input is projected to for the neurons; they work on the hidden state where left out.
    value_projection: from the features of the values to those of the hidden state.
    gated: whether a projection of the input gates the sum of the values (Memory+).
    shared_keys: whether all heads compare with the same keys (PEER).
    rank: keys that stand in the place of each one, whose scores a Tucker core combines (UltraMem).
    rank_queries: whether each rank has queries of its own (UltraMemV2).
    qk_norm: an RMSNorm on queries and one on keys, key_dim weights each.
    host: whether the values live in the memory of the host, and take none of a device; those that a token uses come
    over the host link.
    """

    source = (
        "Lample et al. 2019, arXiv 1907.05242, section 3; PEER: arXiv 2407.04153, section 2; "
        "Memory+: arXiv 2412.09764, section 2; UltraMem: arXiv 2411.12364; UltraMemV2: arXiv 2508.18756, eq. 6-15"
    )
    letters = "m H=heads subkeys=keys picks=top_k k=key_dim v=value_size pre=input_size rank=rank"
    rounded_widths: ClassVar[tuple[str, ...]] = ("value_size", "input_size", "key_dim")
    is_table: ClassVar[bool] = True

    keys: Size
    heads: Size = 1
    top_k: Size
    key_dim: Size
    value_size: Size | None = None
    neurons: bool = False
    input_size: Size | None = None
    value_projection: bool = False
    gated: bool = False
    shared_keys: bool = False
    rank: Size = 1
    rank_queries: bool = False
    qk_norm: bool = False
    host: bool = False

    def check(self) -> None:
        if self.heads * self.top_k > self.keys**2:
            values = f"{self.heads} x {self.top_k} values are more than the {self.keys**2:,} there are"
            raise problem("top_k", f"{values}, {self.keys:,} x {self.keys:,} pairs of keys")
        if self.input_size is not None and not self.neurons:
            raise problem("input_size", "is the width of the neurons' input, and neurons is not set")
        if self.value_size is not None and not self.value_projection:
            raise problem("value_size", "needs value_projection; values have the hidden size where it is left out")
        if self.gated and not self.value_projection:
            raise problem("gated", "needs value_projection: the gate stands before it")
        if self.rank_queries and self.rank == 1:
            raise problem("rank_queries", "is set, and rank is 1")

    @property
    def picks(self) -> Picks:
        return Picks(self.keys**2, self.heads * self.top_k)

    @property
    def _value(self) -> str:
        """The features of a value."""
        return "v" if self.value_size else "m"

    @property
    def _entry(self) -> str:
        """The parameters of a value, with its vector for the input."""
        before = ("pre" if self.input_size else "m") if self.neurons else ""
        return f"({before} + {self._value})" if before else self._value

    @property
    def _queries(self) -> str:
        return "2*H*rank*k" if self.rank_queries else "2*H*k"

    @property
    def _sets(self) -> str:
        """How many sets of keys there are."""
        heads = "2" if self.shared_keys else "2*H"
        return f"{heads}*rank" if self.rank > 1 else heads

    def matmul_formulas(self) -> Formulas:
        return (
            ("queries", f"{self._queries}*m"),
            ("keys", f"{self._sets}*subkeys*k"),
            ("memory projections", "m*pre" if self.input_size else ""),
            ("values", f"H*picks*{self._entry}"),
            ("memory projections", f"m*{self._value}" if self.gated else ""),
            ("memory projections", f"{self._value}*m" if self.value_projection else ""),
        )

    def repeated_formulas(self) -> Formulas:
        return (("keys", f"(H - 1)*{self._sets}*subkeys*k" if self.shared_keys and self.heads > 1 else ""),)

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        rows = "subkeys*subkeys" if idle else "H*picks"
        before = ("pre" if self.input_size else "m") if self.neurons else "0"
        return (
            ("queries", "1", self._queries, "m"),
            ("keys", self._sets, "subkeys", "k"),
            ("memory projections", "1", "pre" if self.input_size else "0", "m"),
            ("values", "1", rows, before),
            ("values", "1", rows, self._value),
            ("memory projections", "1" if self.gated else "0", self._value, "m"),
            ("memory projections", "1" if self.value_projection else "0", "m", self._value),
        )

    def part_of(self, component: str) -> str:
        return {"values": "experts", "memory projections": "shared_experts"}.get(component, "router")

    def other_formulas(self) -> Formulas:
        return (
            ("memory norms", "2*k" if self.qk_norm else ""),
            ("Tucker cores", "2*H*rank*rank" if self.rank > 1 else ""),
        )

    def idle_terms(self, hidden: int) -> tuple[Term, ...]:
        return self.terms((("idle values", f"(subkeys*subkeys - H*picks)*{self._entry}"),), m=hidden)

    def host_terms(self, hidden: int) -> tuple[Term, ...]:
        formula = f"subkeys*subkeys*{self._entry}" if self.host else ""
        return self.terms((("values on the host", formula),), m=hidden)

    def describe(self) -> str:
        return f"memory, {self.heads * self.top_k:,} of {self.keys**2:,}"
