"""What all commands share: options of the output, options that are given more than once, the panels of their help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from powerplan.cli import say
from powerplan.cli.defaults import take_defaults, using
from powerplan.cli.help import ORDER, PANELS
from powerplan.cli.options import ADDS, ForceOption
from powerplan.errors import InputError, listed

Function = Callable[..., None]

QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No notes on stderr; errors stay.")]
NO_COLOR = Annotated[bool, typer.Option("--no-color", help="Plain text, as with NO_COLOR=1.")]
JSON = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
OUTPUT = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the result to this file; - is standard output."),
]

FORMAT = "output"
"""The parameter of --format, in the functions of commands."""

ADDED = frozenset({"json_", "output_file", "quiet", "no_color"})
"""Parameters that no function of a command has."""


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a command by name: those of its function, and those that all commands share.

    hints: their types, with what typer is told of them. defaults: their defaults. context: the one that is typer's
    context. single: options that typer gets as lists, to see each value that was given. adds: those of them whose
    values add up. lists: all that hold several values. words: what those may be that are one of some words.
    """

    hints: Mapping[str, Any]
    defaults: Mapping[str, Any]
    context: str
    single: Set[str]
    adds: Set[str]
    lists: Set[str]
    words: Mapping[str, tuple[str, ...]]


def prepared(function: Function, commands: Collection[str]) -> Function:
    """Return the function of a command with what all commands share: options, and the defaults of a file.

    An option of one value may not be given twice, and those of one that is marked with ADDS become one list. A function
    that has an option -o itself gets no other.

    commands: the names of all commands.
    """
    own = inspect.signature(function).parameters
    shape = _parameters_of(function)

    def called(**values: Any) -> None:
        context: typer.Context = values[shape.context]
        names = {str(parameter.name): parameter.opts[0] for parameter in context.command.params}
        for name in shape.single - shape.adds:
            if len(values[name] or ()) > 1:
                raise InputError(f"takes one value, and got {listed(values[name], 'and')}", names[name])
        taken = take_defaults(context, commands, values, shape.words, shape.lists)
        for name in shape.single:
            values[name] = _joined(values[name]) if values[name] else None
        if values.get("json_"):
            _check_json(context, values[FORMAT])
            values[FORMAT] = "json"
        quiet = bool(values["quiet"] or (context.obj or {}).get("quiet"))
        with say.asked(quiet=quiet), using(taken), _written(values, names):
            function(**{name: value for name, value in values.items() if name in own})

    parameters = sorted(
        (_parameter(name, shape) for name in shape.hints),
        key=lambda parameter: ORDER.index(PANELS.get(parameter.name)),
    )
    called.__name__, called.__doc__ = function.__name__, function.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _parameters_of(function: Function) -> _Parameters:
    own = inspect.signature(function).parameters
    every = get_type_hints(function, include_extras=True)
    hints: dict[str, Any] = {name: every[name] for name in own}
    defaults: dict[str, Any] = {name: parameter.default for name, parameter in own.items()}
    if not any("-o" in _spellings(hint) for hint in hints.values()):
        hints, defaults = {**hints, "output_file": OUTPUT}, {**defaults, "output_file": None}
        if "force" not in own:
            hints["force"] = ForceOption
    if FORMAT in own:
        hints["json_"] = JSON
    hints |= {"quiet": QUIET, "no_color": NO_COLOR}
    context = next((name for name, hint in hints.items() if hint is typer.Context), "context_")
    hints[context] = typer.Context
    adds = {name for name, hint in hints.items() if ADDS in getattr(hint, "__metadata__", ())}
    kinds = {name: _kinds(hint) for name, hint in hints.items()}
    return _Parameters(
        hints,
        {name: defaults.get(name, inspect.Parameter.empty if name == context else False) for name in hints},
        context,
        {name for name, hint in hints.items() if _takes_one_value(hint)},
        adds,
        adds | {name for name, own in kinds.items() if any(get_origin(kind) is list for kind in own)},
        {name: get_args(kind) for name, own in kinds.items() for kind in own if get_origin(kind) is Literal},
    )


def _parameter(name: str, shape: _Parameters) -> inspect.Parameter:
    """Return a parameter as typer is to see it: in its panel, with a word for its value."""
    hint, default = shape.hints[name], shape.defaults[name]
    info = copy(_info(hint))
    if info is not None:
        info.rich_help_panel = None if isinstance(info, ArgumentInfo) else PANELS.get(name)
        kind = get_args(hint)[0]
        if name in shape.single:
            kind, default = list[str] | None, default if default is None else [default]
            info.metavar = info.metavar or ("LIST" if name in shape.adds else "VALUE")
        hint = Annotated[kind, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _info(hint: Any) -> Any:
    """Return what typer knows of a parameter beside its type: its option or argument; None for another parameter."""
    return next((own for own in getattr(hint, "__metadata__", ()) if hasattr(own, "param_decls")), None)


def _spellings(hint: Any) -> tuple[str, ...]:
    """Return the names that an option is given, where these are not made from its parameter's name."""
    info = _info(hint)
    if info is None:
        return ()
    # In an Annotated, typer takes the first of them for a default.
    return tuple(name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str))


def _takes_one_value(hint: Any) -> bool:
    """Whether a parameter is an option with a value that is no list."""
    info = _info(hint)
    if info is None or not isinstance(info, type(_info(ForceOption))):
        return False
    return not {bool, list} & {get_origin(kind) or kind for kind in _kinds(hint)}


def _kinds(hint: Any) -> list[Any]:
    """Return the types that the values of a parameter may have."""
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return (
        [kind for kind in get_args(inner) if kind is not NoneType]
        if get_origin(inner) in (Union, UnionType)
        else [inner]
    )


def _joined(values: Sequence[str]) -> str:
    """Return the values of an option as one list. "65" and "536" become "65, 536": "65,536" could be one number."""
    return (", " if any(re.fullmatch("[0-9,]+", value) for value in values) else ",").join(values)


def _check_json(context: typer.Context, form: str) -> None:
    given = context.get_parameter_source(FORMAT)
    if given is not None and given.name == "COMMANDLINE" and form != "json":
        raise InputError(f"is --format json, and there is --format {form} too; leave one out", "--json")


@contextmanager
def _written(values: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[None]:
    """Write what is printed inside a `with` block to the file of --output, if there is one, and say so.

    Also where the block ends in an error: what an interrupted profile has measured is an answer.
    """
    path = values.get("output_file")
    if path is None or path == "-":
        yield
        return
    from powerplan.cli.files import File, deliver
    from powerplan.cli.interrupts import kept
    from powerplan.load import model_file
    from powerplan.output import check_targets
    from powerplan.report.width import terminal

    others = ("write", "plot", "save")
    targets = {"--output": path} | {names[name]: values.get(name) for name in others if name in names}
    models = values.get("models") or [values.get("model")]
    inputs = {"MODEL" if len(models) == 1 else f"MODEL {name}": model_file(name) for name in models if name is not None}
    inputs |= {names[name]: values.get(name) for name in ("measured", "lengths", "show") if name in names}
    force = bool(values.get("force"))
    check_targets(targets, force, inputs)
    text: list[str] = []
    try:
        with terminal(None), say.asked(into=text):
            yield
    finally:
        if text:
            with kept() as signals:
                file = File("--output", path, lambda: "".join(text).encode(errors="backslashreplace"))
                deliver(lambda: None, [file], force, signals)
