"""The report of `powerplan train`: does a run fit, how long is a step, what does the run cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from itertools import zip_longest
from typing import Any

from powerplan.hardware import several
from powerplan.report.colour import side_of
from powerplan.report.documents import lengths_entry
from powerplan.report.exchanges import exchange_entries, exchange_section
from powerplan.report.parts import json_float, model_entry, show_ratio
from powerplan.report.render import Report
from powerplan.report.tables import Column
from powerplan.report.train_documents import documents_sections, run_documents_entry
from powerplan.report.train_remarks import OtherRun, assumptions, hints, speed_lines
from powerplan.report.width import wrapped
from powerplan.run.layouts import Layout
from powerplan.run.plan import PhasePlan, TrainingPlan
from powerplan.run.recipe import Recipe
from powerplan.run.saved import saved_layer
from powerplan.units import format_duration, format_figure, format_items, format_parameters

SCHEMA = "powerplan.train/1"


MEANING = {
    "gathered layers": "gathered layers: whole weights and gradients of layers at work",
    "kept activations": "kept: from the forward to the backward pass",
    "working memory": "working: logits, or one layer's backward pass",
    "allowance": "allowance: libraries and fragmentation",
    "exposed": "exposed: communication that no compute hides",
}
"""What the parts of memory and time mean that do not say it."""

MEMORY = {
    "weights": "weights",
    "gathered": "gathered layers",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "kept activations",
    "working": "working memory",
    "allowance": "allowance",
}
"""The parts of memory by their fields, as the table names them."""

TIME = {
    "weights_s": "weights",
    "attention_s": "attention",
    "recurrent_s": "recurrent state",
    "head_s": "LM head and loss",
    "recompute_s": "computed again",
    "bubble_s": "pipeline bubble",
    "update_s": "optimizer",
    "waiting_s": "waiting for documents",
}
"""The parts of a step by their fields, as the table names them; exposed communication stands beside them."""


def train_report(plan: TrainingPlan, others: Sequence[OtherRun]) -> Report:
    """Return the report of a training run; others: the same run with other mixers, all of which fit."""
    stages = [_stage(phase, plan) for phase in plan.phases]
    main = max(stages, key=lambda stage: stage["seconds"])
    shared = ("parallel", "memory_bytes", "capacity_bytes", "step_s", "tokens_per_s", "mfu", "hfu", "recompute")
    payload: dict[str, Any] = {
        "model": model_entry(plan.accounting),
        "device": plan.setting.peak.name,
        "devices": plan.setting.cluster.devices,
        **{key: main[key] for key in shared},
        "fits": plan.fits if plan.setting.capacity_bytes is not None else None,
        "tokens": plan.tokens,
        **_totals(plan),
        "recipe": _recipe_entry(plan.phases[0].layout.recipe),
        **({} if plan.setting.lengths is None else {"lengths": lengths_entry(plan.setting.lengths)}),
        "efficiency": asdict(plan.setting.efficiency),
        "overlap": {
            "tensor": plan.setting.overlap.tensor,
            "experts": plan.setting.overlap.of_experts(plan.layout.degrees.schedule),
        },
        "stages": stages,
        "alternatives": [
            {"name": other.name, "mixer": other.mixer, "recommended": other.recommended, **_figures(other.plan, plan)}
            for other in others
        ],
    }
    rows = [row for number, phase in enumerate(plan.phases, 1) for row in _part_rows(phase.layout, number)]
    columns = [Column("stage", "stage"), Column("of", "of"), Column("part", "part"), Column("value", "value")]
    sections: list[Report] = []
    if len(plan.phases) > 1:
        costs = run_costs(plan) if plan.fits else "no hours, as not every stage fits"
        devices = several(plan.setting.cluster.devices, plan.setting.peak.name)
        place = f"{plan.accounting.spec.name} in {len(plan.phases)} stages on {devices}"
        sections.append(Report(SCHEMA, {}, [], [], title=wrapped(f"{place}: {costs}")))
    told: set[str] = set()
    for phase in plan.phases:
        sections.append(_phase_section(phase, plan, told))
        if shared_by := exchange_section(SCHEMA, phase.layout):
            sections.append(shared_by)
        sections += documents_sections(phase, plan)
    if others:
        sections.append(_others_section(plan, others, payload["alternatives"]))
    sections.append(Report(SCHEMA, {}, [], [], before=[*speed_lines(plan, others), *assumptions(plan)]))
    return Report(SCHEMA, payload, columns, rows, sections=sections)


def _totals(plan: TrainingPlan) -> dict[str, float | None]:
    """Return what a run takes in all; nothing of a run that does not fit."""
    totals = {"days": plan.days, "gpu_hours": plan.gpu_hours, "cost": plan.cost, "energy_kwh": plan.energy_kwh}
    return totals if plan.fits else dict.fromkeys(totals)


def _stage(phase: PhasePlan, plan: TrainingPlan) -> dict[str, Any]:
    layout = phase.layout
    memory, step = layout.memory, layout.step
    return {
        "tokens": phase.phase.tokens,
        "context": layout.context,
        "parallel": asdict(layout.degrees),
        "micro_batch": layout.recipe.micro_batch,
        "micro_batches": step.micro_batches,
        "recompute": layout.recipe.recompute,
        "batch_tokens": layout.batch_tokens,
        "steps": phase.steps,
        "memory_bytes": {key: round(getattr(memory, key)) for key in (*MEMORY, "peak")},
        "memory_peak_at": memory.place,
        "activations_by_layer": _activations(layout, plan),
        "pipeline_stage": memory.stage,
        "capacity_bytes": plan.setting.capacity_bytes,
        "fits": layout.fits if plan.setting.capacity_bytes is not None else None,
        "step_s": layout.step_s,
        "step_parts_s": {key.removesuffix("_s"): getattr(step, key) for key in TIME},
        "exposed_communication_s": dict(step.traffic),
        "sequence_exchange": exchange_entries(layout),
        "tokens_per_s": layout.tokens_per_s,
        "mfu": layout.mfu,
        "hfu": layout.hfu,
        "seconds": phase.seconds,
        **run_documents_entry(phase, plan),
        "layouts_tried": phase.tried,
        "other_layouts": [
            {"parallel": asdict(other.degrees), "recompute": other.recipe.recompute, "step_s": other.step_s}
            for other in phase.others[:5]
        ],
    }


def _activations(layout: Layout, plan: TrainingPlan) -> list[dict[str, Any]]:
    """Return what one layer of each kind keeps of a micro-batch, in bytes per device, by its parts."""
    recipe, degrees = layout.recipe, layout.degrees
    tokens = Fraction(recipe.micro_batch * layout.context, degrees.cp * degrees.tp)
    entries = []
    for use in plan.accounting.uses:
        saved = saved_layer(plan.accounting.spec, use.layer, layout.context, recipe)
        parts: dict[str, Fraction] = {}
        for part in saved.parts:
            parts[part.name] = parts.get(part.name, Fraction(0)) + part.bytes * tokens
        entries.append(
            {
                "layer": use.layer.describe(),
                "layers": use.count,
                "kept_bytes": round(saved.kept_bytes * tokens),
                "without_recompute_bytes": {name: round(size) for name, size in parts.items()},
                "estimate": any(part.is_estimate for part in saved.parts),
            }
        )
    return entries


def _kept_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return which parts of layers keep how much, and where that is an estimate."""
    sums: dict[str, int] = {}
    for entry in entries:
        for name, size in entry["without_recompute_bytes"].items():
            sums[name] = sums.get(name, 0) + size * entry["layers"]
    whole = sum(sums.values()) or 1
    shares = ", ".join(f"{name.replace('_', ' ')} {size / whole:.0%}" for name, size in sums.items())
    kept = sum(entry["kept_bytes"] * entry["layers"] for entry in entries) / whole
    again = f"; {kept:.0%} of them are kept, the rest is computed again" if kept < 1 else ""
    lines = wrapped(f"activations of a layer: {shares}{again}")
    guesses = [entry["layer"] for entry in entries if entry["estimate"]]
    return lines + (
        wrapped(f"estimates, as their kernels were not read: activations of {'; '.join(guesses)}") if guesses else []
    )


