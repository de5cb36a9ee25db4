"""The figure of `powerplan budget` without a model: the sizes that a budget supports, by context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from powerplan.plots.figure import convention_text, cut, legend_below, panels, styled, titled
from powerplan.plots.lines import COLOURS
from powerplan.report.parts import show_ratio
from powerplan.search.sizing import Sized, Sizing
from powerplan.training import TOKENS_PER_PARAMETER, TRAINING_PASSES
from powerplan.units import format_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS: dict[str, dict[str, Any]] = {
    "as it is": {"facecolor": COLOURS[0]},
    "as it is, more state than weight FLOPs": {"facecolor": "0.8", "hatch": "////", "edgecolor": "white"},
    "with mixers that balance it": {"facecolor": COLOURS[1]},
}
"""How the bar of a row is filled."""


@styled
def sizes_figure(sizing: Sizing) -> Figure:
    """Return a figure of the sizes that a budget supports: a bar of parameters for each shape, by context.

    First come the shapes as they are, at the contexts that balance them; then those of each context.

    Raises:
        MachineError: matplotlib is not installed.
    """
    from matplotlib.patches import Patch

    groups = [("Balanced as it is", list(sizing.balanced))] if sizing.balanced else []
    for context in dict.fromkeys(row.context for row in sizing.rows):
        groups.append((f"At {context:,} tokens", [row for row in sizing.rows if row.context == context]))
    lines = sum(len(rows) + 1.15 for _, rows in groups)
    figure, ((axes,),) = panels([0.6 + 0.27 * lines])
    longest = max(row.budget.parameters for _, rows in groups for row in rows)
    place, ticks, kinds = 0.0, [], []
    for number, (head, rows) in enumerate(groups):
        axes.text(0, place, head, fontweight="bold", fontsize=9.5, va="center")
        place += 1
        for row in rows:
            length = float(row.budget.parameters)  # matplotlib takes no integer of more than 64 bits.
            kind = _kind(row, balanced=bool(sizing.balanced) and number == 0)
            kinds.append(kind)
            axes.barh(place, length, height=0.72, **_KINDS[kind])
            axes.annotate(
                _numbers(row),
                (length, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
            ticks.append((place, _name(row, at_context=bool(sizing.balanced) and number == 0)))
            place += 1
        place += 0.15
    axes.set_xlim(0, float(longest) * 1.45)
    axes.set_ylim(place - 0.4, -0.7)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: format_parameters(round(value)))
    axes.set_xlabel("active parameters")
    counted = convention_text(sizing.rows[0].budget.accounting.convention).partition(": ")[2]
    rule = f"layers x width; {TOKENS_PER_PARAMETER} tokens per active parameter"
    below = f"{rule}; training FLOPs, {TRAINING_PASSES}x forward: {counted}"
    titled(figure, f"Which model {float(sizing.total_flops):.4g} FLOPs support", below)
    shown = [kind for kind in _KINDS if kind in kinds]
    legend_below(figure, [Patch(**_KINDS[kind]) for kind in shown], shown)
    return figure


def _kind(row: Sized, *, balanced: bool) -> str:
    own, heavy, other = _KINDS
    if not row.recommended:
        return heavy
    return own if balanced or row.label == row.mixer else other


def _name(row: Sized, *, at_context: bool) -> str:
    """Return what a bar is of: its shape and size, and the mixers or the context."""
    size = f"{row.spec.layer_count} x {row.spec.hidden_size:,}"
    return f"{cut(row.shape, 24)}, {size}: {f'{row.context:,} tokens' if at_context else cut(row.label, 36)}"


def _numbers(row: Sized) -> str:
    parameters, tokens = map(format_parameters, (row.budget.parameters, row.budget.tokens))
    return f"{parameters}, {tokens} tokens, {show_ratio(row.budget.row.wsfr)}"
