"""What all answers have in common: the formats they print in, and how their functions read a model and contexts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

from powerplan.errors import InputError, check_word, parameter, shown
from powerplan.load import ConfigObject, LoadedModel, load_model
from powerplan.report.render import Report, render
from powerplan.spec import ModelSpec
from powerplan.units import context_of, integer_of, parse_contexts, parse_integer, parse_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from powerplan.hardware import Device
    from powerplan.measured import MeasuredTimes

Parsed = TypeVar("Parsed")

LONGEST_TEXT = 5000
"""The most digits of an integer that becomes a text: Python writes up to 4,300."""

Model = str | Path | ModelSpec | LoadedModel | Mapping[str, Any] | ConfigObject
"""A catalogue name, a path as on the command line, a spec, what load_model returned, or a config: as a dict that holds
what a config.json or a powerplan YAML does, or an object of the transformers package."""

Whole = SupportsIndex | str
"""An integer of any type, numpy's among them, or its text."""

Contexts = Whole | Iterable[Whole]
"""Contexts in tokens: 65536, "64k", "1k,64k", or a list or an array of either."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Answer:
    """An answer, with its numbers as attributes, that prints as the command line prints it.

    notes: remarks on how the input was read; the command line prints them on stderr.
    """

    notes: tuple[str, ...] = ()

    @cached_property
    def report(self) -> Report:
        """The table, the text around it and the JSON."""
        return self._report()

    def _report(self) -> Report:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle keeps: all but the report, which has functions in it and is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "report"}

    def __repr__(self) -> str:
        """Return the class and the first line of the answer; all numbers of a training run would be a megabyte."""
        line = self.to_markdown().partition("\n")[0]
        return f"<{type(self).__name__}: {line}>"

    def __str__(self) -> str:
        """Return the table that the command line prints."""
        return render(self.report, "table")

    def to_dict(self) -> dict[str, Any]:
        """Return what --format json holds, with its schema."""
        result: dict[str, Any] = json.loads(self.to_json())
        return result

    def to_json(self) -> str:
        """Return the answer as JSON; its numbers are not rounded."""
        return render(self.report, "json")

    def to_csv(self) -> str:
        """Return the rows of the table as CSV; their numbers are not rounded."""
        return render(self.report, "csv")

    def to_markdown(self) -> str:
        """Return the table in markdown."""
        return render(self.report, "markdown")

    def _repr_markdown_(self) -> str:
        """Return what a notebook shows. Two spaces end a line of text; without them markdown would join the lines."""
        return re.sub(r"(?<=[^\n|])\n(?=[^\n|])", "  \n", self.to_markdown())


@dataclass(frozen=True, kw_only=True, repr=False)
class DrawnAnswer(Answer):
    """An answer that can be drawn too. matplotlib is an extra, and is imported only then."""

    def figure(self) -> Figure:
        """Return the answer as a figure of matplotlib, to be changed or shown; raises MachineError without matplotlib.

        A notebook shows it where it stands last in a cell, once `%matplotlib inline` has run.
        """
        raise NotImplementedError

    def plot(self, path: str | Path, *, force: bool = False) -> None:
        """Draw the answer into a file, as `--plot` does: .png, .svg or .pdf.

        Args:
            path: the file, which is written whole or not at all.
            force: whether a file that exists is overwritten.

        Raises:
            InputError: the suffix is another, the file exists and `force` is not set, or it cannot be written.
            MachineError: matplotlib is not installed, or the disk is full.
        """
        from powerplan.output import check_target, write_whole
        from powerplan.plots.figure import check_plot, figure_bytes, format_of

        file = str(path)
        check_plot(file, "path")
        if Path(file).is_file() and not force:
            raise InputError(f"{file} exists; force=True overwrites it", "path")
        check_target(file, force, "path")
        write_whole(file, figure_bytes(self.figure(), format_of(file)), force, "path")


def read_model(
    model: Model, mixer: str | None = None, contexts: Sequence[int] = (), *, trained: bool = False
) -> LoadedModel:
    """Return the model that a parameter `model` means, with `mixer` in every layer; raises InputError.

    Its notes say whether the `contexts` that are asked about, in tokens, go beyond those that it was trained for; of a
    model that is to be `trained`, beyond those that its RoPE was made for.
    """
    if isinstance(model, ModelSpec):
        loaded = LoadedModel(model, model.name)
    else:
        loaded = model if isinstance(model, LoadedModel) else load_model(model)
    spec, notes = loaded.spec, loaded.notes
    if mixer is not None:
        from powerplan.swap import with_mixer  # Imported where it is needed: cold start is shorter without it.

        spec, more = with_mixer(spec, mixer)
        notes = (*notes, *more)
    if contexts:
        from powerplan.report.parts import context_remark  # As above.

        remark = context_remark(spec, max(contexts), trained=trained)
        notes = (*notes, *([remark] if remark else []))
    return LoadedModel(spec, loaded.origin, notes)


def several_models(models: Model | Sequence[Model]) -> Sequence[Model]:
    """Return models; one of them as a list of one."""
    return [models] if isinstance(models, (str, Path, ModelSpec, LoadedModel, Mapping, ConfigObject)) else models


def named_notes(spec: ModelSpec, notes: Iterable[str]) -> list[str]:
    """Return the notes on one of several models, each with the model's name."""
    return [f"{spec.name}: {note}" for note in notes]


