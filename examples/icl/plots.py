"""The curves of a result as a figure. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import pairwise
from math import inf
from typing import Any

from powerplan.errors import MachineError
from powerplan.units import format_ratio

STYLES = {
    "softmax": ("#000000", "o", "-"),
    "window": ("#e69f00", "s", "--"),
    "linear": ("#009e73", "^", "-."),
    "power": ("#d55e00", "D", "-"),
    "mix": ("#0072b2", "v", "-"),
}
"""Colour, marker and line style of each mixer. The colours are Okabe and Ito's, for colour-blind readers."""


def pyplot() -> Any:
    """Return matplotlib's pyplot without a display; raises MachineError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise MachineError("--plot needs matplotlib, and it is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curve_plot(record: Mapping[str, Any]) -> bytes:
    """Draw one task: the measure over the position, with mean and spread over the seeds, one curve per mixer.

    Args:
        record: A task of a result, as `icl.result.task_record` makes it.

    Returns:
        The figure as a PNG.

    Raises:
        MachineError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    edges = record["bin_edges"]
    centres = [(low * (high - 1)) ** 0.5 for low, high in pairwise(edges)]
    for model, summary in zip(record["models"], record["summary"], strict=True):
        points = [
            (x, mean, spread)
            for x, mean, spread in zip(centres, summary["mean"], summary["spread"], strict=True)
            if mean is not None
        ]
        x, mean, spread = zip(*points, strict=True)
        colour, marker, line = STYLES[model["mixer"]]
        axes.plot(x, mean, color=colour, marker=marker, linestyle=line, markersize=5, label=legend(model))
        highest = 1.0 if record["measure"] == "accuracy" else inf  # Mean plus spread of a share can exceed 1.
        low = [max(0.0, value - width) for value, width in zip(mean, spread, strict=True)]
        high = [min(highest, value + width) for value, width in zip(mean, spread, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for name, value in record["data"]["baselines"].items():
        axes.axhline(value, color="0.5", linewidth=1, linestyle=":")
        axes.annotate(name, (centres[len(centres) // 2], value), va="bottom", color="0.4", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{round(value):,}")
    axes.set_xlabel(record["over"])
    axes.set_ylabel(record["unit"])
    axes.set_title(title(record))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def legend(model: Mapping[str, Any]) -> str:
    """Return the name of a mixer, with its window and its WSFR."""
    name = model["mixer"] if model["window"] is None else f"{model['mixer']} {model['window']:,}"
    return name if model["wsfr"] is None else f"{name}, WSFR {format_ratio(model['wsfr'])}"


def title(record: Mapping[str, Any]) -> str:
    """Return the title of a figure: task, context, what is equal, and the number of seeds."""
    settings = record["settings"]
    equal = {"flops": "FLOPs", "tokens": "tokens"}[record["match"]]
    seeds = max(summary["seeds"] for summary in record["summary"])
    return f"{record['task']}: context {settings['context']:,}, equal {equal}, mean ± spread of {seeds} seeds"
