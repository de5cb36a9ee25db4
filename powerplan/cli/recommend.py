"""`powerplan recommend`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import (
    Causal,
    CausalOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    Excluded,
    Form,
    FormatOption,
    FormOption,
    MeasuredOption,
    MixerOption,
    OptionalModel,
    choice_option,
    convention_of,
    read_model_or_default,
)
from powerplan.report.render import Format

if TYPE_CHECKING:
    from fractions import Fraction

    from powerplan.mixers import Convention
    from powerplan.report.render import Report
    from powerplan.spec import ModelSpec

DEFAULT_CONTEXT = "64k"
TOP = "6"


class Keep(StrEnum):
    weights = "weights"
    flops = "flops"


class Side(StrEnum):
    weights = "weights"
    state = "state"


class Unknown(StrEnum):
    context = "context"
    window = "window"
    p = "p"


def recommend(
    model: OptionalModel = None,
    ctx: Annotated[
        str | None,
        typer.Option(help="Contexts in tokens, 64k where not given; of a list, the worst counts."),
    ] = None,
    target: Annotated[str, typer.Option(help="Weight to state FLOPs: 1:1, 3:1, 1:2.")] = "1:1",
    max_state: Annotated[
        str | None, typer.Option("--max-state", help="State per sequence at most, such as 512MiB.", show_default=False)
    ] = None,
    max_decode_bytes: Annotated[
        str | None,
        typer.Option(
            "--max-decode-bytes",
            help="Bytes moved per decoded token at most, weights and state, at batch 1.",
            show_default=False,
        ),
    ] = None,
    flops: Annotated[str | None, typer.Option(help="Training FLOPs in all, such as 1e21.", show_default=False)] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens that --flops must pay for, such as 10B.", show_default=False)
    ] = None,
    hardware: DeviceOption = None,
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices whose memory counts together.")] = "1",
    keep: Annotated[
        Keep, choice_option(Keep, "The same weights, or width and depth resized to the same FLOPs per token.")
    ] = Keep.weights,
    only: Annotated[
        str | None,
        typer.Option(
            help="Kinds to use: attention, window, linear, power, mla, mix; kda, mamba2 ... where named.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Kinds, or lm-head, to leave out.", show_default=False)] = None,
    weights_vs_state: Annotated[
        Side | None,
        choice_option(Side, "Which side should be the heavier one, where one must be.", "--weights-vs-state"),
    ] = None,
    solve: Annotated[
        Unknown | None, choice_option(Unknown, "Ask the other way round: which context, window or p has the target?")
    ] = None,
    mixer: MixerOption = None,
    measured: MeasuredOption = None,
    top: Annotated[str, typer.Option(metavar="INTEGER", help="Sorts of candidates to show.")] = TOP,
    pick: Annotated[str, typer.Option(metavar="INTEGER", help="Which candidate --write saves, by its number.")] = "1",
    write: Annotated[
        str | None, typer.Option(metavar="FILE", help="Save the recommended model as YAML.", show_default=False)
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw WSFR over context: .png, .svg or .pdf.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    form: FormOption = Form.recurrent,
    causal: CausalOption = Causal.exact,
    dtype: DtypeOption = Dtype.bf16,
    output: FormatOption = Format.table,
) -> None:
    """What to train: the window, degree, heads or layer mix that balances a model at a context, and why."""
    from powerplan.dump import spec_to_yaml
    from powerplan.errors import InputError
    from powerplan.hardware import find_device
    from powerplan.measured import read_profile
    from powerplan.output import check_target, write_whole
    from powerplan.plots import check_format, wsfr_plot
    from powerplan.report.recommend import recommend_report
    from powerplan.search import Limits, Request
    from powerplan.search import recommend as search
    from powerplan.units import parse_bytes, parse_contexts, parse_count, parse_integer, parse_ratio

    contexts = parse_contexts(ctx or DEFAULT_CONTEXT, "--ctx")
    ratio = parse_ratio(target, "--target")
    count = parse_integer(devices, "--devices", 1, 10**7)
    place, shown = parse_integer(pick, "--pick", 1, 1000), parse_integer(top, "--top", 1, 1000)
    kinds, excluded = _kinds(only, "--only", []), _kinds(exclude, "--exclude", [LM_HEAD])
    head = [Excluded.lm_head] if LM_HEAD in excluded else None
    limits = Limits(
        max_state=parse_bytes(max_state, "--max-state") if max_state is not None else None,
        max_decode=parse_bytes(max_decode_bytes, "--max-decode-bytes") if max_decode_bytes is not None else None,
        flops=parse_count(flops, "--flops", "a count of FLOPs") if flops is not None else None,
        tokens=parse_count(tokens, "--tokens", "a count of tokens") if tokens is not None else None,
        device=find_device(hardware) if hardware is not None else None,
        devices=count,
    )
    for path, option in ((write, "--write"), (plot, "--plot")):
        if path is not None:
            check_target(path, force, option)
    if plot is not None:
        check_format(plot, "--plot")
    convention = convention_of(form, causal, head)
    spec, notes = read_model_or_default(model, mixer)
    if ctx is None and solve is not Unknown.context:
        notes.append(f"no --ctx given: {DEFAULT_CONTEXT} assumed")
    if solve is not None:
        unused = {
            "--max-state": max_state,
            "--max-decode-bytes": max_decode_bytes,
            "--flops": flops,
            "--tokens": tokens,
            "--hardware": hardware,
            "--devices": count > 1,
            "--keep": keep is not Keep.weights,
            "--only": only,
            "kinds of --exclude": set(excluded) - {LM_HEAD},
            "--weights-vs-state": weights_vs_state,
            "--measured": measured,
            "--top": top != TOP,
            "--pick": place > 1,
            "--write": write,
            "--plot": plot,
            "lists of contexts": len(contexts) > 1,
        }
        given = [option for option, value in unused.items() if value]
        if given:
            out = " and ".join(filter(None, (", ".join(given[:-1]), given[-1])))
            raise InputError(f"answers with one number: leave {out} out", "--solve")
        _narrate(notes)
        say.show(_solved(spec, solve, contexts[0], ratio, convention, dtype), output)
        return
    if place > 1 and write is None:
        raise InputError("says which candidate --write saves; such as --pick 2 --write model.yaml", "--pick")
    profile = read_profile(measured) if measured is not None else None
    request = Request(
        contexts=contexts,
        target=ratio,
        limits=limits,
        only=kinds,
        exclude=[item for item in excluded if item != LM_HEAD],
        prefer=weights_vs_state.value if weights_vs_state else None,
        keep=keep.value,
        convention=convention,
        dtype=dtype.value,
        profile=profile,
        top=shown,
    )
    answer = search(spec, request)
    if place > len(answer.candidates):
        raise InputError(f"{place} is out of range; there are {len(answer.candidates)} candidates", "--pick")
    report = recommend_report(answer)
    if profile is not None and answer.recommended.times is None:
        notes.append(f"{profile.label}: no device of the catalogue and no rates of it, so times need --hardware")
    elif profile is not None and limits.device is not None and (remark := profile.elsewhere(limits.device.name)):
        notes.append(remark)
    _narrate(notes)
    say.show(report, output)
    chosen = answer.candidates[place - 1]
    if write is not None:
        write_whole(write, spec_to_yaml(chosen.spec).encode(), force, "--write")
        say.note(f"wrote {write}: {chosen.label}")
    if plot is not None:
        write_whole(plot, wsfr_plot(answer, check_format(plot, "--plot")), force, "--plot")
        say.note(f"wrote {plot}")


def _narrate(notes: list[str]) -> None:
    for remark in notes:
        say.note(remark)


LM_HEAD = Excluded.lm_head.value


def _kinds(text: str | None, option: str, more: list[str]) -> list[str]:
    """Return the kinds of a list such as "power,window"; raises InputError for one that is not known."""
    from powerplan.errors import InputError, allowed_values, shown
    from powerplan.search import SELECTABLE

    words = [word.strip() for word in text.split(",")] if text is not None else []
    for word in words:
        if word not in (*SELECTABLE, *more):
            raise InputError(f"{shown(word)} is not known{allowed_values(word, [*SELECTABLE, *more])}", option)
    return sorted(set(words))


def _solved(
    spec: ModelSpec, unknown: Unknown, context: int, target: Fraction, convention: Convention, dtype: Dtype
) -> Report:
    from powerplan.report.recommend import solve_report
    from powerplan.search import solve

    solution = solve(spec, unknown.value, context, target, convention, dtype.value)
    return solve_report(solution, spec.name, context, target)
