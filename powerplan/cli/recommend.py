"""`powerplan recommend`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import typer

import powerplan
from powerplan.choices import LM_HEAD, Keep, Side, Unknown
from powerplan.cli import figures, options, say
from powerplan.cli.completion import excludable_kinds, list_completer, selectable_kinds
from powerplan.cli.defaults import is_default
from powerplan.cli.options import choice_option
from powerplan.cli.progress import at_work
from powerplan.errors import InputError, listed
from powerplan.lists import split_words

DEFAULT_CONTEXT = "64k"
TOP = "6"


def recommend(
    model: options.OptionalModel = None,
    ctx: Annotated[
        str | None,
        typer.Option(help="Contexts in tokens, 64k if not given; of a list, the one furthest from the target decides."),
        options.ADDS,
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Weight to state FLOPs, such as 3:1 or 1:2; 1:1 if not given.")
    ] = None,
    max_state: Annotated[str | None, typer.Option(help="State per sequence at most, such as 512MiB.")] = None,
    max_decode_bytes: Annotated[
        str | None, typer.Option(help="Bytes moved per decoded token at most, weights and state, at batch 1.")
    ] = None,
    flops: Annotated[str | None, typer.Option(help="Training FLOPs at most, such as 1e21.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, such as 10B: what --flops must pay for.")] = None,
    gpu: options.DeviceOption = None,
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices whose memory counts together.")] = "1",
    max_days: Annotated[str | None, typer.Option(help="Days that training may take on these devices.")] = None,
    gpu_hours: Annotated[str | None, typer.Option(help="Hours of one device that training may take in all.")] = None,
    price: options.PriceOption = None,
    keep: Annotated[
        Keep, choice_option(Keep, "The same weights, or width and depth resized to the same FLOPs per token.")
    ] = "weights",
    only: Annotated[
        str | None,
        typer.Option(
            help="Kinds to use: attention, window, linear, power, mla, mix; kda, mamba2 ... where named.",
            autocompletion=list_completer(selectable_kinds),
        ),
        options.ADDS,
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(help="Kinds, or lm-head, to leave out.", autocompletion=list_completer(excludable_kinds)),
        options.ADDS,
    ] = None,
    weights_vs_state: Annotated[
        Side | None, choice_option(Side, "Which side should be the heavier one, where one must be.")
    ] = None,
    solve: Annotated[
        Unknown | None, choice_option(Unknown, "Solve for the context, window or p that meets the target.")
    ] = None,
    equal_state: Annotated[
        str | None,
        typer.Option(metavar="MIXER", help="With --solve: which one holds as much as this mixer, such as power:p=2?"),
    ] = None,
    like: options.LikeOption = None,
    mixer: options.MixerOption = None,
    measured: options.MeasuredOption = None,
    top: Annotated[str, typer.Option(metavar="INTEGER", help="Candidates to show, each the best of its sort.")] = TOP,
    pick: Annotated[str, typer.Option(metavar="INTEGER", help="Which candidate --write saves, by its number.")] = "1",
    write: Annotated[str | None, typer.Option(metavar="FILE", help="Save the recommended model as YAML.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The name in what --write saves: letters, digits and . _ -; short by default.")
    ] = None,
    plot: options.PlotOption = None,
    force: options.ForceOption = False,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    dtype: options.DtypeOption = "bf16",
    weights_dtype: options.WeightsDtypeOption = None,
    cache_dtype: options.CacheDtypeOption = None,
    state_dtype: options.StateDtypeOption = None,
    output: options.FormatOption = "table",
) -> None:
    """What to train: the window, degree, heads or layer mix that balances a model at a context, and why."""
    from powerplan.answers.solve import solve as solve_for
    from powerplan.cli.files import File, deliver
    from powerplan.cli.interrupts import kept
    from powerplan.load import model_file
    from powerplan.output import check_targets
    from powerplan.units import parse_contexts, parse_integer

    contexts = parse_contexts(ctx or DEFAULT_CONTEXT, "--ctx")
    place = parse_integer(pick, "--pick", 1, 1000)
    excluded = split_words(exclude) if exclude is not None else []
    convention = options.convention(form, causal, excluded)
    model, notes = options.model_or_default(model)
    check_targets({"--write": write, "--plot": plot}, force, {"MODEL": model_file(model), "--measured": measured})
    figures.check_option(plot)
    if ctx is None and solve != "context":
        notes.append(f"no --ctx given: {DEFAULT_CONTEXT} assumed")
    if solve is not None:
        _refuse_beside_solve(
            {
                "--max-state": max_state,
                "--max-decode-bytes": max_decode_bytes,
                "--flops": flops,
                "--tokens": tokens,
                "--gpu": gpu,
                "--devices": devices != "1",
                "--max-days": max_days,
                "--gpu-hours": gpu_hours,
                "--price": price,
                "--keep": keep != "weights",
                "--only": only,
                "kinds of --exclude": set(excluded) - {LM_HEAD},
                "--weights-vs-state": weights_vs_state,
                "--measured": measured,
                "--top": top != TOP,
                "--pick": place > 1,
                "--write": write,
                "--name": name,
                "--plot": plot,
                "lists of contexts": len(contexts) > 1,
            }
        )
        solved = solve_for(
            options.as_family(model, like),
            solve,
            contexts[0],
            target=None if equal_state is not None and is_default("--target") else target,
            equal_state=equal_state,
            mixer=mixer,
            convention=convention,
            dtype=dtype,
            weights_dtype=weights_dtype,
            cache_dtype=cache_dtype,
            state_dtype=state_dtype,
        )
        say.answer(solved, output, notes)
        return
    _check_alone(equal_state, place, name, write)
    with at_work("comparing candidates"):
        answer = powerplan.recommend(
            options.as_family(model, like),
            contexts,
            max_state=max_state,
            max_decode_bytes=max_decode_bytes,
            flops=flops,
            tokens=tokens,
            gpu=gpu,
            devices=devices,
            max_days=max_days,
            gpu_hours=gpu_hours,
            price=price,
            keep=keep,
            only=only or (),
            exclude=exclude or (),
            prefer=weights_vs_state,
            measured=measured,
            top=top,
            target="1:1" if target is None else target,
            mixer=mixer,
            convention=convention,
            dtype=dtype,
            weights_dtype=weights_dtype,
            cache_dtype=cache_dtype,
            state_dtype=state_dtype,
        )
    if place > len(answer.candidates):
        raise InputError(f"{place} is out of range; allowed are 1 to {len(answer.candidates)}", "--pick")
    if place == 1:
        answer = replace(answer, written=write)
    chosen = answer.candidates[place - 1].label
    files = [
        File("--write", write, lambda: answer.to_yaml(place - 1, name).encode(), f": {chosen}"),
        figures.file(plot, answer.figure),
    ]
    with kept() as signals:
        deliver(lambda: say.answer(answer, output, notes), files, force, signals)


def _refuse_beside_solve(unused: Mapping[str, object]) -> None:
    """Raise InputError where an option is given that --solve does not take; those of a file of defaults do not count.

    unused: the values of these options by name; one that is not given is false.
    """
    given = [option for option, value in unused.items() if value and not is_default(option)]
    if given:
        raise InputError(f"answers with one number: leave {listed(given, 'and')} out", "--solve")


def _check_alone(equal_state: str | None, place: int, name: str | None, write: str | None) -> None:
    """Raise InputError where an option is given without the one that it belongs to. place: the number of --pick."""
    from powerplan.dump import check_name

    if equal_state is not None:
        problem = f"says what --solve looks for; such as --solve window --equal-state {equal_state}"
        raise InputError(problem, "--equal-state")
    if place > 1 and write is None:
        raise InputError("says which candidate --write saves; such as --pick 2 --write model.yaml", "--pick")
    if name is not None and write is None:
        raise InputError("names the model that --write saves; such as --write model.yaml --name my-model", "--name")
    if name is not None:
        check_name(name, "--name")
