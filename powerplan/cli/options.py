"""The options and arguments that several commands share, and what they are read into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from powerplan.choices import LM_HEAD, Causal, Dtype, Form, Format
from powerplan.cli.completion import completer, device_names, family_names, mixer_words
from powerplan.dtypes import CACHE_BITS
from powerplan.errors import InputError, unknown_word
from powerplan.load import LoadedModel, is_config, known_names, load_model, load_text
from powerplan.mixers.formulas import Convention
from powerplan.textfiles import STDIN, is_json, read_stdin

if TYPE_CHECKING:
    from powerplan.lengths import Lengths


class Adds:
    """What marks an option that is a list: given more than once, it holds all its values."""


ADDS = Adds()


def name_argument(text: str, metavar: str, names: Callable[[], Iterable[str]] = known_names) -> Any:
    """Return a typer argument that takes one of `names`, by default of a model, or several."""
    return typer.Argument(metavar=metavar, help=text, autocompletion=completer(names))


Model = Annotated[
    str,
    name_argument(
        "A powerplan YAML, a Hugging Face config.json or its folder, a name in powerplan models; - is standard input.",
        "MODEL",
    ),
]
OptionalModel = Annotated[
    str | None,
    name_argument("The model, as for wsfr; without it ./model.yaml if that file exists, else gpt2-small.", "[MODEL]"),
]
DEFAULT_FILE, DEFAULT_MODEL = "model.yaml", "gpt2-small"
LikeOption = Annotated[
    str | None,
    typer.Option(
        metavar="FAMILY",
        help="Read a config.json as this family (powerplan models --families), whatever its model_type is.",
        autocompletion=completer(family_names),
    ),
]
MixerOption = Annotated[
    str | None,
    typer.Option(
        help="Put this mixer into every layer: attention, window:4096, power:p=2,gated=true, kda, mamba2 ...",
        autocompletion=mixer_words,
    ),
]


class UnknownChoice(typer.BadParameter):
    """A word that is not among the choices of an option. The message lists them as all messages of powerplan do."""

    def format_message(self) -> str:
        return f"{self.param.opts[0] if self.param else 'option'}: {self.message}"


def choice_option(choices: Any, text: str, *names: str) -> Any:
    """Return a typer option that takes one of the words of a Literal type.

    names: what the option is called, such as "--format"; the parameter's own name where left out.
    """
    words = get_args(choices)

    def parse(word: str) -> str:
        if word not in words:
            raise UnknownChoice(unknown_word(word, words))
        return word

    # The words stand in the text, where a narrow terminal breaks lines between them.
    metavar, text = ("WORD", f"{text} One of {', '.join(words)}.") if len(words) > 1 else (words[0], text)
    return typer.Option(*names, help=text, parser=parse, metavar=metavar, autocompletion=completer(lambda: words))


FormOption = Annotated[
    Form, choice_option(Form, "Count the state FLOPs in proportion to the state, or as a chunked kernel executes them.")
]
CausalOption = Annotated[
    Causal, choice_option(Causal, "Count the keys that a causal mask leaves, or the full context for every query.")
]
ExcludeOption = Annotated[list[str] | None, choice_option(Literal["lm-head"], "Leave this out of the weight FLOPs.")]
DtypeOption = Annotated[
    Dtype, choice_option(Dtype, "Number format of weights and key/value cache, but for weights that a file quantizes.")
]
WeightsDtypeOption = Annotated[
    Dtype | None, choice_option(Dtype, "Of all weights, whatever the model's file quantizes; --dtype if not given.")
]
CACHE_WORDS = (*CACHE_BITS, "int4:group=64", "fp8:group=128")
CacheDtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help=f"Of the key/value cache: {', '.join(CACHE_BITS)}; int4:group=64 counts scales too. --dtype if not given.",
        autocompletion=completer(lambda: CACHE_WORDS),
    ),
]
StateDtypeOption = Annotated[Dtype | None, choice_option(Dtype, "Of recurrent state; fp32 if not given.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="DEVICE",
        help="The device by its exact name, such as h100-sxm. powerplan hardware lists all.",
        autocompletion=completer(device_names),
    ),
]
PriceOption = Annotated[str | None, typer.Option(help="Money for an hour of one device, such as 2.50.")]
TokensOption = Annotated[
    str | None, typer.Option(help="Training tokens, such as 300B; 20 per active parameter if not given.")
]
MeasuredOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Plan with the measured times that powerplan profile --save wrote to this file."),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        metavar="LENGTHS",
        help="Documents of many lengths in sequences of --ctx tokens: a file with a length, or length,count, in each "
        "line (- is standard input); shares of documents such as 4k:0.9,64k:0.1; or a lognormal distribution, as "
        "docs/lengths.md has it.",
    ),
]
PlotOption = Annotated[
    str | None,
    typer.Option("--plot", metavar="FILE", help="Draw the answer too: .png, .svg or .pdf (needs matplotlib)."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
FormatOption = Annotated[
    Format, choice_option(Format, "How to print the result. JSON and CSV are never rounded.", "--format")
]


def convention(form: Form, causal: Causal, exclude: Sequence[str] | None) -> Convention:
    """Return the convention that --form, --causal and the words of --exclude describe."""
    return Convention(causal, form, lm_head=LM_HEAD not in (exclude or ()))


def as_family(model: str, like: str | None) -> str | LoadedModel:
    """Return MODEL, or what it holds: where --like says how to read it, and where it is "-", standard input."""
    if model == "-":
        return _from_stdin(read_stdin(), like)
    return model if like is None else load_model(model, like)


def _from_stdin(text: str, like: str | None) -> LoadedModel:
    """Return the model that standard input holds; its origin is how the command line names it."""
    return replace(load_text(text, STDIN, like), origin="-")


def as_families(models: Sequence[str], like: str | None) -> list[str | LoadedModel]:
    """Return MODELS, those that are a config.json read as --like says. InputError where none is and --like is given."""
    if models.count("-") > 1:
        raise InputError("- is there more than once, and standard input holds one model", "MODEL")
    if like is None or len(models) == 1:
        return [as_family(model, like) for model in models]
    stdin = read_stdin() if "-" in models else ""
    configs = [is_json(STDIN, stdin) if model == "-" else is_config(model) for model in models]
    if not any(configs):
        configs[0] = True  # Reading it raises the error that says what it is.
    return [
        _from_stdin(stdin, like if config else None) if model == "-" else as_family(model, like if config else None)
        for model, config in zip(models, configs, strict=True)
    ]


def as_lengths(lengths: str | None, models: Sequence[str], plot: str | None = None) -> str | Lengths | None:
    """Return what --lengths describes, or the documents on standard input where it is "-".

    Raises:
        InputError: a MODEL is "-" too, or there is a figure to draw, which shows whole sequences.
    """
    if lengths is not None and plot is not None:
        raise InputError("are not drawn: a figure shows whole sequences; leave --plot out", "--lengths")
    if lengths != "-":
        return lengths
    if "-" in models:
        raise InputError("- is there as MODEL too, and standard input holds one of them", "--lengths")
    from powerplan.lengths import read_file  # Most questions are of whole sequences.

    return read_file(STDIN)


def model_or_default(model: str | None) -> tuple[str, list[str]]:
    """Return MODEL, or ./model.yaml, or gpt2-small, and a note that says which was taken where none was given."""
    if model is not None:
        return model, []
    default = DEFAULT_FILE if Path(DEFAULT_FILE).is_file() else DEFAULT_MODEL
    return default, [f"no MODEL given: {default} assumed"]
