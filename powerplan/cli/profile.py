"""`powerplan profile`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerplan.cli import say
from powerplan.cli.options import FormatOption, OptionalModel, model_or_default

if TYPE_CHECKING:
    from powerplan.profile import Profile


ALLOWED_WITH_SHOW = frozenset({"show", "plot", "force", "output"})
"""Parameters that say how to print a profile. All others say what to time, or where to save it."""


def profile(
    command: typer.Context,
    model: OptionalModel = None,
    p: Annotated[
        str | None, typer.Option("--p", help="Degrees of power attention: 2, or 2,3. Without it the model's own, or 2.")
    ] = None,
    ctx: Annotated[
        str | None, typer.Option(help="Contexts in tokens, such as 4k,16k. Without it, contexts that fit --time-limit.")
    ] = None,
    passes: Annotated[
        str, typer.Option("--pass", metavar="LIST", help="Any of forward, train (forward and backward), decode.")
    ] = "forward,train",
    against: Annotated[
        str, typer.Option(metavar="LIST", help="Compare with softmax, window (of equal state), linear; or none.")
    ] = "softmax,window",
    impl: Annotated[
        str, typer.Option(metavar="LIST", help="What runs power attention: auto, torch, triton, recurrent, reference.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32, bf16 or fp16. Without it bf16 on a GPU, fp32 elsewhere.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="INTEGER", help="Sequences that a run processes at once.")] = "1",
    chunk_size: Annotated[
        str, typer.Option(metavar="LIST", help="Also time these chunk sizes, in tokens: 256,512; auto for none.")
    ] = "auto",
    mixer: Annotated[
        str | None, typer.Option(help="A mixer in place of --p: power:p=2,gated=true, linear, attention, window:4096.")
    ] = None,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Show which operations take a run's time.")] = False,
    time_limit: Annotated[str, typer.Option(metavar="TIME", help="For everything: 60 (seconds), 5min, 1h.")] = "60",
    memory_limit: Annotated[
        str | None, typer.Option(help="For one run, such as 4GiB. Without it 70 % of the free memory.")
    ] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE", help="Save as JSON, for --measured and --show.")] = None,
    show: Annotated[str | None, typer.Option(metavar="FILE", help="Print a saved profile; measure nothing.")] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw throughput and time split: .png, .svg or .pdf.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    output: FormatOption = "table",
) -> None:
    """Time a layer here: power attention against softmax attention and a window, and from where on it is faster."""
    from powerplan.errors import InputError
    from powerplan.output import check_target, write_whole
    from powerplan.plots import check_format, profile_plot
    from powerplan.profile import load_profile, to_json
    from powerplan.profile.options import parse_chunk_sizes, parse_passes
    from powerplan.report.profile import profile_report
    from powerplan.units import parse_bytes, parse_contexts, parse_integer, parse_seconds

    for path, option in ((save, "--save"), (plot, "--plot")):
        if path is not None:
            check_target(path, force, option)
    if plot is not None:
        check_format(plot, "--plot")
    if show is not None:
        if unused := _given(command, ALLOWED_WITH_SHOW):
            names = " and ".join([", ".join(unused[:-1]), unused[-1]] if len(unused) > 1 else unused)
            raise InputError(f"prints a saved profile: leave {names} out", "--show")
        result = load_profile(show)
    else:
        settings = {
            "degrees": p,
            "mixer": mixer,
            "against": against,
            "impl": impl,
            "contexts": parse_contexts(ctx, "--ctx") if ctx is not None else None,
            "passes": parse_passes(passes),
            "batch": parse_integer(batch, "--batch", 1, 2**16),
            "chunk_sizes": parse_chunk_sizes(chunk_size),
            "breakdown": breakdown,
        }
        seconds = parse_seconds(time_limit, "--time-limit")
        memory = parse_bytes(memory_limit, "--memory-limit") if memory_limit is not None else None
        result = _measured(model, settings, device, dtype, seconds, memory)
    cut = show is None and result.interrupted
    try:
        if save is not None:  # Before the table: what was measured is not lost where its reader (head) has gone.
            write_whole(save, to_json(result), force, "--save")
            say.note(f"wrote {save}: powerplan recommend --measured {save} plans with these times")
    finally:
        tablefmt = "pipe" if output == "markdown" else "simple"
        say.show(profile_report(result, all_parts=output == "csv", tablefmt=tablefmt), output)
    if plot is not None and cut and not result.part("state"):
        say.note(f"{plot} is not written: no time of a mixer was measured")
    elif plot is not None:
        write_whole(plot, profile_plot(result, check_format(plot, "--plot")), force, "--plot")
        say.note(f"wrote {plot}")
    if cut:
        raise typer.Exit(130)


def _given(command: typer.Context, but: frozenset[str]) -> list[str]:
    """Return the options and arguments on the command line, except those named in `but`, in the order of `--help`."""
    return [
        parameter.opts[0] if parameter.param_type_name == "option" else "MODEL"
        for parameter in command.command.params
        if parameter.name not in but
        and (source := command.get_parameter_source(parameter.name or "")) is not None
        and source.name == "COMMANDLINE"
    ]


def _measured(
    model: str | None, settings: dict[str, Any], device: str, dtype: str | None, seconds: float, memory: int | None
) -> Profile:
    """Return the profile of the workload that `settings` describe, measured behind a progress bar."""
    started = time.monotonic()  # Loading torch counts: the limit is for the whole command.
    from powerplan.cli.progress import progress_bar
    from powerplan.load import load_model
    from powerplan.profile import workload_of

    name, notes = model_or_default(model)
    loaded = load_model(name)
    spec, notes = loaded.spec, [*notes, *loaded.notes]
    workload_of(spec, **settings)  # Refuses bad options before torch is loaded, which takes seconds.
    from powerplan.profile import Session
    from powerplan.profile.machine import check_dtype, default_dtype, resolve_device

    device = resolve_device(device)
    if dtype is not None:
        check_dtype(dtype, device)
    workload = workload_of(spec, device=device, dtype=dtype or default_dtype(device), **settings)
    for note in (*notes, *workload.notes):
        say.note(note)
    with progress_bar(seconds) as progress:
        result = Session(workload, seconds, memory, progress, started).run()
    for note in result.notes:
        if note not in workload.notes:
            say.note(note)
    return result
