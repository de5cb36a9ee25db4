"""From times to rows: FLOPs and bytes of a run, rates, predictions, and the split of a layer's time."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from powerplan.accounting import DTYPE_BYTES
from powerplan.mixers import Attention
from powerplan.mixers.base import total
from powerplan.profile.plan import Contender, Plan
from powerplan.profile.result import PASSES, Measurement, Split
from powerplan.profile.timing import Spread

if TYPE_CHECKING:
    from powerplan.profile.machine import Machine
    from powerplan.profile.runs import Place


def run_costs(plan: Plan, contender: Contender, place: Place, executed: bool) -> tuple[Fraction, Fraction]:
    """Return the FLOPs and the least bytes of one run at `place`, all sequences together.

    executed: FLOPs as the implementation does them (chunks), else as `recommend` counts them. Weights move once a pass.
    """
    part, kind, tokens = place
    hidden, width, factor = plan.spec.hidden_size, DTYPE_BYTES[plan.dtype], 3 if kind == "train" else 1
    run = 1 if kind == "decode" else tokens
    flops, moved = Fraction(0), Fraction(0)
    if part in ("state", "layer"):
        flops += contender.state_flops(kind, tokens, executed) * plan.batch
        moved += contender.bytes_moved(kind, tokens, plan.dtype) * plan.batch
    per_token, read = 0, 0
    if part in ("projections", "layer"):
        read = int(total(contender.mixer.matmul_terms(hidden)))
        per_token = 2 * read
    if part in ("ffn", "layer"):
        per_token += plan.ffn_flops()
        read += plan.ffn_weights(plan.batch * run)
    if per_token:
        flops += per_token * plan.batch * run * factor
        moved += (read + 2 * plan.batch * run * hidden) * width * factor
    return flops, moved


def measurement(
    plan: Plan, machine: Machine, contender: Contender, place: Place, found: Spread, peak: int | None
) -> Measurement:
    """Return the row of one timing."""
    part, kind, tokens = place
    flops, _ = run_costs(plan, contender, place, executed=True)
    predicted = machine.roofline(*run_costs(plan, contender, place, executed=False))
    mixer = contender.mixer
    state = part in ("state", "layer")
    return Measurement(
        name=contender.name,
        impl="torch" if part in ("projections", "ffn") else contender.impl,
        direction=PASSES[kind],
        context=tokens,
        mixer=contender.text,
        heads=mixer.heads,
        kv_heads=mixer.kv_heads,
        head_dim=mixer.head_dim,
        p=getattr(mixer, "degree", None),
        window=mixer.window if isinstance(mixer, Attention) else None,
        chunk_size=contender.chunk_size if state else None,
        gated=getattr(mixer, "gated", False),
        batch=plan.batch,
        dtype=plan.dtype,
        part=part,
        ms_p20=found.p20 * 1000,
        ms_p50=found.median * 1000,
        ms_p80=found.p80 * 1000,
        repeats=found.repeats,
        tokens_per_s=plan.batch * (1 if kind == "decode" else tokens) / found.median,
        flops=float(flops),
        tflops=float(flops) / found.median / 1e12,
        share_of_matmul=float(flops) / found.median / machine.matmul_flops_per_s,
        predicted_ms=predicted * 1000,
        peak_bytes=peak,
    )


def splits(plan: Plan, rows: Sequence[Measurement]) -> list[Split]:
    """Return weight part against state part for every context at which a contender's state part was measured."""
    found = []
    for state in rows:
        contender = next((item for item in plan.contenders if item.name == state.name), None)
        if state.part != "state" or contender is None:
            continue
        kind = next(kind for kind, name in PASSES.items() if name == state.direction)
        alike = {item.name for item in plan.contenders if item.projection_key == contender.projection_key}
        projections = next(
            (row for row in rows if _is(row, "projections", state.direction) and row.name in alike), None
        )
        ffn = next((row for row in rows if _is(row, "ffn", state.direction)), None)
        if projections is None or (plan.ffn is not None and ffn is None):
            continue
        layer = next(
            (
                row
                for row in rows
                if _is(row, "layer", state.direction) and (row.name, row.context) == (state.name, state.context)
            ),
            None,
        )
        times = [row.seconds_per_token * state.tokens * 1000 for row in (projections, ffn) if row is not None]
        per_token = contender.weight_flops(plan.spec.hidden_size) + plan.ffn_flops()
        weight = per_token * state.tokens * (3 if kind == "train" else 1)
        found.append(
            Split(
                name=state.name,
                direction=state.direction,
                context=state.context,
                projections_ms=times[0],
                ffn_ms=times[1] if ffn is not None else None,
                state_ms=state.ms_p50,
                wsfr_time=sum(times) / state.ms_p50,
                wsfr_flops=float(weight / (contender.state_flops(kind, state.context, False) * plan.batch)),
                layer_ms=None if layer is None else layer.ms_p50,
            )
        )
    return found


def _is(row: Measurement, part: str, direction: str) -> bool:
    return (row.part, row.direction) == (part, direction)