def check_choice(value: str | None, allowed: Sequence[str], name: str) -> None:
    """Raise InputError unless the parameter `name` is one of `allowed`, or None."""
    if value is not None:
        check_word(value, allowed, parameter(name))


def read_contexts(contexts: Contexts) -> list[int]:
    """Return contexts in tokens, in their order and without repeats; raises InputError where one is no context."""
    if isinstance(contexts, str):
        return parse_contexts(contexts, parameter("context"))
    several = several_of(contexts)
    if not several:
        raise InputError("is empty; give tokens, as 65536 or '64k'", parameter("context"))
    return list(dict.fromkeys(context_of(context, parameter("context")) for context in several))


def several_of(values: Any) -> list[Any]:
    """Return the elements of a list, an array or a tensor; anything else as the one element of a list."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    listed = isinstance(plain, Iterable) and not isinstance(plain, str | bytes)
    return list(plain) if listed else [plain]


def text_of(value: object) -> str:
    """Return a number or a text as the text that the command line has for it; integers may be of any type."""
    number = integer_of(value)
    return str(value) if number is None else shown(number, LONGEST_TEXT)


def list_text(values: object) -> str:
    """Return integers as the text that the command line has for them: "1,8,64" for one, a text, a list or an array."""
    return ",".join(map(text_of, several_of(values)))


def read_ratio(target: str | float) -> Fraction:
    """Return a weight-state FLOP ratio that is given as "3:1" or 3; raises InputError for one that is none."""
    return parse_ratio(target if isinstance(target, str) else f"{text_of(target)}:1", parameter("target"))


def read_devices(devices: Whole) -> int:
    """Return a number of devices; raises InputError for one that is out of range."""
    return parse_integer(text_of(devices), parameter("devices"), 1, 10**7)


def read_device(gpu: str | Device | None) -> Device | None:
    """Return the device that a parameter `gpu` names; raises InputError where none is called so."""
    from powerplan.hardware import Device, find_device

    return gpu if isinstance(gpu, Device | None) else find_device(str(gpu))


def read_measured(measured: str | Path | MeasuredTimes | None) -> MeasuredTimes | None:
    """Return the times in the file that a parameter `measured` names; raises InputError where it is no profile."""
    from powerplan.measured import MeasuredTimes, read_profile  # Most commands need no times.

    if isinstance(measured, MeasuredTimes | None):
        return measured
    return read_profile(str(measured), parameter("measured"))


def refuse_measured_documents(lengths: object, profile: MeasuredTimes | None) -> None:
    """Raise InputError where there are documents of many lengths and measured times, which are of whole contexts."""
    if lengths is not None and profile is not None:
        problem = f"have no measured times: {parameter('measured')} is of whole contexts"
        raise InputError(problem, parameter("lengths"))


def optional(parse: Callable[..., Parsed], name: str, value: object, *more: str) -> Parsed | None:
    """Return what `parse` makes of the parameter `name`; None where it is not given."""
    return None if value is None else parse(text_of(value), parameter(name), *more)
