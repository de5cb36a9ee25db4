"""What a run costs by count: its FLOPs, and the least bytes that it moves."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import msgspec

from powerplan.dtypes import DTYPE_BYTES
from powerplan.mixers import Convention
from powerplan.mixers.base import RECURRENT_BYTES
from powerplan.mixers.formulas import total
from powerplan.profile.workload import Point, TimedMixer, Workload


def run_costs(workload: Workload, timed: TimedMixer, point: Point, executed: bool) -> tuple[Fraction, Fraction]:
    """Return the FLOPs and the least bytes of one run, of all sequences together; every pass reads the weights once.
    State FLOPs are counted as the implementation executes them (in chunks), or as `recommend` counts them."""
    hidden, width = workload.spec.hidden_size, DTYPE_BYTES[workload.dtype]
    tokens = workload.batch * point.tokens
    flops, moved = Fraction(0), Fraction(0)
    if point.part in ("state", "layer"):
        flops += state_flops(timed, point, executed) * workload.batch
        moved += _state_bytes(timed, point, width) * workload.batch
    weights, weights_read = 0, 0
    if point.part in ("projections", "layer"):
        weights = weights_read = int(total(timed.mixer.matmul_terms(hidden)))
    if point.part in ("ffn", "layer"):
        weights += workload.ffn_weights(1)
        weights_read += workload.ffn_weights(tokens)
    if weights:
        flops += 2 * weights * tokens * point.forward_passes
        moved += (weights_read + 2 * tokens * hidden) * width * point.forward_passes
    return flops, moved


def state_flops(timed: TimedMixer, point: Point, executed: bool) -> Fraction:
    """Return the state FLOPs of one sequence, as the implementation executes them or as `recommend` counts them."""
    mixer, context, chunk = timed.mixer, point.context, timed.chunk_size
    if point.decodes:
        return Fraction(total(mixer.decode_flops_terms(context)))
    if executed and timed.is_recurrent:
        # The state after the last chunk is computed, in forward passes and in those of a training step alike.
        terms = mixer.state_flops_terms(context, Convention(form="chunked"))
        return Fraction(total(terms)) * context * point.forward_passes
    if not executed or chunk is None:
        return Fraction(total(mixer.state_flops_terms(context, Convention()))) * context * point.forward_passes
    chunked = msgspec.structs.replace(mixer, chunk_size=chunk)
    terms = chunked.state_flops_terms(context, Convention(form="chunked"))
    # Counted is the update of the state by every token. Nobody reads the state after the last (or only) chunk here, so
    # the implementation does not compute it.
    (update,) = [term.value for term in terms if term.component.endswith("update state")]
    unread = update * (context % chunk or chunk)
    return (Fraction(total(terms)) * context - unread) * point.forward_passes


def _state_bytes(timed: TimedMixer, point: Point, width: Fraction) -> Fraction:
    """Return the least bytes that a run over one sequence moves: heads in and out in every pass, and the state."""
    size, shape = timed.mixer.state_size(point.context), timed.shape
    if point.decodes:
        # Short convolutions are counted with the weights, and so are not timed with the state.
        return replace(size, recent=0).decode_bytes(width, RECURRENT_BYTES)
    heads = (shape.heads + shape.kv_heads) * (shape.head_dim + shape.v_head_dim)
    recurrent = RECURRENT_BYTES * size.recurrent
    return point.forward_passes * (point.context * heads * width + recurrent)