def _recipe_entry(recipe: Recipe) -> dict[str, Any]:
    return {
        "optimizer": recipe.optimizer,
        "dtype": recipe.dtype,
        "master": recipe.master,
        "loss": recipe.loss,
        "gradients_dtype": recipe.gradients_dtype,
        "moments_dtype": recipe.moments_dtype,
        "matmuls_dtype": recipe.matmuls_dtype,
    }


def _figures(own: TrainingPlan, plan: TrainingPlan) -> dict[str, Any]:
    """Return what JSON says of a run of one stage, beside that of `plan`."""
    layout = own.layout
    return {
        "wsfr": json_float(_ratio(own)),
        "parallel": asdict(layout.degrees),
        "recompute": layout.recipe.recompute,
        "memory_peak_bytes": round(layout.memory.peak),
        "fits": own.fits,
        "step_s": layout.step_s,
        "days": own.days,
        "gpu_hours": own.gpu_hours,
        "cost": own.cost,
        "times_as_fast": plan.seconds / own.seconds,
    }


def _ratio(plan: TrainingPlan) -> Fraction | None:
    """Return the weight-state FLOP ratio in a run's longest phase, over its documents where there are some."""
    phase = max(plan.phases, key=lambda phase: phase.seconds)
    return plan.accounting.wsfr(phase.layout.context) if phase.documents is None else phase.documents.row.wsfr


