"""What the model costs on devices: decoding over the batch, and the training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from powerplan.answers.decode import DecodeAnswer
from powerplan.answers.train import TrainAnswer
from powerplan.hardware import several
from powerplan.report.parts import show_bytes
from powerplan.report.tables import Column, grouped
from powerplan.report.train import MEMORY, TIME, layout_text, run_costs
from powerplan.run.layouts import Layout
from powerplan.serving import Serving, Step
from powerplan.units import (
    format_bytes,
    format_count,
    format_duration,
    format_figure,
    format_items,
    format_parameters,
)
from powerplan.webpage.asked import Asked
from powerplan.webpage.charts import Axis, curves_chart
from powerplan.webpage.content import (
    AS_IT_IS,
    CANDIDATES,
    HUES,
    Bar,
    Chart,
    Curve,
    Figure,
    Key,
    Mark,
    Part,
    Point,
    Table,
    table_from,
)

NAMES = ("as it is", "recommended")
COLOURS = (AS_IT_IS, CANDIDATES[0])
"""Of the model as it is and of the recommended one, as the charts over the context have them where it is the first."""

BATCHES: Axis = ("sequences decoded together", "count")

TABLE_BATCHES = (1, 8, 64)


def decode_curves(answer: DecodeAnswer, value: Callable[[Step], float], show: Callable[[Step], str]) -> list[Curve]:
    """Return a figure of a decoding step over the batch, for each model."""
    curves = []
    for number, model in enumerate(answer.models):
        steps = [model.servings[0].step(batch) for batch in answer.batches]
        points = tuple(Point(step.batch, value(step), show(step)) for step in steps)
        curves.append(Curve(f"c{number}", NAMES[number], COLOURS[number], points))
    return curves


def decode_charts(asked: Asked) -> list[Chart]:
    """Return memory over the batch, and tokens per second with a device or bytes per token without one."""
    answer, fleet = asked.decode, asked.decode.fleet
    name = asked.wsfr.model.name
    memory = decode_curves(answer, lambda step: float(step.memory_bytes), lambda step: show_bytes(step.memory_bytes))
    limit = []
    if fleet is not None:
        limit = [Mark(fleet.memory, f"memory of {fleet.name}: {format_bytes(fleet.memory)}")]
    about = f"Memory for weights and state of {name} over the batch at {asked.context:,} tokens, both axes logarithmic"
    spec = curves_chart(about, memory, BATCHES, ("weights and state", "bytes"), limit, height=280)
    charts = [Chart("chart-memory", "Memory over batch", spec, _steps_table(asked))]
    if fleet is None:
        moved = decode_curves(
            answer,
            lambda step: float(step.moved_bytes / step.batch),
            lambda step: show_bytes(step.moved_bytes / step.batch),
        )
        about = f"Bytes that {name} moves per decoded token over the batch at {asked.context:,} tokens"
        spec = curves_chart(about, moved, BATCHES, ("bytes moved per token", "bytes"), height=280)
        charts.append(Chart("chart-rate", "Bytes per decoded token over batch", spec, _steps_table(asked)))
    else:
        rates = decode_curves(answer, lambda step: float(step.tokens_per_s or 0), _rate)
        about = f"Tokens per second of {name} over the batch at {asked.context:,} tokens, a roofline"
        spec = curves_chart(about, rates, BATCHES, ("tokens per second, at most", "rate"), height=280)
        charts.append(Chart("chart-rate", "Tokens per second over batch, a roofline", spec, _steps_table(asked)))
    return charts


def _rate(step: Step) -> str:
    fits = "" if step.fits else " (does not fit)"
    return f"{format_count(step.tokens_per_s or 0)}{fits}"


def decode_keys(asked: Asked) -> list[Key]:
    """Return what the colours of these charts mean."""
    keys = [Key(colour, name) for name, colour in zip(NAMES, COLOURS, strict=True)]
    return keys[: len(asked.decode.models)]


def decode_figures(asked: Asked) -> list[Figure]:
    """Return what is true of each model at any batch: its state, the prompt, how many sequences fit."""
    found = []
    for name, model in zip(NAMES, asked.decode.models, strict=False):
        serving = model.servings[0]
        found.append(Figure(f"State per sequence, {name}", format_bytes(serving.row.state_bytes), _state(serving)))
        if serving.fleet is not None:
            most = serving.largest_batch
            seconds = format_duration(float(serving.prefill_seconds or 0))
            value = "any" if most is None else f"{most:,}"
            found.append(Figure(f"Largest batch, {name}", value, f"reading the prompt takes {seconds} or more"))
    return found


def _state(serving: Serving) -> str:
    sizes = {"cache": serving.cache_bytes, "recurrent state": serving.recurrent_bytes}
    return " + ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size) or "no state"


def _steps_table(asked: Asked) -> Table:
    """Return the steps of some batches, and of the largest one that fits."""
    answer = asked.decode
    rows = []
    for name, model in zip(NAMES, answer.models, strict=False):
        serving = model.servings[0]
        batches = {*TABLE_BATCHES, *([most] if (most := serving.largest_batch) and most <= answer.batches[-1] else [])}
        for step in map(serving.step, sorted(batches)):
            row = {"name": name, "batch": step.batch, "memory": step.memory_bytes, "fits": step.fits}
            row |= {"moved": step.moved_bytes / step.batch, "seconds": step.seconds, "rate": step.tokens_per_s}
            rows.append(row)
    columns = [
        Column("name", "model", left=True),
        Column("batch", "batch", grouped),
        Column("memory", "weights and state", show_bytes),
        Column("moved", "bytes per token", show_bytes),
    ]
    if answer.fleet is not None:
        columns += [
            Column("seconds", "time of a step", lambda value: format_duration(float(value))),
            Column("rate", "tokens per second", format_count),
            Column("fits", "fits", lambda value: "yes" if value else "no", left=True),
        ]
    return table_from(f"Decoding at {asked.context:,} tokens", columns, rows)


def training_figures(answer: TrainAnswer) -> list[Figure]:
    """Return what the run takes: whether it fits, hours, money, the step, the share of the peak."""
    plan, layout = answer.plan, answer.plan.layout
    capacity = plan.setting.capacity_bytes
    fits = "fits" if layout.fits else "does NOT fit"
    room = "per device" if capacity is None else f"of {format_figure(capacity / 1e9)} GB per device: {fits}"
    found = [
        Figure(
            "Memory at the peak",
            f"{format_figure(layout.memory.peak / 1e9)} GB",
            f"{room}; the peak is in {layout.memory.place}",
        )
    ]
    if plan.fits:
        hours = f"{plan.gpu_hours:,.0f}" if plan.gpu_hours >= 1000 else format_figure(plan.gpu_hours)
        found.append(Figure("Time", format_duration(plan.seconds), f"{hours} device hours"))
        if plan.cost is not None:
            found.append(Figure("Cost", f"{plan.cost:,.0f}", f"at {float(plan.price or 0):,.2f} an hour of a device"))
    rate = f"{format_parameters(round(layout.tokens_per_s))} tokens/s"
    found.append(Figure("Time of a step", format_duration(layout.step_s), f"{rate} on all devices"))
    found.append(Figure("MFU", f"{layout.mfu:.0%}", "of the dense peak, in the model's own FLOPs"))
    return found


def training_words(answer: TrainAnswer) -> list[str]:
    """Return the run and its layout in sentences."""
    plan, layout = answer.plan, answer.plan.layout
    (phase,) = plan.phases
    share = plan.setting.efficiency
    place = several(plan.setting.cluster.devices, plan.setting.peak.name)
    costs = f": {run_costs(plan)}" if plan.fits else ""
    return [
        f"{format_parameters(plan.tokens)} tokens at {layout.context:,} on {place}{costs}.",
        f"{format_items(phase.steps, 'step')} of {layout.sequences:,} sequences, "
        f"{format_parameters(layout.batch_tokens)} tokens.",
        f"Layout: {layout_text(layout)}; the best of {phase.tried:,}.",
        (
            f"Assumed: {share.weights:.0%} of the peak in matmuls with weights, {share.attention:.0%} in attention, "
            f"{share.recurrent:.0%} in recurrent state."
            if share.measured_s is None
            else f"Mixers as measured; matmuls with weights at {share.weights:.0%} of the peak."
        ),
    ]


def memory_bar(layout: Layout) -> Bar:
    """Return the memory of one device at the peak by part, with its capacity as a line."""
    capacity, memory = layout.setting.capacity_bytes, layout.memory
    longest = max(memory.peak, capacity or 0)
    amounts = [(name, getattr(memory, key)) for key, name in MEMORY.items()]
    limit = None if capacity is None else (capacity / longest, f"{format_figure(capacity / 1e9)} GB")
    parts = _parts([(name, size / longest, f"{size / 1e9:,.2f} GB") for name, size in amounts if size >= 5e6])
    return Bar("Memory of one device at the peak", f"{memory.peak / 1e9:,.2f} GB", parts, limit)


def step_bar(layout: Layout) -> Bar:
    """Return the time of an optimizer step by part."""
    amounts = [(name, getattr(layout.step, key)) for key, name in TIME.items()]
    amounts += [(f"exposed: {name}", seconds) for name, seconds in layout.step.traffic]
    whole = layout.step_s
    taken = [(name, seconds / whole, format_duration(seconds)) for name, seconds in amounts if seconds >= whole / 1000]
    return Bar("Time of an optimizer step", format_duration(whole), _parts(taken))


def _parts(amounts: Sequence[tuple[str, float, str]]) -> tuple[Part, ...]:
    return tuple(
        Part(name, share, text, f"var(--m{number % HUES})") for number, (name, share, text) in enumerate(amounts)
    )


def others_table(answer: TrainAnswer) -> Table | None:
    """Return the same run with other mixers; None where there are none."""
    own = answer.plan
    if not answer.others:
        return None
    plans = [("as it is", own), *((other.name, other.plan) for other in answer.others)]
    priced = own.price is not None
    rows = []
    for name, plan in plans:
        layout = plan.layout
        row = [name, f"{layout.memory.peak / 1e9:,.1f} GB", format_duration(layout.step_s), f"{plan.gpu_hours:,.0f}"]
        rows.append((*row, *([f"{plan.cost:,.0f}"] if priced else []), f"{own.seconds / plan.seconds:.2f}x"))
    head = ("the same tokens with", "memory at the peak", "time of a step", "device hours")
    return Table(
        caption="The same run with other mixers",
        head=(*head, *(["cost"] if priced else []), "speed against as it is"),
        rows=tuple(rows),
        left=(True, *[False] * (len(rows[0]) - 1)),
    )
