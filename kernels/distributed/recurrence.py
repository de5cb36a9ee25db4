"""Recurrences that are affine in their state, over sequences that lie on several ranks: gated linear attention, delta
rules, state space models, slots.

They are H' = A H + S, but A may be more than one number a head. So each rank computes A and S of its
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
    """A recurrence over tensors of tokens, `v` [B, T, ...] among them, whose outputs have the size of `v`.

    Attributes:
        kind: Its name: ranks must agree on it.
        state: (H, D, W), the sizes of a state [B, H, D, W].
        transition: That of a head: (1, 1), one decay; (D, 1), one for each of D features; or (D, D), a matrix.
        state_of: Takes tensors, the place of their first token in its sequence, and whether the transition is wanted.
            Returns the state that the tokens leave behind where nothing stands before them, and their transition
            [B, H, ...], or None.
        run: Takes tensors, the place of their first token in its sequence, and the state before them or None. Returns
            the outputs, and the state after them.
        weights: What it reads besides, the same for all tokens.
    """

    kind: str
    state: tuple[int, int, int]
    transition: tuple[int, int]
    state_of: Callable[[Tensors, int, bool], tuple[Tensor, Tensor | None]]
    run: Callable[[Tensors, int, Tensor | None], tuple[Tensor, Tensor]]
    weights: tuple[Tensor, ...] = ()


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
        The outputs of this rank's tokens, [B, t, ...]; and the final states of all sequences, [B, H, D, W] (or [N, H,
        D, W] where N are packed) on every rank, or None.

    Raises:
        ValueError: Tensors have not this rank's tokens, or ranks differ. It says which.
        RuntimeError: Another rank has failed, or makes no call.
    """
    v = tensors["v"]
    assert v is not None, "a recurrence has values"
    inputs = [*tensors.values(), *recurrence.weights]
    check_derivatives(*inputs)
    with plan.agreement.of_errors("the calls"):
        check_tokens(plan, **tensors)
    values = {
        "mixers": recurrence.kind,
        "rows": v.shape[0],
        "states (heads and their dims)": recurrence.state,
        "dtype": str(v.dtype),
        "return_state": return_state,
        "gradients (recorded or not)": requires_gradient(*inputs),
    }
    plan.agreement.on("the calls", values)

    def place(piece: Piece) -> int:
        return piece.start - plan.layout.bounds[piece.sequence]

    def state_of(piece: Piece, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        return recurrence.state_of(_at(tensors, tokens), place(piece), wanted)

    size = (v.shape[0], *recurrence.state)
    like = v.new_empty(0, dtype=torch.promote_types(v.dtype, torch.float32))
    states, transitions = left_behind(plan, state_of, size, recurrence.transition, like)
    passage = Passage(plan)
    used = [bool(plan.fragments)] * len(inputs)
    token = Begin.apply(passage, states, transitions, used, *inputs)  # type: ignore[no-untyped-call]
    entries = End.apply(passage, token, transitions)  # type: ignore[no-untyped-call]
    outs, rows, ended = [], [], []
    for stretch in stretches(plan):
        first = stretch.tokens.start - stretch.pieces[0].start
        for piece in stretch.pieces:
            state = None if stretch.entry is None else entries[stretch.entry]
            own = _at(tensors, slice(first + piece.start, first + piece.stop))
            out, end = recurrence.run(own, place(piece), state)
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
