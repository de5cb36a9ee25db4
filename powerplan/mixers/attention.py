"""Softmax attention: multi-head, grouped-query and multi-query, in a window, in chunks, with a forget gate."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

from powerplan.choices import Kernels
from powerplan.mixers.formulas import (
    Convention,
    Formulas,
    Rational,
    Term,
    least_keys_in_chunks,
    mean_keys,
    mean_keys_in_chunks,
)
from powerplan.mixers.heads import GroupedHeads
from powerplan.mixers.kept import Kept, Moment, kept
from powerplan.mixers.state_size import StateSize
from powerplan.part import Window, problem


class Attention(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="attention"):
    """Softmax attention over the whole context, or over the last `window` keys (the token itself included).

    parameters in matmuls: m(H + G)k + mGv + Hvm      state: G(k + v) min(t, w) elements
    state FLOPs per token: 2H(k + v) mean_keys, the same in both forms (QK^T and AV, 2 FLOPs per multiply-add)

    window: keys that a query attends to at most, in tokens, its own included; all of them where left out.
    sinks: one learned logit per query head (gpt-oss), parameters outside matmuls.
    shared_kv: keys and values are those of an earlier layer (Gemma 3n): no projections m G(k + v), no cache of its own.
    uncached: keys and values of a token are made and not kept; those of earlier tokens are another layer's (Dory's runs
    of a loop before the last): no cache of its own.
    keys_as_values: the projection of the keys makes the values too (Gemma 4): no projection mGv.
    differential: each query head attends to the values of two heads, and pairs of heads are subtracted with a learned
    weight, 4k parameters (Ye et al. 2024, arXiv 2410.05258): 2H(k + 2v) mean_keys state FLOPs.
    """

    source = (
        "Vaswani et al. 2017, arXiv 1706.03762, section 3.2; Ainslie et al. 2023, arXiv 2305.13245, section 2.2 (GQA)"
    )
    saved_source = "Dao 2023, arXiv 2307.08691, algorithms 1 and 2 (queries, keys, values, outputs, log-sum-exps)"
    tracked = True
    not_inherited: ClassVar[frozenset[str]] = frozenset({"window"})
    state = "G*(k + v)*kept"
    flops = "2*H*(k + v)*keys"
    entry = "G*(k + v)"

    window: Window | None = None
    sinks: bool = False
    shared_kv: bool = False
    uncached: bool = False
    keys_as_values: bool = False
    differential: bool = False

    def check(self) -> None:
        super().check()
        if self.keys_as_values and (self.shared_kv or self.head_dim != self.v_head_dim):
            raise problem("keys_as_values", "needs keys of this layer's own, and v_head_dim equal to head_dim")
        if self.uncached and self.shared_kv:
            raise problem("uncached", "is of keys and values that this layer makes, and with shared_kv it makes none")
        if self.differential and self.kv_heads % 2:
            raise problem("differential", f"needs pairs of key/value heads, and there are {self.kv_heads}")

    @property
    def window_size(self) -> int | None:
        return self.window

    @property
    def family(self) -> str:
        return "window" if self.window and self.kind == "attention" else self.kind

    @property
    def label(self) -> str:
        return self.describe().removeprefix("attention, ")

    @property
    def reads_another(self) -> bool:
        """Whether the keys and values that a decoded token reads are another layer's."""
        return self.shared_kv or self.uncached

    def kept(self, context: int) -> int:
        """Return the number of tokens whose keys and values are kept."""
        return context if self.window is None else min(context, self.window)

    def matmul_formulas(self) -> Formulas:
        if self.shared_kv:
            return ("projections", "m*H*k + H*v*m"), self._output_gate
        if self.keys_as_values:
            return ("projections", "m*(H + G)*k + H*v*m"), self._output_gate
        return super().matmul_formulas()

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        query, key, value, output, gate = super().matrix_formulas(idle)
        own = () if self.shared_kv else (key,) if self.keys_as_values else (key, value)
        return (query, *own, output, gate)

    def other_formulas(self) -> Formulas:
        formulas = super().other_formulas()
        if self.shared_kv or self.keys_as_values:
            without = {"(H + G)*k + G*v": "H*k" if self.shared_kv else "(H + G)*k"}
            without |= {"2*k": "k", "(H + G)*k": "H*k"} if self.shared_kv else {}
            formulas = tuple((component, without.get(formula, formula)) for component, formula in formulas)
        return (*formulas, ("sinks", "H" if self.sinks else ""), ("differential", "4*k" if self.differential else ""))

    def state_formulas(self) -> Formulas:
        return ((self.describe(), "0" if self.reads_another else self.state),)

    def state_size(self, context: int) -> StateSize:
        size = super().state_size(context)
        if not self.reads_another:
            return size
        read = self.kv_heads * (self.head_dim + self.v_head_dim) * self.kept(context)
        return StateSize(looked_up=read)

    def state_values(self, context: int) -> dict[str, int]:
        return {"kept": self.kept(context)}

    def flops_formulas(self, chunked: bool) -> Formulas:
        return ((self.describe(), "2*H*(k + 2*v)*keys"),) if self.differential else super().flops_formulas(chunked)

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        return {"keys": mean_keys(context, convention.causal, self.window)}

    def mix_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return what SDPA keeps. On a CPU it is flash attention where k = v, and else has all scores in fp32.

        A window there is a first window and pairs of windows, of the queries' own keys and those before: keys and
        values of a pair are twice those of its queries. Sinks give each query head keys of its own, and pad k and v to
        the larger of them.
        """
        if kernels == "fused":
            return super().mix_kept(context, kernels)
        windowed = self.window is not None and self.window < context
        if self.head_dim != self.v_head_dim and not self.sinks:
            pairs = "(3*k + 2*chunk + 2*v)*H*late + (2*k + chunk + v)*H*(padded - late)"
            scores = pairs if windowed else "2*H*k + H*v + H*t"
            return kept(("scores and heads", "fp32", scores), ("outputs", "activations", "H*v"))
        keys, k, v = ("H", *2 * [self._longer]) if self.sinks else ("G", "k", "v")
        outs = f"H*{v}" if k == v == "v" or self.head_dim == self.v_head_dim else "H*(k + v)"
        if not windowed:
            return kept(
                ("queries, keys, values", "activations", f"H*{k} + {keys}*({k} + {v})"),
                ("outputs", "activations", outs),
                ("log-sum-exps", "fp32", "H"),
            )
        first = f"{keys}*({k} + {v})*(padded - late)" if self.sinks else "G*(k + v)"
        return kept(
            ("queries, keys, values", "activations", f"H*{k}*(1 + padded) + {first} + 2*{keys}*({k} + {v})*late"),
            ("outputs", "activations", f"H*{v} + H*v"),
            ("mask", "activations", "2*chunk*(padded - late)"),
            ("log-sum-exps", "fp32", "H"),
        )

    @property
    def _longer(self) -> str:
        """The letter of the longer of the two head dims."""
        return "k" if self.head_dim >= self.v_head_dim else "v"

    def mix_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the kernel's moments. Scores in fp32 exist two times more while the gradient of their softmax is made.

        Over windows, the forward pass has as many scores, and heads in pairs of windows and as they were before.
        """
        if kernels == "fused":
            return super().mix_moments(context, kernels)
        windowed = self.window is not None and self.window < context
        if self.head_dim != self.v_head_dim and not self.sinks:
            if not windowed:
                return (kept(("scores", "fp32", "2*H*t")),)
            pairs = kept(
                ("scores and heads", "fp32", "2*H*(chunk + k)*late + cast*(H*k + 2*G*(k + v))*late"),
                ("heads", "activations", "2*H*k + G*(k + v)*(1 + 2*late)"),
            )
            return kept(("scores", "fp32", "4*H*chunk*late")), pairs
        if self.sinks:
            tensors = "(1 + 6*late)" if windowed else "5"
            return (kept(("gradients", "activations", f"{tensors}*H*{self._longer}"), ("gradients", "fp32", "H")),)
        if windowed:
            return (kept(("gradients", "activations", "(H*k + 2*G*(k + v))*late")),)
        return super().mix_moments(context, kernels)

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        if self.window is None or self.window >= context:
            return {}
        windows = -(-context // self.window)
        late, padded = Fraction((windows - 1) * self.window, context), Fraction(windows * self.window, context)
        return {"chunk": self.window, "padded": padded, "late": late}

    def describe(self) -> str:
        return self.kind if self.window is None else f"{self.kind}, window {self.window:,}"


class ChunkedAttention(Attention, frozen=True, kw_only=True, tag_field="kind", tag="chunked_attention"):
    """Softmax attention within chunks of `window` tokens (Llama 4): a query sees the keys of its own chunk so far.

    parameters in matmuls: attention's      state: G(k + v) min(t, w) elements, room for a whole chunk
    state FLOPs per token: 2H(k + v) keys, the mean keys of a query's own chunk
    A decoded token looks up the keys of its own chunk: (t - 1) mod w + 1 of them, its own included.

    window: tokens of a chunk.
    """

    source = "Llama 4, transformers 5.23, masking_utils.py, create_chunked_causal_mask"
    saved_source = Attention.saved_source
    steady = False
    window: Window = 8192

    @property
    def restarts_after(self) -> int:
        return self.window

    def keys_at(self, position: int) -> int:
        """Return the keys that token number `position`, from 1, attends to."""
        return (position - 1) % self.window + 1

    def state_size(self, context: int) -> StateSize:
        looked_up = self.kv_heads * (self.head_dim + self.v_head_dim) * self.keys_at(context)
        return replace(super().state_size(context), looked_up=looked_up)

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        return {"keys": mean_keys_in_chunks(context, convention.causal, self.window)}

    def least_state_flops_terms(self, first: int, last: int, convention: Convention) -> tuple[Term, ...]:
        keys = least_keys_in_chunks(first, last, convention.causal, self.window)
        return self.terms(self.flops_formulas(convention.form == "chunked"), keys=keys)

    def decode_flops_terms(self, context: int) -> tuple[Term, ...]:
        return self.terms(self.flops_formulas(chunked=False), keys=self.keys_at(context))

    def describe(self) -> str:
        return f"attention, chunks of {self.window:,}"


class Forgetting(Attention, frozen=True, kw_only=True, tag_field="kind", tag="forgetting"):
    """Forgetting attention (FoX): softmax attention whose scores decay by a gate per query head and token.

    parameters in matmuls: attention's, and mH for the gate, with H biases
    state: (G(k + v) + H) min(t, w), the cumulative log-gate of each head beside keys and values
    state FLOPs per token: 2H(k + v) keys, as attention; the decay is added to the scores, which is elementwise
    Parameters checked against flash-linear-attention. The key and value shift of the Pro block is not counted.
    """

    source = "Lin et al. 2025, arXiv 2503.02130, section 3; flash-linear-attention, layers/forgetting_attn.py"
    saved_source = "flash-linear-attention, ops/attn/parallel.py, ParallelAttentionFunction.forward"
    entry = "G*(k + v) + H"
    entry_gates = "H"

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("forget gate", "m*H"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("forget gate", "1", "H", "m"))

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("biases", "H"))

    def mix_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return what attention keeps, and of the gates their logits and their cumulative sums."""
        return (*super().mix_kept(context, kernels), *kept(("gates", "fp32", "2*H")))

    def state_formulas(self) -> Formulas:
        return ((self.describe(), "H*kept" if self.reads_another else "(G*(k + v) + H)*kept"),)

    def state_size(self, context: int) -> StateSize:
        """Return keys, values and gates; where another layer's keys and values are read, the gates are its own."""
        size = super().state_size(context)
        if not self.reads_another:
            return size
        gates = self.heads * self.kept(context)
        return StateSize(cache=gates, entry=self.heads, looked_up=(size.looked_up or 0) + gates)
