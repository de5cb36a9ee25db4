"""What a training step keeps of a block's activations for the backward pass, and what that pass makes beside.

Formulas are elements per token. Kernels are "fused" as on a GPU: FlashAttention, the Triton kernels of this package,
flash-linear-attention, mamba_ssm. Or they are those of "torch": what powerplan.models runs on a CPU, where torch's own
memory tracker checks the formulas (tests/run/test_tracker.py).
"""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple

from powerplan.choices import Kernels
from powerplan.mixers.formulas import Rational

Format = Literal["activations", "fp32", "bytes"]


class Kept(NamedTuple):
    """Tensors that stay from the forward to the backward pass, as a formula of their elements per token.

    component: what they are. format: "activations" for the format that the recipe trains in, "fp32", or "bytes" where
    the formula counts bytes: indices. again: whether selective recomputation makes them again from what stays beside
    them, without a matmul or a kernel.
    """

    component: str
    format: Format
    formula: str
    again: bool = False


Moment = tuple[Kept, ...]
"""What exists at one moment beside all that a block keeps, less what is not kept yet or no longer."""


class Keeping:
    """What a block answers about the memory of its activations.

    saved_source: where the formulas for fused kernels come from. tracked: whether powerplan.models builds the kind and
    torch's memory tracker holds its formulas. A kind states both for itself: what it inherits is an estimate.
    """

    __slots__ = ()
    saved_source = ""
    tracked: ClassVar[bool] = False

    @property
    def chunk_state(self) -> str:
        """The formula of the state that stays before each chunk; empty for a kind without chunks."""
        return ""

    def runs_on(self, kernels: Kernels) -> Kernels:
        """Return whose formulas count: those of "torch" only where the kind is `tracked`."""
        return kernels if vars(type(self)).get("tracked") else "fused"

    def saved_is_estimate(self, kernels: Kernels) -> bool:
        """Return whether what this kind keeps is an estimate: no kernel's code and no measurement stands behind it."""
        return self.runs_on(kernels) == "fused" and not vars(type(self)).get("saved_source")

    @property
    def _is_known(self) -> bool:
        own = vars(type(self))
        return bool(own.get("tracked") or own.get("saved_source"))

    def saved_formulas(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return what stays from the forward to the backward pass, the block's input included.

        The estimate of a kind that is not known better: the input, what the matrices make of it (what the last one
        makes stands for its input), and the state before each chunk where the kind has chunks.
        """
        if self._is_known:
            return self.own_kept(context, self.runs_on(kernels))
        rows = " + ".join(f"({count})*({rows})" for _, count, rows, _ in self.matrix_formulas(idle=False))
        states = self.chunk_state and f"({self.chunk_state})*states"
        return kept(
            ("input", "activations", "m"), ("projections", "activations", rows), ("states", "activations", states)
        )

    def working_formulas(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the moments of both passes that may be the worst, without the gradient of the layer's output.

        The estimate of a kind that is not known better: a gradient of everything that is kept.
        """
        if self._is_known:
            return self.own_moments(context, self.runs_on(kernels))
        return (self.saved_formulas(context, kernels),)

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return what stays from the forward to the backward pass, of a kind that is known."""
        raise NotImplementedError

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the moments of both passes that may be the worst, of a kind that is known."""
        raise NotImplementedError

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        """Return the letters of these formulas that are no fields, but for m, t and cast."""
        return {}

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        raise NotImplementedError


def kept(*parts: tuple[str, Format, str] | tuple[str, Format, str, bool]) -> tuple[Kept, ...]:
    """Return the parts that have a formula."""
    return tuple(Kept(*part) for part in parts if part[2])


def norm_kept(
    kernels: Kernels, width: str, rows: str, weights: bool = True, input_kept: bool = False
) -> tuple[Kept, ...]:
    """Return what an RMSNorm of `width` features in `rows` rows per token keeps.

    A fused norm keeps its input, and one fp32 number a row. torch's norm on a CPU is made of plain operators: it keeps
    an fp32 copy of the input, and, for the gradient of the weights, the normalised input.
    input_kept: whether another operator keeps the input too, in the format of activations.
    """
    if kernels == "fused":
        return kept(
            ("norms", "activations", "" if input_kept else width, True),
            ("norms", "fp32", rows, True),
        )
    copy = f"cast*({width})" if input_kept else width
    normalised = f" + {width}" if weights else ""
    return kept(("norms", "fp32", f"{copy} + {rows}{normalised}", True))


def chunk_values(context: int, chunk_size: int, chunks_per_state: int = 1) -> dict[str, Rational]:
    """Return the letters of chunks: tokens of one, states kept before chunks but the first, tokens after the first.

    chunks_per_state: chunks from one kept state to the next.
    """
    chunk = min(chunk_size, context)
    chunks = -(-context // chunk)
    return {
        "chunk": chunk,
        "states": Fraction(-(-chunks // chunks_per_state) - 1, context),
        "late": Fraction(context - chunk, context),
    }
