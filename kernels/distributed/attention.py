"""Power attention over sequences that lie on several ranks.

Each rank computes the states that its fragments leave behind, hands them on, and attends to its own tokens from the
states that came in. Backward, the gradients of these states are handed back the same way (passage.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from powerplan.dims import spow_dim
from powerplan.kernels import api, checks
from powerplan.kernels.distributed.arguments import check_call, check_derivatives, check_queries
from powerplan.kernels.distributed.layout import Piece
from powerplan.kernels.distributed.passage import Begin, End, Join, Passage
from powerplan.kernels.distributed.plan import ContextParallel
from powerplan.kernels.distributed.stretches import at, joined_finals, joined_outputs, left_behind, stretches
from powerplan.kernels.staged import joined_state
from powerplan.kernels.state import PowerState


@dataclass(frozen=True)
class Started:
    """An exchange that `ContextParallel.start` has started, and the arguments that it belongs to."""

    plan: ContextParallel
    passage: Passage
    token: Tensor
    decays: Tensor | None
    arguments: dict[str, Any]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def start(
    plan: ContextParallel,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    p: int,
    chunk_size: int | None,
    normalize: bool,
    initial_state: PowerState | None,
    impl: str,
) -> Started:
    """Do what `ContextParallel.start` says."""
    check_derivatives(k, v, log_g, *(initial_state or ()))
    with plan.agreement.of_errors("the calls"):
        check_call(plan, k, v, log_g, p, chunk_size, normalize, initial_state, impl)
    initial: tuple[Tensor | None, ...] = ()
    if initial_state is not None:
        initial = tuple(initial_state) if normalize else (initial_state.kv,)
    values = {
        "mixers": "power attention",
        "rows": k.shape[0],
        "key/value heads": k.shape[2],
        "head dims": (k.shape[3], v.shape[3]),
        "dtype": str(k.dtype),
        "p": p,
        "normalize": normalize,
        "log_g (given or not)": log_g is not None,
        "initial_state (given or not)": initial_state is not None,
        "gradients (recorded or not)": api.requires_gradient(k, v, log_g, *initial),
    }
    plan.agreement.on("the calls", values)
    settings: dict[str, Any] = {"p": p, "chunk_size": chunk_size, "normalize": normalize, "impl": impl}
    joined = None if initial_state is None else _joined(initial_state, normalize)
    states, decays = _left_behind(plan, k, v, log_g, joined, settings)
    passage = Passage(plan)
    # A rank that has nothing to send must still be found by the backward pass of those that have.
    anchors, used = (k, v, log_g, *initial), [bool(plan.fragments)] * 3 + [False] * len(initial)
    token = Begin.apply(passage, states, decays, used, *anchors)  # type: ignore[no-untyped-call]
    arguments = {"k": k, "v": v, "log_g": log_g, "p": p, "normalize": normalize, "initial_state": initial_state}
    return Started(plan, passage, token, decays, arguments)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    cp: ContextParallel | Started,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    p: int,
    scale: float | None,
    chunk_size: int | None,
    normalize: bool,
    initial_state: PowerState | None,
    return_state: bool,
    impl: str,
) -> Tensor | tuple[Tensor, PowerState]:
    """Return what `power_attention` does for the tokens of this rank; see there."""
    check_derivatives(q)
    if isinstance(cp, Started):
        given = {"k": k, "v": v, "log_g": log_g, "p": p, "normalize": normalize, "initial_state": initial_state}
        for name, value in given.items():
            if value is not cp.arguments[name]:
                raise ValueError(f"cp was started with another {name} than that of this call: give it the same")
        if cp.passage.forward is None:
            raise ValueError("cp was used before: start an exchange for each call")
        started = cp
    elif isinstance(cp, ContextParallel):
        started = start(cp, k, v, log_g, p, chunk_size, normalize, initial_state, impl)
    else:
        raise TypeError(f"cp must be a ContextParallel, or what its start returned, and is {type(cp).__name__}")
    plan = started.plan
    with plan.agreement.of_errors("the queries"):
        check_queries(plan, q, k, v, p, scale, normalize)
        checks.check_flag("return_state", return_state)
    recorded = api.requires_gradient(q)
    plan.agreement.on("the queries", {"return_state": return_state, "gradients (recorded or not)": recorded})
    entries = End.apply(started.passage, started.token, started.decays)  # type: ignore[no-untyped-call]
    settings = {"p": p, "scale": scale, "chunk_size": chunk_size, "normalize": normalize, "impl": impl}
    out, finals = _attend_here(plan, (q, k, v, log_g), entries, initial_state, return_state, settings)
    out, finals = Join.apply(plan, out, entries, finals)  # type: ignore[no-untyped-call]
    return (out, _state(finals, normalize)) if return_state else out


def _left_behind(
    plan: ContextParallel,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    initial: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Return the states that this rank has for later fragments, and with gates the decays over all its fragments."""

    def state_of(piece: Piece, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        gates = None if log_g is None else at(log_g, tokens)
        state, decay = joined_state(at(k, tokens), at(v, tokens), gates, cu_seqlens=None, **settings)
        decay = decay[..., None, None]
        if piece.begins and initial is not None:
            state = torch.addcmul(state, decay, _rows(plan, initial, piece.sequence, 1))
        return state, decay if wanted else None

    size = (k.shape[0], k.shape[2], spow_dim(int(k.shape[3]), settings["p"]), v.shape[3] + int(settings["normalize"]))
    like = k.new_empty(0, dtype=torch.promote_types(k.dtype, torch.float32))
    return left_behind(plan, state_of, size, None if log_g is None else (1, 1), like)


def _attend_here(
    plan: ContextParallel,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    entries: Tensor,
    initial_state: PowerState | None,
    return_state: bool,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Return the output of this rank's tokens, and where it is wanted the final states [N, G, D, W], 0 for those of
    other ranks.

    A stretch of several pieces is one call. One call for a whole fragment, with a state for each piece, would need
    memory for as many states.
    """
    q, _, v, _ = tensors
    normalize = settings["normalize"]
    outs, rows, ended = [], [], []
    for stretch in stretches(plan):
        pieces = stretch.pieces
        if stretch.entry is not None:
            state: PowerState | None = _state(entries[stretch.entry], normalize)
        else:
            state = _of_sequences(plan, initial_state, pieces[0].sequence, len(pieces))
        own: Any = [None if x is None else at(x, stretch.tokens) for x in tensors]
        ends = [piece.stop - pieces[0].start for piece in pieces]
        packing = torch.tensor([0, *ends], device=q.device) if len(ends) > 1 else None
        wanted = return_state and any(piece.ends for piece in pieces)
        made: Any = api.power_attention(*own, initial_state=state, return_state=wanted, cu_seqlens=packing, **settings)
        if wanted:
            made, end = made
            joined = _joined(end, normalize)
            last = len(pieces) if pieces[-1].ends else len(pieces) - 1
            rows.append(joined if len(pieces) == 1 else joined[:last])
            ended += [piece.sequence for piece in pieces[:last]]
        outs.append(made)
    out = joined_outputs(outs, tensors, (*q.shape[:3], v.shape[3]), v)
    return out, joined_finals(plan, q.shape[0], entries, rows, ended) if return_state else None


def _rows(plan: ContextParallel, states: Tensor, sequence: int, count: int) -> Tensor:
    """Return the states [., G, D, ...] of `count` sequences: rows of them where sequences are packed, else all."""
    return states[sequence : sequence + count] if plan.packed else states


def _of_sequences(plan: ContextParallel, state: PowerState | None, sequence: int, count: int) -> PowerState | None:
    if state is None:
        return None
    key = None if state.key is None else _rows(plan, state.key, sequence, count)
    return PowerState(_rows(plan, state.kv, sequence, count), key)


def _joined(state: PowerState, normalize: bool) -> Tensor:
    """Return a state in one tensor, [N, G, D, W]: its normaliser is the last column."""
    if not normalize or state.key is None:
        return state.kv
    return torch.cat((state.kv, state.key[..., None]), -1)


def _state(joined: Tensor, normalize: bool) -> PowerState:
    return PowerState(joined[..., :-1], joined[..., -1]) if normalize else PowerState(joined)
