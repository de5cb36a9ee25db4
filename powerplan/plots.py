"""Figures for `--plot`. matplotlib is an extra (`pip install 'powerplan-llm[plot]'`), imported only to draw one."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from powerplan.accounting import Accounting
from powerplan.curves import sampled_contexts, short_context
from powerplan.errors import InputError, MachineError
from powerplan.profile.result import Profile
from powerplan.search import Recommendation
from powerplan.units import format_ratio

FORMATS = ("png", "svg", "pdf")
"""Formats of a figure, which are also the suffixes of its file."""

MAX_CURVES = 6
"""Most candidates that are drawn: more lines cannot be told apart."""


def check_format(path: str, where: str) -> str:
    """Return the format that a file's suffix names; raises InputError for another."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(f"{path} must end in .{', .'.join(FORMATS)}", where)
    return suffix


def check_plot(path: str | None, where: str) -> None:
    """Raise an error where no figure could be drawn into `path`; None stands for no figure.

    Raises:
        InputError: The suffix names no format.
        MachineError: matplotlib is not installed, or does not load.
    """
    if path is not None:
        check_format(path, where)
        _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        absent = "--plot needs matplotlib, and it is not installed: pip install matplotlib"
        raise MachineError(
            absent if error.name == "matplotlib" else f"--plot: matplotlib does not load: {error}"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def wsfr_plot(answer: Recommendation, form: str) -> bytes:
    """Return a figure of the weight-state FLOP ratio over the context, for the first candidates and the model as it is.

    Both axes are logarithmic; the target and the contexts of the answer are marked.
    """
    pyplot = _pyplot()
    candidates = list(answer.candidates[:MAX_CURVES])
    candidates += [other for other in answer.candidates if other.plan.unchanged and other not in candidates]
    contexts = sampled_contexts(answer.contexts)
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    target, label = float(answer.request.target), f"target {format_ratio(answer.request.target)}"
    axes.axhline(target, color="0.4", linewidth=1)
    axes.annotate(label, (contexts[0], target), xytext=(2, 3), textcoords="offset points")
    for context in answer.contexts:
        axes.axvline(context, color="0.85", linewidth=1, zorder=0)
    for number, candidate in enumerate(candidates, 1):
        accounting = Accounting(candidate.spec, answer.request.convention)
        points = [(context, float(ratio)) for context in contexts if (ratio := accounting.wsfr(context)) is not None]
        width = 2.5 if number == 1 else 1.3
        axes.plot(*zip(*points, strict=True), label=f"{number}. {candidate.label}", linewidth=width)
    _logarithmic_axes(axes, lambda value, _: format_ratio(Fraction(value)))
    axes.set_ylabel("weight FLOPs : state FLOPs")
    axes.set_title(answer.base.spec.name)
    axes.legend(fontsize="small")
    return _drawn(pyplot, figure, form)


def profile_plot(profile: Profile, form: str) -> bytes:
    """Return a figure of a profile, with two panels for each pass.

    The upper one shows the tokens per second of each mixer alone over the context, both axes logarithmic, with the
    crossovers marked; the lower one the shares of projections, FFN and state in the layer's time at every context.
    """
    pyplot = _pyplot()
    passes = list(dict.fromkeys(row.direction for row in profile.part("state")))
    if not passes:
        raise InputError("the profile holds no times of mixers to draw", "--plot")
    size = (1 + 5 * len(passes), 8)
    figure, grid = pyplot.subplots(2, len(passes), figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(f"{profile.layer.model} on {profile.device}, {profile.dtype}, batch {profile.batch}")
    for upper, lower, direction in zip(*grid, passes, strict=True):
        _throughput(upper, profile, direction)
        _time_split(lower, profile, direction)
    return _drawn(pyplot, figure, form)


def _throughput(axes: Any, profile: Profile, direction: str) -> None:
    rows = [row for row in profile.part("state", direction) if row.tokens_per_s]
    for name in dict.fromkeys(row.name for row in rows):
        measured = [(row.context, row.tokens_per_s) for row in rows if row.name == name and row.tokens_per_s]
        points = sorted(measured + _from_crossovers(profile, name, direction))
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    for crossover in profile.crossover:
        if crossover.direction == direction and crossover.context is not None:
            axes.axvline(crossover.context, color="0.7", linewidth=1, zorder=0)
    _logarithmic_axes(axes, lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("tokens per second, mixer alone")
    axes.set_title(direction)
    axes.legend(fontsize="small")


def _time_split(axes: Any, profile: Profile, direction: str) -> None:
    rows = sorted((row for row in profile.split if row.direction == direction), key=lambda row: row.context)
    labels = [f"{short_context(row.context)} {row.name}" for row in rows]
    start = [0.0] * len(rows)
    for part, colour in (("projections", "0.75"), ("ffn", "0.55"), ("state", "tab:blue")):
        shares = [(getattr(row, f"{part}_ms") or 0.0) / (row.weight_ms + row.state_ms) for row in rows]
        axes.barh(labels, shares, left=start, color=colour, label="FFN" if part == "ffn" else part)
        start = [left + share for left, share in zip(start, shares, strict=True)]
    axes.axvline(0.5, color="0.2", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the layer's time")
    axes.tick_params(labelsize="small")
    if rows:
        axes.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def _from_crossovers(profile: Profile, name: str, direction: str) -> list[tuple[int, float]]:
    """Return contexts and tokens per second of a mixer that were measured only to find its crossover."""
    known = {row.context for row in profile.part("state", direction) if row.name == name}
    points = []
    for crossover in profile.crossover:
        if crossover.direction == direction and name in (crossover.name, crossover.against):
            for times in crossover.tried:
                tokens = profile.batch * (1 if direction == "decode" else times.context)
                ms = times.ms if name == crossover.name else times.against_ms
                if times.context not in known:
                    points.append((times.context, tokens / ms * 1000))
    return points


def _logarithmic_axes(axes: Any, show_y: Callable[[float, Any], str]) -> None:
    """Make both axes logarithmic, the lower one a context in tokens."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: short_context(round(value)))
    axes.yaxis.set_major_formatter(show_y)
    axes.set_xlabel("context, tokens")


def _drawn(pyplot: Any, figure: Any, form: str) -> bytes:
    buffer = io.BytesIO()
    # Without a date in the file, the same answer makes the same bytes.
    metadata = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
    figure.savefig(buffer, format=form, dpi=120, metadata=metadata)
    pyplot.close(figure)
    return buffer.getvalue()
