"""`powerplan models` and `powerplan hardware`: what is built in."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.accounting import Accounting
from powerplan.cli import say
from powerplan.cli.options import FormatOption, MixerOption, completer, model_argument
from powerplan.errors import InputError
from powerplan.hardware import devices, find_device


def models(
    model: Annotated[
        str | None, model_argument("One model, as for wsfr; without it the table of all built-in models.", "[MODEL]")
    ] = None,
    mixer: MixerOption = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print the model as a powerplan YAML, ready to edit.")] = False,
    output: FormatOption = "table",
) -> None:
    """The built-in models, one model in detail, or any model as a YAML to edit."""
    from powerplan.answers.base import read_model
    from powerplan.dump import spec_to_yaml
    from powerplan.load import catalogue_names, catalogue_spec
    from powerplan.report.catalogue import model_report, models_report

    if model is None:
        if yaml or mixer is not None:
            option = "--yaml" if yaml else f"--mixer {mixer}"
            raise InputError(f"{option.split()[0]} is for one model; such as powerplan models gpt2-small {option}")
        say.show(models_report([Accounting(catalogue_spec(name)) for name in catalogue_names()]), output)
        return
    if yaml and output != "table":
        raise InputError("--yaml is a format itself; leave --format out")
    loaded = read_model(model, mixer)
    spec = loaded.spec
    for note in loaded.notes:
        say.note(note)
    if yaml:
        say.text(spec_to_yaml(spec))
    else:
        say.show(model_report(Accounting(spec)), output)


def hardware(
    device: Annotated[
        str | None,
        typer.Argument(
            metavar="[DEVICE]",
            help="The exact name or alias of one device, such as h100-sxm; without it the table of all devices.",
            autocompletion=completer(devices),
        ),
    ] = None,
    output: FormatOption = "table",
) -> None:
    """Peak rates of the devices that powerplan knows, each with its unit and source."""
    from powerplan.report.catalogue import device_report, devices_report

    say.show(devices_report(list(devices().values())) if device is None else device_report(find_device(device)), output)
