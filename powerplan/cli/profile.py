"""`powerplan profile`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerplan.cli import figures, say
from powerplan.cli.completion import mixer_words
from powerplan.cli.options import (
    ADDS,
    ForceOption,
    FormatOption,
    LikeOption,
    OptionalModel,
    PlotOption,
    as_family,
    model_or_default,
)
from powerplan.cli.shared import ADDED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from powerplan.cli.interrupts import Kept
    from powerplan.load import LoadedModel
    from powerplan.profile import Profile, Session


ALLOWED_WITH_SHOW = ADDED | {"show", "plot", "force", "output"}
"""Parameters that say how to print a profile. All others say what to time, or where to save it."""


def profile(
    command: typer.Context,
    model: OptionalModel = None,
    p: Annotated[
        str | None,
        typer.Option("--p", help="Degrees of power attention: 2, or 2,3; the model's own, or 2, if not given."),
        ADDS,
    ] = None,
    ctx: Annotated[
        str | None,
        typer.Option(help="Contexts in tokens, such as 4k,16k; those that fit --time-limit if not given."),
        ADDS,
    ] = None,
    passes: Annotated[
        str, typer.Option("--pass", metavar="LIST", help="Any of forward, forward+backward (or train), decode."), ADDS
    ] = "forward, forward+backward",
    against: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Compare with attention, window (of equal state), linear, recurrent kinds such as kda; or none.",
        ),
        ADDS,
    ] = "attention,window",
    impl: Annotated[
        str,
        typer.Option(metavar="LIST", help="What runs power attention: auto, torch, triton, recurrent, reference."),
        ADDS,
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fp32, bf16 or fp16; bf16 on a GPU, fp32 elsewhere if not given."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="INTEGER", help="Sequences that a run processes at once.")] = "1",
    chunk_size: Annotated[
        str, typer.Option(metavar="LIST", help="Also time these chunk sizes, in tokens: 256,512; auto for none."), ADDS
    ] = "auto",
    like: LikeOption = None,
    mixer: Annotated[
        str | None,
        typer.Option(
            help="A mixer in place of --p: power:p=2,gated=true, linear, attention, window:4096.",
            autocompletion=mixer_words,
        ),
    ] = None,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Show which operations take a run's time.")] = False,
    time_limit: Annotated[str, typer.Option(metavar="TIME", help="For everything: 60 (seconds), 5min, 1h.")] = "60",
    memory_limit: Annotated[
        str | None, typer.Option(help="For one run, such as 4GiB; 70% of the free memory if not given.")
    ] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE", help="Save as JSON, for --measured and --show.")] = None,
    show: Annotated[str | None, typer.Option(metavar="FILE", help="Print a saved profile; measure nothing.")] = None,
    plot: PlotOption = None,
    force: ForceOption = False,
    output: FormatOption = "table",
) -> None:
    """Time a layer here: power against attention and a window, and from where on it is faster."""
    from powerplan.cli.files import File, deliver
    from powerplan.cli.interrupts import kept
    from powerplan.errors import InputError, listed
    from powerplan.load import model_file
    from powerplan.output import check_targets
    from powerplan.profile import load_profile, to_json
    from powerplan.profile.options import parse_chunk_sizes, parse_passes
    from powerplan.report.profile import profile_report
    from powerplan.units import parse_bytes, parse_contexts, parse_integer, parse_seconds

    name, notes = ("", []) if show is not None else model_or_default(model)
    inputs = {"MODEL": model_file(name)} if show is None else {"--show": show}
    check_targets({"--save": save, "--plot": plot}, force, inputs)
    figures.check_option(plot)
    if show is not None:
        if unused := _given(command, ALLOWED_WITH_SHOW):
            raise InputError(f"prints a saved profile: leave {listed(unused, 'and')} out", "--show")
        session = None
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
        session = _session(as_family(name, like), notes, settings, device, dtype, seconds, memory)
    with kept() as signals:
        result = load_profile(str(show)) if session is None else _measured(session, signals)
        files = [
            File(
                "--save",
                save,
                lambda: to_json(result),
                f": powerplan recommend --measured {save} plans with these times",
            ),
        ]
        if plot is not None and session is not None and result.interrupted and not result.part("state"):
            say.note(f"{plot} is not written: no time of a mixer was measured")
        else:
            files.append(figures.file(plot, lambda: _figure(result)))
        report = profile_report(result)
        deliver(lambda: say.show(report, output), files, force, signals)
        if session is not None and result.interrupted:
            raise KeyboardInterrupt


def _figure(result: Profile) -> Figure:
    from powerplan.plots.profile import profile_figure

    return profile_figure(result)


def _given(command: typer.Context, but: frozenset[str]) -> list[str]:
    """Return the options and arguments on the command line, except those named in `but`, in the order of `--help`."""
    return [
        parameter.opts[0] if parameter.param_type_name == "option" else "MODEL"
        for parameter in command.command.params
        if parameter.name not in but
        and (source := command.get_parameter_source(parameter.name or "")) is not None
        and source.name == "COMMANDLINE"
    ]


def _session(
    model: str | LoadedModel,
    notes: list[str],
    settings: dict[str, Any],
    device: str,
    dtype: str | None,
    seconds: float,
    memory: int | None,
) -> Session:
    """Return what measures the workload that `settings` describe. Prints the notes about it."""
    started = time.monotonic()  # Loading torch counts: the limit is for the whole command.
    from powerplan.answers.base import read_model
    from powerplan.profile import workload_of

    loaded = read_model(model)
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
    return Session(workload, seconds, memory, started=started)


def _measured(session: Session, signals: Kept) -> Profile:
    """Return the profile, measured behind a progress bar. From its last measurement on, Ctrl-C waits."""
    from powerplan.cli.progress import progress_bar

    with progress_bar(session.time_limit) as progress:
        session.progress, session.ended = progress, signals.wait
        result = session.run()
    for note in result.notes:
        if note not in session.workload.notes:
            say.note(note)
    return result
