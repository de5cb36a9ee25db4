"""The tokens of a rank in the stretches that one call takes, and what they hand over and get.

What is computed over a stretch is the caller's: power attention (attention.py) or another recurrence (recurrence.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from powerplan.kernels.distributed.layout import Piece
from powerplan.kernels.distributed.plan import ContextParallel


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one rank.

    Attributes:
        pieces: Their parts by sequence: one that goes on from another rank, or all of a fragment that begin in it.
        tokens: Which of the rank's tokens they are.
        entry: The place of the state before them among those that the rank gets; None where their sequences begin.
    """

    pieces: tuple[Piece, ...]
    tokens: slice
    entry: int | None


def stretches(plan: ContextParallel) -> list[Stretch]:
    """Return this rank's tokens, in its own order: at most two stretches a fragment."""
    found = []
    place = 0
    for fragment in plan.fragments:
        pieces = fragment.pieces
        if fragment.before:
            found.append(Stretch(pieces[:1], fragment.local(pieces[0]), place))
            place += 1
            pieces = pieces[1:]
        if pieces:
            tokens = slice(fragment.local(pieces[0]).start, fragment.local(pieces[-1]).stop)
            found.append(Stretch(pieces, tokens, None))
    return found


def left_behind(
    plan: ContextParallel,
    state_of: Callable[[Piece, slice, bool], tuple[Tensor, Tensor | None]],
    size: Sequence[int],
    transition: Sequence[int] | None,
    like: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return the states that this rank has for later fragments, and the transitions over all its fragments.

    A state is that after the last piece of its fragment, as if nothing stood before the fragment.

    Args:
        plan: The plan.
        state_of: Takes a piece, its tokens on this rank, and whether its transition is wanted. Returns the state after
            it, and its transition where that is wanted.
        size: Of a state, [B, G, D, W].
        transition: Size of the transition of a head, [1, 1], [D, 1] or [D, D]; None where all are 1.
        like: Has the device and the dtype of the states.

    Returns:
        [senders, B, G, D, W], and [fragments, B, G, ...]: 0 where nothing before a fragment goes on after it.
    """
    states, transitions = [], []
    for fragment in plan.fragments:
        own = None
        if fragment.after:
            last = fragment.pieces[-1]
            wanted = transition is not None and fragment.passes_through
            state, own = state_of(last, fragment.local(last), wanted)
            states.append(state)
        if transition is not None:
            transitions.append(like.new_zeros(*size[:2], *transition) if own is None else own)
    stacked = torch.stack(states) if states else like.new_empty(0, *size)
    if transition is None:
        return stacked, None
    return stacked, torch.stack(transitions) if transitions else like.new_empty(0, *size[:2], *transition)


def joined_outputs(outs: list[Tensor], inputs: Sequence[Tensor | None], size: Sequence[int], like: Tensor) -> Tensor:
    """Return the outputs of all stretches, along dim 1; without any, none of `size` with a graph to the inputs."""
    if outs:
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    return like.new_empty(size) + torch.stack([x.sum().to(like.dtype) for x in inputs if x is not None]).sum()


def joined_finals(plan: ContextParallel, batch: int, entries: Tensor, rows: list[Tensor], ended: list[int]) -> Tensor:
    """Return the final states of all sequences, [N, G, D, W], 0 for those that end on other ranks.

    Args:
        plan: The plan.
        batch: B, rows of the batch.
        entries: The states that came in, [receivers, B, G, D, W].
        rows: The states after the sequences that end here, each [., G, D, W].
        ended: Which sequences these are.
    """
    count = plan.layout.sequences if plan.packed else batch
    finals = entries.new_zeros(count, *entries.shape[2:])
    if not rows:
        return finals
    found = torch.cat(rows)
    return finals.index_copy(0, torch.tensor(ended, device=found.device), found) if plan.packed else found


def at(x: Tensor, tokens: slice) -> Tensor:
    """Return these tokens of x [B, T, ...], or x itself where they are all."""
    return x if tokens == slice(0, x.shape[1]) else x[:, tokens]
