"""Options and arguments that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerplan.report.render import Format

if TYPE_CHECKING:
    from powerplan.mixers.base import Convention
    from powerplan.spec import ModelSpec


def complete_model(incomplete: str) -> list[str]:
    """Return the catalogue names and aliases that begin with what has been typed."""
    from powerplan.load import known_names

    return [name for name in known_names() if name.startswith(incomplete.lower())]


def complete_device(incomplete: str) -> list[str]:
    """Return the device names that begin with what has been typed."""
    from powerplan.hardware import devices

    return [name for name in devices() if name.startswith(incomplete.lower())]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A powerplan YAML, a Hugging Face config.json or its folder, or a catalogue name (powerplan models).",
        autocompletion=complete_model,
        show_default=False,
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="As for wsfr; ./model.yaml where left out, or gpt2-small.",
        autocompletion=complete_model,
        show_default=False,
    ),
]
DEFAULT_FILE, DEFAULT_MODEL = "model.yaml", "gpt2-small"
MixerOption = Annotated[
    str | None,
    typer.Option(
        "--mixer",
        help="What if every sequence mixer were this: attention, window:4096, power:p=2,gated=true, kda, mamba2 ...",
    ),
]


class Form(StrEnum):
    recurrent = "recurrent"
    chunked = "chunked"


class Causal(StrEnum):
    exact = "exact"
    full = "full"


class Excluded(StrEnum):
    lm_head = "lm-head"


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"
    int4 = "int4"


FormOption = Annotated[Form, typer.Option(help="Cost in proportion to the state, or as a chunked kernel executes it.")]
CausalOption = Annotated[Causal, typer.Option(help="Count the keys that a causal mask leaves, or the full context.")]
ExcludeOption = Annotated[list[Excluded] | None, typer.Option(help="Leave this out of the weight FLOPs.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Weights and key/value cache; recurrent state is fp32 always.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        "--hardware",
        metavar="DEVICE",
        help="A device by its exact name, such as h100-sxm (powerplan hardware).",
        autocompletion=complete_device,
        show_default=False,
    ),
]
MeasuredOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="What powerplan profile --save wrote: measured times of mixers in place of estimates.",
        show_default=False,
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the result; JSON is never rounded.")]


def convention_of(form: Form, causal: Causal, exclude: list[Excluded] | None) -> Convention:
    """Return the convention that --form, --causal and --exclude name."""
    from powerplan.mixers.base import Convention

    return Convention(causal.value, form.value, Excluded.lm_head not in (exclude or []))


def read_model(model: str, mixer: str | None) -> tuple[ModelSpec, list[str]]:
    """Return the spec that MODEL and --mixer mean, and remarks for the user."""
    from powerplan.load import load_model
    from powerplan.swap import with_mixer

    loaded = load_model(model)
    if mixer is None:
        return loaded.spec, list(loaded.notes)
    spec, remarks = with_mixer(loaded.spec, mixer)
    return spec, [*loaded.notes, *remarks]


def read_model_or_default(model: str | None, mixer: str | None) -> tuple[ModelSpec, list[str]]:
    """Return the spec of MODEL, of ./model.yaml or of gpt2-small, and remarks that say which."""
    if model is not None:
        return read_model(model, mixer)
    found = DEFAULT_FILE if Path(DEFAULT_FILE).is_file() else DEFAULT_MODEL
    spec, notes = read_model(found, mixer)
    return spec, [f"no MODEL given: {found} assumed", *notes]
