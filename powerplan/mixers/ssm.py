"""State space models: Mamba, Mamba-2, and log-linear attention on top of Mamba-2."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from typing import ClassVar

from powerplan.choices import Kernels
from powerplan.mixers.base import Inherited, Mixer
from powerplan.mixers.formulas import Convention, Formulas, Rational
from powerplan.mixers.kept import Kept, Moment, kept
from powerplan.mixers.linear import ChunkedState
from powerplan.part import Size, Width, Window, problem

SCAN_CHUNK = 2048
"""Tokens from one kept state of the selective scan to the next (mamba_ssm, csrc/selective_scan/selective_scan.cpp)."""


class Mamba1(Mixer, frozen=True, kw_only=True, tag_field="kind", tag="mamba1"):
    """Mamba: a diagonal state of N per inner channel, with step size, B and C from the data.

    parameters in matmuls: 2mI + WI + I(R + 2N) + RI + Im; A, D and the biases of step size and convolution IN + 3I more
    With `shared_size` (Mamba in place of attention's heads) the hidden state is projected to gate and C of I features,
    to the input and B of `shared` features, which groups of I/N heads of N channels share, and to the step size:
    m(2I + 2 shared + R) + WI + RI + Im.
    state: IN, and (W - 1)I of the convolution
    state FLOPs per token: 6IN: 1 for step size times A (its exponential is not counted), 1 for the decay, 2 for the
    update, 2 for the output. A scan does the same work, so both forms are equal.
    Checked against transformers' Mamba and Jamba.

    inner_size: channels of the state space, often twice the hidden size.
    dt_rank: rank of the projections that make the step size.
    state_dim: numbers of state of a channel.
    conv_size: tokens that the causal depthwise convolution spans; 0 if there is none.
    conv_bias: whether this convolution has biases.
    bias: of both projections.
    inner_norms: RMSNorms on step size, B and C (Jamba), R + 2N weights.
    shared_size: features of the input and of B, which groups of heads share as attention's keys and values; every
    channel has an input of its own where left out.
    """

    source = (
        "Gu, Dao 2023, arXiv 2312.00752, algorithm 2 and section 3.2; shared_size: Wang et al. 2024, arXiv 2408.15237"
    )
    saved_source = "mamba_ssm, ops/selective_scan_interface.py, MambaInnerFn.forward"
    letters = "I=inner_size N=state_dim R=dt_rank W=conv_size shared=shared_size m"
    transition = "I*N"
    state_again = "4*I*N"  # As the scan: decays, and what the token adds.
    whole_widths: ClassVar[tuple[str, ...]] = ("inner_size",)
    rounded_widths: ClassVar[tuple[str, ...]] = ("dt_rank",)

    inner_size: Size
    dt_rank: Size
    state_dim: Size = 16
    conv_size: Width = 4
    conv_bias: bool = True
    bias: bool = False
    inner_norms: bool = False
    shared_size: Size | None = None

    def check(self) -> None:
        if self.shared_size is None:
            return
        if self.inner_norms:
            raise problem("inner_norms", "has no place with shared_size: B and C are no projections of one input")
        for field, size in (("inner_size", self.inner_size), ("shared_size", self.shared_size)):
            if size % self.state_dim:
                raise problem(field, f"{size} is no multiple of state_dim {self.state_dim}, the channels of a head")
        if self.inner_size % self.shared_size:
            raise problem("shared_size", f"{self.shared_size} does not divide inner_size {self.inner_size}")

    def whole_sizes(self) -> dict[str, int]:
        return super().whole_sizes() | ({"shared_size": self.shared_size} if self.shared_size else {})

    def width_divisor(self) -> int:
        return super().width_divisor() // (self.state_dim if self.shared_size else 1)

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited:
        remark = "mamba1 with twice the width inside and a state of 16: the weights change too"
        return Inherited({"inner_size": 2 * hidden, "dt_rank": -(-hidden // 16)}, (remark,))

    @classmethod
    def one_head(cls, head_dim: int, v_head_dim: int) -> Mamba1:
        """Return `v_head_dim` channels; the default state_dim has the part of a key's head dim."""
        return cls(inner_size=v_head_dim, dt_rank=1)

    def matmul_formulas(self) -> Formulas:
        if self.shared_size:
            return (
                ("projections", "m*(2*I + 2*shared) + I*m"),
                ("step size", "m*R + R*I"),
                ("short convolutions", "W*I"),
            )
        return (
            ("projections", "2*m*I + I*m"),
            ("step size, B, C", "I*(R + 2*N) + R*I"),
            ("short convolutions", "W*I"),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        if self.shared_size:
            return (
                ("projections", "1", "2*I + 2*shared", "m"),
                ("projections", "1", "m", "I"),
                ("step size", "1", "R", "m"),
                ("step size", "1", "I", "R"),
            )
        return (
            ("projections", "1", "2*I", "m"),
            ("projections", "1", "m", "I"),
            ("step size, B, C", "1", "R + 2*N", "I"),
            ("step size, B, C", "1", "I", "R"),
        )

    def other_formulas(self) -> Formulas:
        return (
            ("A, D, step size", "I*N + 2*I"),
            ("biases", "I" if self.conv_size and self.conv_bias else ""),
            ("biases", ("2*I + 2*shared + R + m" if self.shared_size else "2*I + m") if self.bias else ""),
            ("inner norms", "R + 2*N" if self.inner_norms else ""),
        )

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return the input, both halves of its projection, step size, B and C, outputs, and a state per 2,048 tokens.

        The kernel computes the convolution and the step sizes again. With shared_size the scan's own kernel keeps what
        it reads (mamba_ssm, SelectiveScanFn.forward): convolved inputs, step size, B and C of all heads, and the gate.
        """
        return kept(
            ("input", "activations", "m"),
            ("projections", "activations", "6*I + R" if self.shared_size else "2*I + R + 2*N"),
            ("outputs", "activations", "I"),
            ("states", "fp32", "2*I*N*states"),
        )

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the scan's: convolved inputs and step sizes again, their gradients, and those of its inputs."""
        return (kept(("gradients", "activations", "6*I + R" if self.shared_size else "6*I + R + 2*N")),)

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        return {"states": Fraction(-(-context // SCAN_CHUNK), context)}

    def state_formulas(self) -> Formulas:
        return ((self.describe(), "I*N"), ("short convolutions", "(W - 1)*I" if self.conv_size else ""))

    def flops_formulas(self, chunked: bool) -> Formulas:
        return self.steps(decay_state="I*N + I*N", update_state="2*I*N", query_state="2*I*N")


class Mamba2(ChunkedState, frozen=True, kw_only=True, tag_field="kind", tag="mamba2"):
    """Mamba-2: H heads with a decay per head and token; B and C of N features are shared by the heads of a group.

    The inner width I is heads x head_dim.
    parameters in matmuls: m(2I + 2gN + H) + W(I + 2gN) + Im; A, D and the bias of the step size are 3H more
    state: IN, and (W - 1)(I + 2gN) of the convolution      state FLOPs per token: 5IN, one of them the decay
    Chunked (SSD): 2IN late + 2IN + 2(gN + I) keys, chunks of 256.
    Checked against transformers' Mamba-2 and Nemotron-H. mamba_ssm keeps W, not W - 1, inputs of the convolution.

    heads: heads, each with a decay of its own.
    head_dim: channels of a head.
    state_dim: numbers of state of a channel; the features of B and C.
    groups: groups of heads that share B and C.
    conv_size: tokens that the causal depthwise convolution spans; 0 if there is none.
    conv_bias: whether this convolution has biases.
    bias: of both projections, m and the channels of the input projection, whose formula is `projected`.
    gated_norm: an RMSNorm before the output projection, I weights.
    """

    source = "Dao, Gu 2024, arXiv 2405.21060, section 6 (SSD) and section 7 (block)"
    saved_source = "mamba_ssm, ops/triton/ssd_combined.py, MambaSplitConv1dScanCombinedFn.forward"
    letters = "I=inner_size N=state_dim g=groups H=heads W=conv_size m"
    state = "I*N"
    transition = "H"
    decay = "I*N"
    query = "2*I*N"
    update = "2*I*N"
    state_again = update
    within = "2*(g*N + I)*keys"
    projected = "2*I + 2*g*N + H"

    heads: Size
    head_dim: Size = 64
    state_dim: Size = 128
    groups: Size = 1
    conv_size: Width = 4
    conv_bias: bool = True
    bias: bool = False
    gated_norm: bool = True
    chunk_size: Window = 256

    @classmethod
    def one_head(cls, head_dim: int, v_head_dim: int) -> Mamba2:
        """Return one head of `v_head_dim` channels; the default state_dim has the part of a key's head dim."""
        return cls(heads=1, head_dim=v_head_dim)

    def check(self) -> None:
        if self.heads % self.groups:
            raise problem("groups", f"groups {self.groups} does not divide heads {self.heads}")

    def width_divisor(self) -> int:
        """B and C are shared by whole groups of heads, and a narrower model keeps as many groups."""
        return gcd(self.heads, self.heads // self.groups)

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited:
        remark = "twice the width inside in heads of 64, and a state of 128, as Mamba-2 has: the weights change too"
        return Inherited({"heads": max(1, hidden // 32)}, (remark,))

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return the input, what it is projected to, and the scan's output: all else is computed again."""
        return kept(
            ("input", "activations", "m"),
            ("projections", "activations", self.projected),
            ("outputs", "activations", "I"),
            ("output norm", "fp32", "g" if self.gated_norm else "", True),
        )

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the scan's: convolved inputs and outputs again, gradients of both, and the states of all chunks.

        The states are in fp32, and so are their gradients (mamba_ssm, ops/triton/ssd_combined.py,
        _mamba_chunk_scan_combined_bwd).
        """
        return (kept(("gradients", "activations", f"2*({self.projected}) + 3*I"), ("states", "fp32", "2*I*N*states")),)

    @property
    def inner_size(self) -> int:
        return self.heads * self.head_dim

    def matmul_formulas(self) -> Formulas:
        return (("projections", "m*(2*I + 2*g*N + H) + I*m"), ("short convolutions", "W*(I + 2*g*N)"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return ("projections", "1", "2*I + 2*g*N + H", "m"), ("projections", "1", "m", "I")

    def other_formulas(self) -> Formulas:
        return (
            ("A, D, step size", "3*H"),
            ("biases", "I + 2*g*N" if self.conv_size and self.conv_bias else ""),
            ("biases", self.projected + " + m" if self.bias else ""),
            ("output norm", "I" if self.gated_norm else ""),
        )

    def state_formulas(self) -> Formulas:
        recent = "(W - 1)*(I + 2*g*N)" if self.conv_size else ""
        return ((self.describe(), self.state), ("short convolutions", recent))


class LogLinear(Mamba2, frozen=True, kw_only=True, tag_field="kind", tag="log_linear"):
    """Log-linear attention over Mamba-2: a state for each level of a Fenwick tree over the past, weighted per token.

    Token i (from 0) queries one state for each 1 bit of i, and itself. To merge states is elementwise and not counted.
    parameters in matmuls: Mamba-2's, and mH max_levels for the weights of the levels; H max_levels more outside
    state: IN for each bit of t, and Mamba-2's convolution
    state FLOPs per token: 2IN to update, 3IN for each state that it queries (1 to decay, 2 to query), 2IN for itself.
    `asked` is the mean number of these states: 1 bits of i, or all bits under --causal full. Chunked: the same over
    whole chunks, 2IN asked + 2IN + 2(gN + I) keys.
    Parameters checked against flash-linear-attention; its gated DeltaNet variant is not supported.

    max_levels: levels of the tree, which bound the context: 15 for 16,384 tokens. Longer contexts are counted as if
    there were more levels.
    """

    source = "Guo et al. 2025, arXiv 2506.04761, section 3; flash-linear-attention"
    steady = False
    letters = Mamba2.letters + " levels=max_levels"
    state = "levels*I*N"
    query = "2*I*N*asked"
    transition = "H*levels*levels"  # Which levels merge over the tokens of a part, times the decay.
    projected = Mamba2.projected + " + H*levels"

    chunk_size: Window = 64
    max_levels: Size = 15

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("level weights", "m*H*levels"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("level weights", "1", "H*levels", "m"))

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("level weights", "H*levels"))

    def state_values(self, context: int) -> dict[str, int]:
        return {"levels": context.bit_length()}

    def flops_formulas(self, chunked: bool) -> Formulas:
        query, update = self.query, self.update
        if chunked:
            return self.steps(query_state=query, update_state=update, within_chunks=self.within)
        return self.steps(decay_state="I*N*asked", query_state=query, update_state=update, own_token=update)

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        chunk = self.chunk_size if convention.form == "chunked" else 1
        asked = mean_levels(context, chunk, convention.causal == "full")
        return {"asked": asked, **super().flops_values(context, convention)}

    def describe(self) -> str:
        return "log-linear"


def mean_levels(context: int, chunk_size: int, every: bool) -> Fraction:
    """Return the mean number of 1 bits in the index of a token's chunk; of all bits of the last index if `every`."""
    whole, rest = divmod(context, chunk_size)
    chunks = whole + (rest > 0)
    if every:
        return Fraction(max(0, (chunks - 1).bit_length()))
    ones = sum((whole >> bit + 1 << bit) + max(0, whole % (2 << bit) - (1 << bit)) for bit in range(whole.bit_length()))
    return Fraction(ones * chunk_size + whole.bit_count() * rest, context)
