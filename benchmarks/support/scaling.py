"""What weak_scaling.py plans and draws: as many tokens on each of ever more devices that share a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from powerplan.accounting import Accounting
from powerplan.ffn import MLP
from powerplan.hardware import find_device, peak_of
from powerplan.load import catalogue_spec
from powerplan.mixers import Power
from powerplan.plots.figure import legend_below, panels, styled, titled
from powerplan.plots.lines import BLACK, COLOURS, Look, Series, draw, handles, log_axis
from powerplan.run.degrees import Degrees
from powerplan.run.efficiency import DEFAULT
from powerplan.run.layouts import Batch, Layout, Layouts, Setting
from powerplan.run.links import cluster_of
from powerplan.run.loads import model_load
from powerplan.run.memory import memory_of
from powerplan.run.passing import Passing, ways_of
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads
from powerplan.run.step import Efficiency, Rates, step_of
from powerplan.run.traffic import links_of
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.swap import with_mixer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEVICE = "h100-sxm"
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FEW = (1, 2, 3, 4)
"""Ranks for which the small model is measured and planned."""

LARGE_TOKENS = 32_768
"""Tokens of the large model on each device."""

LARGE = Recipe(recompute="full", loss="chunked")
SMALL = Recipe(dtype="fp32", kernels="torch")
EVEN = Efficiency(0.5, 0.5, 0.5)
"""One share of the peak for all work: the small model's times are only compared with each other."""


def small_model() -> ModelSpec:
    """Return a model of 2 layers of 256 with power attention of degree 2, whose step on 8,192 tokens takes seconds."""
    mixer = Power(heads=4, kv_heads=2, head_dim=64, p=2, gated=True)
    group = LayerGroup(repeat=2, mixer=mixer, ffn=MLP(intermediate_size=1024, gated=True))
    return ModelSpec(name="small", vocab_size=1024, hidden_size=256, tie_embeddings=False, layers=(group,))


@dataclass(frozen=True)
class Line:
    """A model on ever more devices. exchange: "gather" or "scan" of states, or None for the faster one.

    compute_only: whether its time leaves out what devices send each other.
    """

    name: str
    spec: ModelSpec
    tokens: int
    recipe: Recipe
    efficiency: Efficiency
    exchange: str | None = None
    compute_only: bool = False
    ranks: tuple[int, ...] = RANKS


def lines(small_tokens: int) -> tuple[Line, ...]:
    """Return the lines of the figure; small_tokens: of the small model on each rank."""
    attention = catalogue_spec("llama-3-8b")
    power = with_mixer(attention, "power:p=2,gated=true")[0]
    return (
        Line("power", power, LARGE_TOKENS, LARGE, DEFAULT),
        Line("power, gathered", power, LARGE_TOKENS, LARGE, DEFAULT, "gather"),
        Line("attention", attention, LARGE_TOKENS, LARGE, DEFAULT),
        Line("small", small_model(), small_tokens, SMALL, EVEN, "scan", True, FEW),
        Line("small, gathered", small_model(), small_tokens, SMALL, EVEN, "gather", True, FEW),
    )


def planned(small_tokens: int) -> list[dict[str, Any]]:
    """Return each line at each number of devices: seconds of a step, and the bytes that its tokens take of a device.

    Those are activations that are kept, working memory and what is received of others: weights, gradients and optimizer
    states are shared by all devices, and get less on each.
    """
    return [point(line, ranks) for line in lines(small_tokens) for ranks in line.ranks]


def point(line: Line, ranks: int) -> dict[str, Any]:
    """Return the plan of a line at one number of devices, all of which share one sequence."""
    device, degrees, context = find_device(DEVICE), Degrees(cp=ranks), ranks * line.tokens
    setting = Setting.of(cluster_of(device, ranks), peak_of(device), line.efficiency, Batch(context))
    accounting = Accounting(line.spec)
    layout = Layouts(accounting, context, setting).layout(degrees, line.recipe, 1)
    passings = _passings(layout, line.exchange)
    model = model_load(accounting, context, line.recipe)
    stages = stage_loads(model, 1)
    rates = Rates(setting.peak, line.efficiency, links_of(setting.cluster, degrees))
    step = step_of(model, stages, degrees, 1, rates, [passings])
    memory = memory_of(model, list(enumerate(stages)), degrees, 1, [passings])
    return {
        "line": line.name,
        "ranks": ranks,
        "exchange": ", ".join(dict.fromkeys(way.way for way in passings)) or None,
        "seconds": step.compute_s if line.compute_only else step.seconds - step.update_s,
        "exposed_exchange_s": dict(step.traffic)["sequence"],
        "tokens_bytes": memory.activations + memory.working,
        "sent_bytes_per_layer": sum(way.bytes_sent for way in passings),
    }