def _part_rows(layout: Layout, stage: int) -> list[dict[str, Any]]:
    """Return a row for each part of memory (bytes per device) and of a step (seconds)."""
    rows = [
        {"stage": stage, "of": "memory_bytes", "part": key, "value": round(getattr(layout.memory, key))}
        for key in (*MEMORY, "peak")
    ]
    rows += [{"stage": stage, "of": "step_s", "part": key, "value": getattr(layout.step, key)} for key in TIME]
    rows += [{"stage": stage, "of": "exposed_s", "part": name, "value": time} for name, time in layout.step.traffic]
    return rows


def _phase_section(phase: PhasePlan, plan: TrainingPlan, told: set[str]) -> Report:
    """Return memory and time of a stage. told: the parts whose meaning an earlier stage gave; this one's are added."""
    layout, devices = phase.layout, plan.setting.cluster.devices
    name, peak = plan.accounting.spec.name, layout.memory.peak / 1e9
    place = f"{name} at {layout.context:,} tokens on {several(devices, plan.setting.peak.name)}"
    if plan.setting.capacity_bytes is None:
        verdict = f"{format_figure(peak)} GB at the peak"
    else:
        capacity = format_figure(plan.setting.capacity_bytes / 1e9)
        word = "fits" if layout.fits else "does NOT fit"
        verdict = f"{word}, {format_figure(peak)} of {capacity} GB at the peak, in {layout.memory.place}"
    single = len(plan.phases) == 1
    costs = run_costs(plan) if single else format_duration(phase.seconds)
    if not layout.fits:
        costs = "no hours, as the run does not fit"
    batch = f"{layout.sequences:,} sequences, {format_parameters(layout.batch_tokens)} tokens"
    lines = wrapped(f"{format_parameters(phase.phase.tokens)} tokens: {costs}")
    lines += wrapped(
        f"{format_items(phase.steps, 'step')} of {batch}, {format_duration(layout.step_s)} each: "
        f"{format_parameters(round(layout.tokens_per_s))} tokens/s, MFU {layout.mfu:.0%}{_hfu(layout)}"
    )
    best = f"; the best of {phase.tried:,}" if phase.tried > 1 else ""
    lines += wrapped(f"layout: {layout_text(layout)}{best}")
    rows = _table(layout)
    named = {text.partition(":")[0] for row in rows for text in (row["memory"], row["time"])}
    meanings = "; ".join(meaning for part, meaning in MEANING.items() if part in named - told)
    told |= named
    columns = [
        Column("memory", "memory per device", left=True),
        Column("gb", "GB"),
        Column("time", "  time of a step", lambda text: f"  {text or ''}", left=True),
        Column("s", "s"),
    ]
    return Report(
        SCHEMA,
        {},
        columns,
        rows,
        title=wrapped(f"{place}: {verdict}"),
        before=lines,
        legend=wrapped(f"{meanings}.") if meanings else [""],
        after=[*_kept_lines(_activations(layout, plan)), *hints(layout)],
    )


