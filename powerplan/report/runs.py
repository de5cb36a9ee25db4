"""The training runs of candidates of a recommendation: whether they fit, hours, money."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from powerplan.hardware import several
from powerplan.report.tables import Column
from powerplan.report.train import run_costs
from powerplan.report.width import wrapped
from powerplan.run.plan import TrainingPlan
from powerplan.search import Recommendation
from powerplan.search.runs import TRIES
from powerplan.units import format_count, format_figure, format_parameters


def run_lines(answer: Recommendation) -> list[str]:
    """Return the training run of the recommended candidate; nothing where there is none."""
    run = answer.recommended.run
    if run is None:
        return []
    layout, capacity = run.layout, run.setting.capacity_bytes
    devices = several(run.setting.cluster.devices, run.setting.peak.name)
    place = f"{format_parameters(run.tokens)} tokens on {devices}"
    if capacity is None:
        return wrapped(f"{place}: {run_costs(run)}", "training: ")
    peak = f"{format_figure(layout.memory.peak / 1e9)} of {format_figure(capacity / 1e9)} GB at the peak"
    split = f"{layout.degrees.describe()}, recompute {layout.recipe.recompute}"
    if not run.fits:
        return wrapped(f"{place}: does NOT fit, {peak} ({split})", "training: ")
    return wrapped(f"{place}: fits, {peak} ({split}); {run_costs(run)}", "training: ")


def run_entry(answer: Recommendation) -> dict[str, Any]:
    """Return what JSON says of all the training runs; nothing where none was planned."""
    runs = answer.runs
    if runs is None:
        return {}
    setting, limits = runs.setting, answer.request.limits
    return {
        "training": {
            "device": setting.peak.name,
            "devices": setting.cluster.devices,
            "batch_tokens": setting.batch.tokens,
            "efficiency": asdict(setting.efficiency),
            "price": None if limits.price is None else float(limits.price),
            "planned": runs.planned,
        }
    }


def candidate_entry(run: TrainingPlan) -> dict[str, Any]:
    """Return what JSON says of a candidate's run: hours, days and cost are null where it does not fit."""
    layout = run.layout
    return {
        "fits": run.fits,
        "gpu_hours": run.gpu_hours if run.fits else None,
        "days": run.days if run.fits else None,
        "cost": run.cost if run.fits else None,
        "training_tokens": run.tokens,
        "mfu": layout.mfu if run.fits else None,
        "memory_peak_bytes": round(layout.memory.peak),
        "parallel": asdict(layout.degrees),
        "recompute": layout.recipe.recompute,
    }


def run_columns(answer: Recommendation) -> list[Column]:
    """Return the columns of hours and money, where training was planned."""
    if answer.runs is None:
        return []
    columns = [Column("gpu_hours", "hours", _show_hours)]
    if answer.request.limits.price is not None:
        columns.append(Column("cost", "cost", lambda cost: "-" if cost is None else _show(cost)))
    return columns


def _show_hours(hours: float | None) -> str:
    return "no fit" if hours is None else _show(hours)


def _show(amount: float) -> str:
    """Show hours or money: 41.2, 13,056, 274.1k."""
    if amount >= 100_000:
        return format_count(round(amount))
    return f"{amount:,.0f}" if amount >= 1000 else format_figure(amount)


def run_remarks(answer: Recommendation) -> list[str]:
    """Return what the hours mean and what they assume."""
    runs = answer.runs
    if runs is None:
        return []
    limits, devices, share = answer.request.limits, runs.setting.cluster.devices, runs.setting.efficiency
    tokens = "the tokens" if limits.tokens is not None else "20 tokens per active parameter as it is"
    if limits.tokens is None and limits.flops is not None:
        tokens = "the tokens that the FLOPs buy"
    whose = "one device" if devices == 1 else f"one device, over all {devices:,}"
    assumed = ", not as measured" if answer.request.profile else ""
    return wrapped(
        f"hours: of {whose}, to train on {tokens} in batches of about "
        f"{format_parameters(runs.setting.batch.tokens)}, at {share.weights:.0%} of the peak in matmuls with weights, "
        f"{share.attention:.0%} in attention, {share.recurrent:.0%} in recurrent state{assumed}. powerplan train has "
        "more."
    )


def run_notes(answer: Recommendation) -> list[str]:
    """Return for how many candidates training was planned, where limits on it decide."""
    runs = answer.runs
    if runs is None or not answer.request.limits.on_training or answer.request.keep != "weights":
        return []
    return wrapped(
        f"Training was planned for {runs.planned:,} of {answer.searched:,} candidates: in order, up to {TRIES} of "
        f"a sort, until {answer.request.top} sorts had one within the limits."
    )