def _passings(layout: Layout, exchange: str | None) -> tuple[Passing, ...]:
    """Return how the layers of a plan share a sequence: as it has chosen, or by one way of passing states on."""
    if exchange is None or layout.split is None:
        return layout.step.passings
    return tuple(
        next(other for other in ways_of(way.exchange, layout.split) if other.way == exchange)
        for way in layout.step.passings
    )


POWER, GATHERED, SMALL_LINE, POINT = COLOURS[0], COLOURS[5], COLOURS[2], COLOURS[1]
LOOKS = {
    "attention": Look(BLACK, "-", "None", 2.6),
    "power": Look(POWER, "-", "None", 2.4),
    "power, gathered": Look(GATHERED, (0, (6, 2)), "None"),
    "small": Look(SMALL_LINE, "-", "None"),
    "small, gathered": Look(SMALL_LINE, (0, (2, 1.5)), "None"),
}
MARKERS = {"gather": "s", "scan": "o"}
HIGHEST = 8.0
"""Where the panel of times ends: softmax attention goes on beyond it."""


@styled
def scaling_figure(result: Mapping[str, Any]) -> Figure:
    """Return the figure of a result: time and memory of a rank over the ranks, over those of one; lines are planned."""
    from matplotlib.lines import Line2D

    figure, ((upper,), (lower,)) = panels([3.3, 2.9], share_x=True)
    keys = (("time", "seconds", "cpu_s"), ("memory", "tokens_bytes", "memory_bytes"))
    for axes, (name, planned_key, measured_key) in zip((upper, lower), keys, strict=True):
        draw(axes, [over_one(of_line(result, line), planned_key) for line in LOOKS], list(LOOKS.values()))
        for line in axes.lines:
            line.set_clip_on(True)
        for exchange in MARKERS:
            points = over_one([row for row in result["measured"] if row["exchange"] in (exchange, None)], measured_key)
            axes.plot(points.x, points.y, zorder=5, **_marker(exchange))
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(RANKS) / 1.1, max(RANKS) * 1.1)
        axes.set_xticks(RANKS, [f"{ranks:,}" for ranks in RANKS])
        axes.set_ylim(0.85, HIGHEST if axes is upper else None)
        log_axis(axes, lambda value: f"{value:.3g}", f"{name} of a rank, 1 rank = 1")
        axes.minorticks_off()
    lower.set_xlabel("ranks that share a sequence")
    attention = over_one(of_line(result, "attention"), "seconds").y[-1]
    power = over_one(of_line(result, "power"), "seconds").y[-1]
    total = max(RANKS) * LARGE_TOKENS / 1e6
    titled(
        figure,
        "One sequence over 1 to 1,024 ranks, as many tokens on each",
        f"Llama 3 8B is planned, with {LARGE_TOKENS:,} tokens on each H100: {total:.1f}M in all on 1,024. A model of "
        f"two layers of 256 is measured too, with {result['tokens']:,} tokens on each of 1 to 4 CPU processes: "
        "processor time of the slowest, planned as compute alone. Memory is that of tokens and of what others send: "
        "without weights, gradients and optimizer states.",
    )
    names = {
        "attention": f"8B, softmax attention: {attention:,.0f}x on 1,024",
        "power": f"8B, power attention: {power:.2f}x on 1,024",
        "power, gathered": "8B, power attention, always gathered",
        "small": "small model, scan: planned",
        "small, gathered": "small model, gather: planned",
    }
    shown: list[Any] = handles(list(LOOKS.values())) + [Line2D([], [], **_marker(way)) for way in MARKERS]
    legend_below(
        figure, shown, [*(names[name] for name in LOOKS), *(f"small model, {way}: measured" for way in MARKERS)]
    )
    return figure


def _marker(exchange: str) -> dict[str, Any]:
    marker, size = MARKERS[exchange], 7.5 if exchange == "gather" else 5
    return {"linestyle": "none", "marker": marker, "color": POINT, "markersize": size, "markerfacecolor": "white"}


def of_line(result: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the planned points of a line."""
    return [row for row in result["planned"] if row["line"] == name]


def over_one(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    """Return the points of a number over the ranks, as shares of that of one rank."""
    (one,) = (row[key] for row in rows if row["ranks"] == 1)
    return Series(tuple((float(row["ranks"]), row[key] / one) for row in rows))
