"""Figures. matplotlib is an extra (`pip install 'powerplan[plot]'`), and imported only when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from powerplan.accounting import Accounting
from powerplan.errors import InputError, MachineError
from powerplan.recommend import Answer
from powerplan.units import format_ratio

FORMATS = ("png", "svg", "pdf")
CURVES = 6
"""Candidates drawn: more lines than that cannot be told apart."""


def check_format(path: str, where: str) -> str:
    """Return the format that a file's suffix names; raises InputError for another."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(f"{path} must end in .{', .'.join(FORMATS)}", where)
    return suffix


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MachineError("--plot needs matplotlib, and it is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def wsfr_plot(answer: Answer, form: str) -> bytes:
    """Return a figure of the weight-state FLOP ratio over the context, for the first candidates and the model as it is.

    Both axes are logarithmic; the target and the contexts of the answer are marked.
    """
    pyplot = _pyplot()
    shown = list(answer.candidates[:CURVES])
    as_it_is = [item for item in answer.candidates if item.plan.unchanged]
    shown += [item for item in as_it_is if item not in shown]
    contexts = _contexts(answer.contexts)
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    target = answer.request.target
    axes.axhline(float(target), color="0.4", linewidth=1)
    axes.annotate(
        f"target {format_ratio(target)}", (contexts[0], float(target)), xytext=(2, 3), textcoords="offset points"
    )
    for context in answer.contexts:
        axes.axvline(context, color="0.85", linewidth=1, zorder=0)
    for place, item in enumerate(shown, 1):
        accounting = Accounting(item.spec, answer.request.convention)
        ratios = [accounting.wsfr(context) for context in contexts]
        points = [(context, float(ratio)) for context, ratio in zip(contexts, ratios, strict=True) if ratio is not None]
        axes.plot(*zip(*points, strict=True), label=f"{place}. {item.label}", linewidth=2.5 if place == 1 else 1.3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: _size(round(value)))
    axes.yaxis.set_major_formatter(lambda value, _: format_ratio(Fraction(value)))
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("weight FLOPs : state FLOPs")
    axes.set_title(answer.base.spec.name)
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    # Without a date in it, the same answer is the same file.
    figure.savefig(
        buffer, format=form, dpi=120, metadata={"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
    )
    pyplot.close(figure)
    return buffer.getvalue()


def _contexts(marked: Sequence[int]) -> list[int]:
    """Return powers of two from an eighth of the shortest context, 1k at most, to 16 times the longest."""
    low, high = min(1024, max(1, marked[0] // 8)), marked[-1] * 16
    sizes = [2**exponent for exponent in range(low.bit_length() - 1, high.bit_length())]
    return sorted({*sizes, *marked})


def _size(tokens: int) -> str:
    for exponent, suffix in ((30, "G"), (20, "M"), (10, "k")):
        if tokens >= 2**exponent:
            return f"{tokens / 2**exponent:g}{suffix}"
    return str(tokens)
