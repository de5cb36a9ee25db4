"""`powerplan profile`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import FormatOption, OptionalModel, read_model_or_default
from powerplan.report.render import Format

if TYPE_CHECKING:
    from powerplan.profile import Profile


WITH_SHOW = frozenset({"show", "plot", "force", "output"})
"""Parameters that a saved profile can be printed with; all others say what to measure, or where to save it."""


def profile(
    command: typer.Context,
    model: OptionalModel = None,
    p: Annotated[
        str | None,
        typer.Option("--p", help="Degrees of power attention: 2, or a list; the model's own, or 2, where not given."),
    ] = None,
    ctx: Annotated[
        str | None, typer.Option(help="Contexts in tokens, such as 4k,16k; what fits the time limit where not given.")
    ] = None,
    passes: Annotated[
        str, typer.Option("--pass", metavar="LIST", help="forward, train (forward and backward), decode.")
    ] = "forward,train",
    against: Annotated[
        str, typer.Option(metavar="LIST", help="softmax, window (of equal state), linear; or none.")
    ] = "softmax,window",
    impl: Annotated[
        str, typer.Option(metavar="LIST", help="Of power attention: auto, torch, triton, recurrent, reference.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32, bf16, fp16; bf16 on a GPU, else fp32, where not given.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="INTEGER", help="Sequences at once.")] = "1",
    chunk_size: Annotated[
        str, typer.Option("--chunk-size", metavar="LIST", help="auto, or tokens per chunk to sweep, such as 256,512.")
    ] = "auto",
    mixer: Annotated[
        str | None,
        typer.Option(
            "--mixer", help="In place of --p: power:p=2,gated=true, linear, attention, window:4096, with settings."
        ),
    ] = None,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Show where a run's time goes, by kernel.")] = False,
    time_limit: Annotated[
        str, typer.Option("--time-limit", metavar="TIME", help="Of the whole run: 60, 5min, 1h.")
    ] = "60",
    memory_limit: Annotated[
        str | None,
        typer.Option("--memory-limit", help="Of a run, such as 4GiB; most of what is free where not given."),
    ] = None,
    save: Annotated[
        str | None, typer.Option(metavar="FILE", help="Save as JSON, for --measured and --show.", show_default=False)
    ] = None,
    show: Annotated[
        str | None, typer.Option(metavar="FILE", help="Print a saved profile; measure nothing.", show_default=False)
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw throughput and time split: .png, .svg or .pdf.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    output: FormatOption = Format.table,
) -> None:
    """Time it here: the layer with power attention against softmax attention and a window, and where it overtakes."""
    from powerplan.errors import InputError
    from powerplan.output import check_target, write_whole
    from powerplan.plots import check_format, profile_plot
    from powerplan.profile import read_whole, to_json
    from powerplan.report.profile import profile_report
    from powerplan.units import parse_bytes, parse_contexts, parse_integer, parse_seconds

    for path, option in ((save, "--save"), (plot, "--plot")):
        if path is not None:
            check_target(path, force, option)
    if plot is not None:
        check_format(plot, "--plot")
    if show is not None:
        idle = _given(command, but=WITH_SHOW)
        if idle:
            *others, last = idle
            names = f"{', '.join(others)} and {last}" if others else last
            raise InputError(f"prints a saved profile: leave {names} out", "--show")
        found = read_whole(show)
    else:
        contexts = parse_contexts(ctx, "--ctx") if ctx is not None else None
        seconds = parse_seconds(time_limit, "--time-limit")
        memory = parse_bytes(memory_limit, "--memory-limit") if memory_limit is not None else None
        settings = {"degrees": p, "mixer": mixer, "against": against, "impl": impl, "breakdown": breakdown}
        found = _measured(
            model,
            settings,
            passes,
            chunk_size,
            contexts,
            parse_integer(batch, "--batch", 1, 2**16),
            (device, dtype),
            seconds,
            memory,
        )
    tablefmt = "pipe" if output is Format.markdown else "simple"
    say.show(profile_report(found, everything=output is Format.csv, tablefmt=tablefmt), output)
    if save is not None:
        write_whole(save, to_json(found), force, "--save")
        say.note(f"wrote {save}: powerplan recommend --measured {save} plans with these times")
    if plot is not None:
        write_whole(plot, profile_plot(found, check_format(plot, "--plot")), force, "--plot")
        say.note(f"wrote {plot}")


def _given(command: typer.Context, but: frozenset[str]) -> list[str]:
    """Return the names of the parameters that the command line sets, as it spells them, in their order."""
    found = []
    for item in command.command.params:
        source = command.get_parameter_source(item.name or "")
        if item.name not in but and source is not None and source.name == "COMMANDLINE":
            found.append(item.opts[0] if item.param_type_name == "option" else "MODEL")
    return found


def _measured(
    model: str | None,
    settings: Mapping[str, object],
    passes: str,
    chunk_size: str,
    contexts: list[int] | None,
    batch: int,
    place: tuple[str, str | None],
    seconds: float,
    memory: int | None,
) -> Profile:
    """Read the model, plan, and measure behind a progress bar."""
    from powerplan.cli.progress import progress_bar
    from powerplan.profile import Session, plan_of
    from powerplan.profile.machine import need_torch, resolve_device, resolve_dtype
    from powerplan.profile.plan import parse_chunks, parse_passes

    spec, notes = read_model_or_default(model, None)
    chosen, sizes = parse_passes(passes), parse_chunks(chunk_size)
    plan_of(spec, contexts=contexts, **settings)  # type: ignore[arg-type]  # Bad words are refused before torch loads.
    need_torch()
    device = resolve_device(place[0])
    dtype = resolve_dtype(place[1], device)
    plan = plan_of(
        spec,
        passes=chosen,
        contexts=contexts,
        device=device,
        dtype=dtype,
        batch=batch,
        chunk_sizes=sizes,
        **settings,  # type: ignore[arg-type]
    )
    for remark in (*notes, *plan.notes):
        say.note(remark)
    with progress_bar(seconds) as tell:
        found = Session(plan, seconds, memory, tell).run()
    for remark in found.notes:
        if remark not in plan.notes:
            say.note(remark)
    return found
