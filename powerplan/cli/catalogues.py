"""The commands that print what is built in or installed: models, hardware, dims, reproduce, doctor, schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from powerplan.accounting import Accounting
from powerplan.cli import say
from powerplan.cli.completion import completer, device_names, list_completer, state_kinds
from powerplan.cli.defaults import is_default
from powerplan.cli.options import ADDS, FormatOption, LikeOption, MixerOption, as_family, name_argument
from powerplan.errors import InputError
from powerplan.load import known_names


def models(
    model: Annotated[
        str | None, name_argument("One model, as for wsfr; without it the table of all built-in models.", "[MODEL]")
    ] = None,
    like: LikeOption = None,
    mixer: MixerOption = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print the model as a powerplan YAML, ready to edit.")] = False,
    name: Annotated[
        str | None, typer.Option(help="The name in that YAML, for --yaml: letters, digits and . _ -.")
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="List the model_type values of a config.json that are read.")
    ] = False,
    output: FormatOption = "table",
) -> None:
    """The built-in models, one model in detail, or any model as a YAML to edit."""
    from powerplan.answers.base import read_model
    from powerplan.dump import check_name, short_name, spec_to_yaml
    from powerplan.load import catalogue_names, catalogue_spec
    from powerplan.report.catalogue import model_report, models_report

    if name is not None and (not yaml or model is None):
        such = f"powerplan models {model or 'gpt2-small'} --yaml --name {name or 'mine'}"
        raise InputError(f"names the model that --yaml prints; such as {such}", "--name")
    if families:
        from powerplan.huggingface.listing import listed_families
        from powerplan.report.catalogue import families_report

        if model is not None or yaml or mixer is not None or like is not None:
            raise InputError("lists what is read; leave the other options and MODEL out", "--families")
        say.show(families_report(listed_families()), output)
        return
    if model is None:
        if like is not None:
            raise InputError("is for a config.json, and there is no MODEL", "--like")
        if yaml or mixer is not None:
            option, value = ("--yaml", "") if yaml else ("--mixer", f" {mixer}")
            raise InputError(f"is for one model; such as powerplan models gpt2-small {option}{value}", option)
        say.show(models_report([Accounting(catalogue_spec(name)) for name in catalogue_names()]), output)
        return
    if yaml and output != "table":
        raise InputError("is a format itself; leave --format out", "--yaml")
    loaded = read_model(as_family(model, like), mixer)
    spec = loaded.spec
    for note in loaded.notes:
        say.note(note)
    if yaml:
        default = spec.name if mixer is None else short_name(spec.name)
        say.text(spec_to_yaml(spec, default if name is None else check_name(name, "--name")))
    else:
        say.show(model_report(Accounting(spec)), output)


def hardware(
    device: Annotated[
        str | None,
        name_argument(
            "A name or alias, such as h100-sxm; without it the table of all devices.", "[DEVICE]", device_names
        ),
    ] = None,
    output: FormatOption = "table",
) -> None:
    """Peak rates of the devices that powerplan knows, each with its unit and source."""
    from powerplan.hardware import devices, find_device
    from powerplan.report.catalogue import device_report, devices_report

    say.show(devices_report(list(devices().values())) if device is None else device_report(find_device(device)), output)


def dims(
    head_dim: Annotated[
        str | None, typer.Option(help="Head dims: 64, or a list such as 32,64,128; 64 if not given."), ADDS
    ] = None,
    p: Annotated[
        str | None,
        typer.Option("--p", help="Degrees: 2, or a list such as 2,3,4; 1 to 6 if not given, 1 to 4 with --model."),
        ADDS,
    ] = None,
    tile: Annotated[
        str | None, typer.Option(metavar="INTEGER", help="Features in a tile of the tiled embedding; 8 if not given.")
    ] = None,
    v_head_dim: Annotated[
        str | None, typer.Option(metavar="INTEGER", help="Value head dim; the head dim if not given.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Compare the states of these mixers with power attention's: kda,mamba2 or all.",
            autocompletion=list_completer(state_kinds),
        ),
        ADDS,
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What this model carries with each degree, in its own heads: state, window, FLOPs, WSFR.",
            autocompletion=completer(known_names),
        ),
    ] = None,
    ctx: Annotated[
        str | None, typer.Option(help="Context in tokens at which --model is counted, such as 65536; 64k if not given.")
    ] = None,
    like: LikeOption = None,
    output: FormatOption = "table",
) -> None:
    """Dimensions of the power embeddings, their state and kernels; what a model (--model) carries with each degree."""
    from powerplan.mixers.power import MAX_DEGREE
    from powerplan.report.dims import dims_report, states_report
    from powerplan.units import parse_context, parse_integer, parse_integers

    degrees = parse_integers(
        p if p is not None else "1,2,3,4,5,6" if model is None else "1,2,3,4", "--p", 1, MAX_DEGREE
    )
    width = parse_integer("8" if tile is None else tile, "--tile", 1, 4096)
    if model is not None:
        from powerplan.answers.degrees import degrees as degrees_of

        for option, value in (("--head-dim", head_dim), ("--v-head-dim", v_head_dim), ("--kind", kind)):
            if value is not None:
                raise InputError("has no place beside --model, whose own heads are taken; leave one out", option)
        context = parse_context("64k" if ctx is None else ctx, "--ctx")
        say.answer(degrees_of(as_family(model, like), context, p=degrees, tile=width), output)
        return
    for option, value in (("--ctx", ctx), ("--like", like)):
        if value is not None:
            raise InputError("is for a model; such as --model llama-3-8b", option)
    head_dims = parse_integers("64" if head_dim is None else head_dim, "--head-dim", 1, 65536)
    values = None if v_head_dim is None else parse_integer(v_head_dim, "--v-head-dim", 1, 65536)
    if kind is None:
        say.show(dims_report(head_dims, degrees, width, values), output)
    else:
        if tile is not None and not is_default("--tile"):
            raise InputError("has no place beside --kind, as a state has no tiles; leave one out", "--tile")
        say.show(states_report(head_dims, degrees, values, kind), output)


def set_names() -> list[str]:
    """Return what `reproduce` takes: the names of sets of figures, and "all"."""
    from powerplan.reproduce import ALL, figure_sets

    return [*figure_sets(), ALL]


def reproduce(
    name: Annotated[
        str,
        name_argument(
            "table2, table3, figure2, table4, power-speed, kimi, hybrids, field, training, training-time, or all.",
            "[NAME]",
            set_names,
        ),
    ] = "all",
    output: FormatOption = "table",
) -> None:
    """Published figures beside what powerplan computes under each named convention, with the gap and its reason."""
    from powerplan.report.reproduce import reproduce_report
    from powerplan.reproduce import reproduce as compare

    say.show(reproduce_report(compare(name)), output)


def doctor(output: FormatOption = "table") -> None:
    """What this machine has: Python, processor, memory, torch, Triton and accelerators."""
    from powerplan.cli.app import COMMANDS
    from powerplan.doctor import examine
    from powerplan.report.catalogue import doctor_report

    say.show(doctor_report(examine(list(COMMANDS))), output)


def schema() -> None:
    """The JSON schema of a powerplan YAML, for editors and validators."""
    from powerplan.schema import spec_schema

    say.text(json.dumps(spec_schema(), indent=2))
