"""What every FFN answers beside what blocks do: its entries, of which a token reads a few, and what is on the host."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from powerplan.choices import Kernels
from powerplan.mixers.block import Block
from powerplan.mixers.formulas import Formulas, Term
from powerplan.mixers.kept import Kept, kept


class Picks(NamedTuple):
    """How many entries of a layer a token uses: `picked` experts, values or rows out of `entries`."""

    entries: int
    picked: int


class FFN(Block, frozen=True, kw_only=True):
    """A feed-forward network: the part of a layer that has weights and no state.

    is_table: whether its entries are rows that are looked up, and not experts that tokens are sent to. Expert
    parallelism divides experts; rows of a table are weights of the layer.
    """

    is_table: ClassVar[bool] = False

    @property
    def picks(self) -> Picks | None:
        """The entries of the layer and those that a token uses; None where every token uses all weights."""
        return None

    def repeated_formulas(self) -> Formulas:
        """Return those of the matmul parameters that a token multiplies once more, with other heads."""
        return ()

    def host_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that live in the memory of the host, and take none of a device."""
        return ()

    def dispatched(self, hidden: int) -> int:
        """Return the elements that a token sends to its experts, one way; 0 where there are no experts."""
        return 0

    def nodes_sent_to(self, nodes: int) -> int | None:
        """Return how many of `nodes` nodes that share the experts a token is sent to at most; None without a limit."""
        return None


def multiplied_terms(block: Block, hidden: int) -> tuple[Term, ...]:
    """Return the parameters that a token multiplies in a mixer or an FFN, once for each time: 2 weight FLOPs each.

    They are its `matmul_terms`; where heads share keys, those keys come once more for each other head.
    """
    again = block.terms(block.repeated_formulas(), m=hidden) if isinstance(block, FFN) else ()
    return (*block.matmul_terms(hidden), *again)


def inner_kept(width: str, gated: bool, kernels: Kernels) -> tuple[Kept, ...]:
    """Return what an MLP of a width keeps behind its input."""
    eager = f"2*({width})" if gated and kernels == "torch" else width
    return kept(
        ("projections", "activations", f"2*({width})" if gated else width),
        ("activation function", "activations", eager, True),
    )


def inner_gradients(width: str, gated: bool) -> str:
    """Return the gradients of an MLP's activation function, less the down projection's input."""
    return f"2*({width})" if gated else width
