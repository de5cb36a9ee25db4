"""Recurrences with a matrix of state per head, over sequences that lie on several ranks: gated linear attention, delta
rules.

They are affine in the state, H' = A H + S, but A is more than one number a head. So each rank computes A and S of its
tokens, as if nothing stood before them; ranks hand them on (exchange.py); and each runs over its tokens from the state
that came in. Gradients of A and S come back by the reverse scan (passage.py). This is how flash-linear-attention does
it, too (fla/ops/cp).

The other way is to wait for the state before one's tokens and to run once. It sends no A and computes none, and the
ranks work one after another: N ranks take as long as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.api import requires_gradient
from powerplan.kernels.distributed.arguments import check_derivatives, check_tokens
from powerplan.kernels.distributed.layout import Piece
from powerplan.kernels.distributed.passage import Begin, End, Join, Passage
from powerplan.kernels.distributed.plan import ContextParallel
from powerplan.kernels.distributed.stretches import at, joined_finals, joined_outputs, left_behind, stretches

Tensors = dict[str, Tensor | None]
"""The tensors of some tokens, [B, T, ...], by their names; None for those that a recurrence does without."""


@dataclass(frozen=True)
class Recurrence:
    """A recurrence over tensors of tokens, `v` [B, T, H, V] among them.

    Attributes:
        kind: Its name: ranks must agree on it.
        key_dim: K, of a state [B, H, K, V].
        has_matrix: Whether the transition of a head is a matrix [K, K]. Else it is one number for each of K features.
        state_of: Takes tensors, and whether the transition is wanted. Returns the state that the tokens leave behind
            where nothing stands before them, and their transition [B, H, K, 1] or [B, H, K, K], or None.
        run: Takes tensors, and the state before them or None. Returns the outputs [B, T, H, V], and the state after
            them.
    """

    kind: str
    key_dim: int
    has_matrix: bool
    state_of: Callable[[Tensors, bool], tuple[Tensor, Tensor | None]]
    run: Callable[[Tensors, Tensor | None], tuple[Tensor, Tensor]]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def recur(
    plan: ContextParallel,
    recurrence: Recurrence,
    tensors: Mapping[str, Tensor | None],
    *,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run a recurrence over sequences of which each rank has some tokens.

    Args:
        plan: The plan.
        recurrence: What is computed.
        tensors: Those of this rank's tokens, [B, t, ...].
        return_state: Whether the final states are wanted.

    Returns:
        The outputs of this rank's tokens, [B, t, H, V]; and the final states of all sequences, [B, H, K, V] (or [N, H,
        K, V] where N are packed) on every rank, or None.

    Raises:
        ValueError: Tensors have not this rank's tokens, or ranks differ. It says which.
        RuntimeError: Another rank has failed, or makes no call.
    """
    v = tensors["v"]
    assert v is not None, "a recurrence has values"
    inputs = list(tensors.values())
    check_derivatives(*inputs)
    with plan.agreement.of_errors("the calls"):
        check_tokens(plan, **tensors)
    values = {
        "mixers": recurrence.kind,
        "rows": v.shape[0],
        "heads": v.shape[2],
        "head dims": (recurrence.key_dim, v.shape[3]),
        "dtype": str(v.dtype),
        "return_state": return_state,
        "gradients (recorded or not)": requires_gradient(*inputs),
    }
    plan.agreement.on("the calls", values)

    def state_of(_: Piece, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        return recurrence.state_of(_at(tensors, tokens), wanted)

    size = (v.shape[0], v.shape[2], recurrence.key_dim, v.shape[3])
    transition = (recurrence.key_dim, recurrence.key_dim if recurrence.has_matrix else 1)
    like = v.new_empty(0, dtype=torch.promote_types(v.dtype, torch.float32))
    states, transitions = left_behind(plan, state_of, size, transition, like)
    passage = Passage(plan)
    used = [bool(plan.fragments)] * len(inputs)
    token = Begin.apply(passage, states, transitions, used, *inputs)  # type: ignore[no-untyped-call]
    entries = End.apply(passage, token, transitions)  # type: ignore[no-untyped-call]
    outs, rows, ended = [], [], []
    for stretch in stretches(plan):
        first = stretch.tokens.start - stretch.pieces[0].start
        for piece in stretch.pieces:
            state = None if stretch.entry is None else entries[stretch.entry]
            out, end = recurrence.run(_at(tensors, slice(first + piece.start, first + piece.stop)), state)
            outs.append(out)
            if piece.ends:
                rows.append(end)
                ended.append(piece.sequence)
    made = joined_outputs(outs, inputs, v.shape, v)
    finals = joined_finals(plan, v.shape[0], entries, rows, ended) if return_state else None
    result: Any = Join.apply(plan, made, entries, finals)  # type: ignore[no-untyped-call]
    return result[0], result[1]


def _at(tensors: Mapping[str, Tensor | None], tokens: slice) -> Tensors:
    return {name: None if x is None else at(x, tokens) for name, x in tensors.items()}