def _hfu(layout: Layout) -> str:
    return f", HFU {layout.hfu:.0%}" if layout.recipe.recompute == "full" else ""


def layout_text(layout: Layout) -> str:
    """Return how a model is laid out on devices, in words."""
    recipe = layout.recipe
    rounds = layout.step.micro_batches
    batches = f"{rounds:,} micro-batch{'es' if rounds > 1 else ''} of {recipe.micro_batch:,}"
    return f"{layout.degrees.describe()}; {batches}; recompute {recipe.recompute}"


def run_costs(plan: TrainingPlan) -> str:
    """Return what a run takes in words: days, device hours, money, energy."""
    hours = f"{plan.gpu_hours:,.0f}" if plan.gpu_hours >= 1000 else format_figure(plan.gpu_hours)
    parts = [format_duration(plan.seconds), f"{hours} device hours"]
    if plan.cost is not None:
        parts.append(f"{plan.cost:,.0f} at {float(plan.price or 0):,.2f} an hour")
    if plan.energy_kwh is not None:
        size, unit = (1000, "MWh") if plan.energy_kwh >= 1000 else (1, "kWh")
        parts.append(f"at most {format_figure(plan.energy_kwh / size)} {unit} at the board power")
    return ", ".join(parts)


def _table(layout: Layout) -> list[dict[str, Any]]:
    """Return memory and time side by side; parts that are nothing are left out."""
    memory = [(name, getattr(layout.memory, key) / 1e9) for key, name in MEMORY.items()]
    times = [(name, getattr(layout.step, key)) for key, name in TIME.items()]
    times += [(f"exposed: {name}", seconds) for name, seconds in layout.step.traffic]
    held = [part for part in memory if part[1] >= 0.005] + [("peak", layout.memory.peak / 1e9)]
    taken = [part for part in times if part[1] >= layout.step_s / 1000] + [("step", layout.step_s)]
    return [
        {"memory": left[0], "gb": f"{left[1]:,.2f}" if left[0] else "", "time": right[0], "s": _seconds(right)}
        for left, right in zip_longest(held, taken, fillvalue=("", 0.0))
    ]


def _seconds(part: tuple[str, float]) -> str:
    return format_figure(part[1]) if part[0] else ""


def _others_section(plan: TrainingPlan, others: Sequence[OtherRun], entries: Sequence[dict[str, Any]]) -> Report:
    rows = [{"name": "as it is", **_figures(plan, plan)}, *entries]
    columns = [
        Column("name", "the same tokens with", left=True, fold=" + "),
        Column("wsfr", "WSFR", show_ratio, role=side_of),
        Column("memory_peak_bytes", "GB", lambda value: f"{value / 1e9:,.1f}"),
        Column("step_s", "step", format_duration),
        Column("gpu_hours", "hours", lambda value: f"{value:,.0f}"),
    ]
    if plan.price is not None:
        columns.append(Column("cost", "cost", lambda value: f"{value:,.0f}"))
    columns.append(Column("times_as_fast", "against\nas it is", lambda value: f"{value:.2f}x"))
    changes = [other for other in others if other.recommended and other.plan.seconds < plan.seconds]
    before = [line for other in changes for line in _change(plan, other)]
    return Report(SCHEMA, {}, columns, rows, before=before, strong=lambda row: row.get("recommended", False))


def _change(plan: TrainingPlan, other: OtherRun) -> list[str]:
    """Return what the mixers that `recommend` puts first would make of the run."""
    ratio = show_ratio(_ratio(other.plan))
    return wrapped(
        f"change: {other.name} trains the same tokens in {other.plan.gpu_hours:,.0f} device hours instead of "
        f"{plan.gpu_hours:,.0f}, at {ratio}; powerplan recommend says why and writes the model"
    )
