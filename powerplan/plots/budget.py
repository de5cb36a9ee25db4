"""The figures of `powerplan budget` for models: what a budget buys, by mixer or by model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powerplan.accounting import Accounting
from powerplan.curves import sampled_contexts
from powerplan.plots.figure import convention_text, cut, legend_below, name_of, panels, styled, titled
from powerplan.plots.lines import AS_IT_IS, Series, context_axis, draw, handles, level, log_axis, look, upright
from powerplan.plots.over_context import MOST_NAMED, STEPS
from powerplan.report.budget import hours_text
from powerplan.report.parts import parameters_text
from powerplan.swap import swap_text
from powerplan.training import RULE, TOKENS_PER_PARAMETER, TRAINING_PASSES, Alternative, Bought, Budget
from powerplan.units import format_figure, format_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RULE_TEXT = f"{TOKENS_PER_PARAMETER} tokens per active parameter"


@styled
def budget_figure(budget: Budget, others: Sequence[Alternative]) -> Figure:
    """Return a figure of the tokens that the FLOPs of a budget buy with each mixer: at its context, and over contexts.

    others: the same FLOPs with other mixers, the model as it is first.

    Raises:
        MachineError: matplotlib is not installed.
    """
    name, context = name_of(budget.accounting.spec), budget.row.context
    labels = [other.swap.describe() if other.swap else swap_text(None) for other in others]
    looks = [look(place) if other.swap else AS_IT_IS for place, other in enumerate(others, -1)]
    figure, ((upper,), (lower,)) = panels([0.7 + 0.36 * len(others), 3.2])
    _bars(upper, budget, others, labels, [style.colour for style in looks])
    sampled = sampled_contexts([context], STEPS)
    series = [
        Series(_over(sampled, _tokens_of(other.budget.accounting, float(budget.total_flops))), frozenset([context]))
        for other in others
    ]
    draw(lower, series, looks)
    context_axis(lower, sampled)
    log_axis(lower, _count, "tokens")
    upright(lower, context, f"{context:,}", series)
    title = f"{name} at {context:,} tokens: what {float(budget.total_flops):.4g} FLOPs buy"
    below = f"{parameters_text(budget.accounting)}; {_training_text(budget.accounting)}"
    titled(figure, title, below)
    legend_below(figure, handles(looks), labels)
    return figure


def _bars(
    axes: Axes, budget: Budget, others: Sequence[Alternative], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Draw the tokens of each mixer as a bar, with how many times as many they are as those of the model as it is."""
    places = list(range(len(others)))
    tokens = [float(other.budget.tokens) for other in others]  # matplotlib takes no integer of more than 64 bits.
    axes.barh(places, tokens, color=colours, height=0.65)
    for place, (other, count) in enumerate(zip(others, tokens, strict=True)):
        times = float(budget.train_flops_per_token / other.budget.train_flops_per_token)
        text = format_parameters(other.budget.tokens) + (f", {times:.2f}x" if other.swap else "")
        axes.annotate(text, (count, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xlim(0, max([*tokens, 1]) * 1.16)
    rule = float(TOKENS_PER_PARAMETER * budget.parameters)
    if rule < axes.get_xlim()[1]:
        axes.axvline(rule, color="0.25", linewidth=1, linestyle=(0, (3, 2)))
        right = rule > axes.get_xlim()[1] / 2
        axes.annotate(
            RULE_TEXT,
            (rule, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right" if right else "left",
            va="bottom",
            fontsize=8.5,
            color="0.15",
        )
    axes.set_yticks(places, [cut(label, 40) for label in labels])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    axes.set_xlabel("tokens")


@dataclass(frozen=True)
class _Panel:
    """What a panel shows of a row, by the context; `over` draws it between the rows too, where it is not None."""

    label: str
    show: Callable[[float], str]
    of_row: Callable[[Bought], float]
    over: Callable[[Bought, int], float] | None


@styled
def budgets_figure(rows: Sequence[Bought]) -> Figure:
    """Return a figure of what one budget buys of several models, at several contexts, or both.

    It shows tokens, and tokens per active parameter; where the tokens are the budget, the FLOPs that they take. With a
    device it shows the hours too, unless these are the budget.

    Raises:
        MachineError: matplotlib is not installed.
    """
    models: dict[Accounting, list[Bought]] = {}
    for row in rows:
        models.setdefault(row.budget.accounting, []).append(row)
    contexts = sorted({row.budget.row.context for row in rows})
    sampled = sampled_contexts(contexts, STEPS)
    shown = _panels(rows, models)
    figure, grid = panels([3.1] * len(shown), share_x=True)
    looks = [look(place) for place in range(len(models))]
    for (axes,), panel in zip(grid, shown, strict=True):
        series = [_series(panel, own, sampled) for own in models.values()]
        draw(axes, series, looks)
        axes.margins(y=0.1)
        context_axis(axes, sampled)
        log_axis(axes, panel.show, panel.label)
        if panel.label == _PER_PARAMETER:
            level(axes, TOKENS_PER_PARAMETER, f"{TOKENS_PER_PARAMETER} per parameter, compute-optimal", series)
        for context in contexts:
            upright(axes, context, f"{context:,}" if axes is grid[0][0] and len(contexts) <= MOST_NAMED else "", series)
        axes.set_xlabel("context, tokens" if axes is grid[-1][0] else "")
    totals = {row.budget.total_flops for row in rows}
    title = f"What {float(rows[0].budget.total_flops):.4g} FLOPs buy" if len(totals) == 1 else "What a budget buys"
    if shown[0].label == _ALL_FLOPS:
        tokens = {row.budget.tokens for row in rows}
        title = f"What {format_parameters(*tokens)} tokens take" if len(tokens) == 1 else f"What {RULE_TEXT} take"
    rule = f"; {RULE}" if _PER_PARAMETER in [panel.label for panel in shown] else ""
    titled(figure, title, f"{_training_text(rows[0].budget.accounting)}{rule}")
    labels = [f"{name_of(accounting.spec)}: {parameters_text(accounting)}" for accounting in models]
    legend_below(figure, handles(looks), labels)
    return figure


_ALL_FLOPS, _PER_PARAMETER = "training FLOPs in all", "tokens per active parameter"


def _panels(rows: Sequence[Bought], models: dict[Accounting, list[Bought]]) -> list[_Panel]:
    hours = [row.gpu_hours for row in rows if row.gpu_hours is not None]
    by_hours = bool(hours) and max(hours) <= 1.001 * min(hours)
    alike = len({row.budget.total_flops for row in rows}) == 1
    measured = any(row.time is not None and row.time.measured is not None for row in rows)
    fixed_tokens = (
        not alike and not by_hours and all(len({row.budget.tokens for row in own}) == 1 for own in models.values())
    )
    result = []
    if fixed_tokens:
        result.append(
            _Panel(_ALL_FLOPS, lambda flops: f"{flops:.4g}", lambda row: float(row.budget.total_flops), _flops_at)
        )
    else:
        tokens_over = _tokens_at if alike else None
        result.append(_Panel("tokens", _count, lambda row: float(row.budget.tokens), tokens_over))
        result.append(
            _Panel(
                _PER_PARAMETER,
                format_figure,
                lambda row: float(row.budget.tokens_per_parameter),
                (lambda row, context: _tokens_at(row, context) / row.budget.parameters) if alike else None,
            )
        )
    if hours and not by_hours:
        result.append(
            _Panel("device hours", hours_text, lambda row: row.gpu_hours or 0.0, None if measured else _hours_at)
        )
    return result


def _series(panel: _Panel, own: Sequence[Bought], sampled: Sequence[int]) -> Series:
    """Return the line of one model; own: its rows."""
    exact = {row.budget.row.context: panel.of_row(row) for row in own}
    points = exact
    if panel.over is not None:
        points = {context: panel.over(own[0], context) for context in sampled} | exact
    return Series(tuple((float(x), y) for x, y in sorted(points.items()) if y > 0), frozenset(map(float, exact)))


def _over(contexts: Sequence[int], value: Callable[[int], float]) -> tuple[tuple[float, float], ...]:
    return tuple((float(context), value(context)) for context in contexts)


def _tokens_of(accounting: Accounting, total: float) -> Callable[[int], float]:
    """Return how many tokens `total` FLOPs buy at a context, not rounded."""
    return lambda context: total / _train_flops(accounting, context)


def _train_flops(accounting: Accounting, context: int) -> float:
    return TRAINING_PASSES * float(accounting.weight_flops_per_token + accounting.state_flops_per_token(context))


def _tokens_at(row: Bought, context: int) -> float:
    return float(row.budget.total_flops) / _train_flops(row.budget.accounting, context)


def _flops_at(row: Bought, context: int) -> float:
    return row.budget.tokens * _train_flops(row.budget.accounting, context)


def _hours_at(row: Bought, context: int) -> float:
    assert row.time is not None
    return _flops_at(row, context) / float(row.time.throughput.flops_per_s) / 3600


def _training_text(accounting: Accounting) -> str:
    counted = convention_text(accounting.convention).partition(": ")[2]
    return f"training FLOPs, {TRAINING_PASSES}x forward: {counted}"


def _count(value: float) -> str:
    return format_parameters(round(value))
