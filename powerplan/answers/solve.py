"""Reverse questions: which context, window or degree gives a ratio, or holds as much as another mixer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args, overload

from powerplan.answers.base import Answer, Model, Whole, check_choice, read_model, read_ratio
from powerplan.choices import Unknown
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError, parameter
from powerplan.mixers.formulas import Convention, convention_of
from powerplan.report.equal_state import equal_state_report
from powerplan.report.render import Report
from powerplan.report.solve import solve_report
from powerplan.search import EqualState, Solution
from powerplan.search import equal_state as search_equal_state
from powerplan.search import solve as search_ratio
from powerplan.swap import parse_swap
from powerplan.units import context_of


@dataclass(frozen=True, kw_only=True, repr=False)
class SolveAnswer(Answer):
    """The largest context, window or degree that keeps a ratio.

    solution: the value, and the numbers there and at the next one.
    name, context, target: the model, the tokens and the ratio that were asked about.
    """

    solution: Solution
    name: str
    context: int
    target: Fraction

    @property
    def value(self) -> int:
        """The context, the window (both in tokens) or the degree."""
        return self.solution.value

    def _report(self) -> Report:
        return solve_report(self.solution, self.name, self.context, self.target)


@dataclass(frozen=True, kw_only=True, repr=False)
class EqualStateAnswer(Answer):
    """The largest context, window or degree that holds no more than another mixer in every layer.

    solution: the value, and what the other mixer, the value and the next one hold.
    name, context, dtypes: the model, the tokens and the number formats that were asked about.
    """

    solution: EqualState
    name: str
    context: int
    dtypes: Dtypes

    @property
    def value(self) -> int:
        """The context, the window (both in tokens) or the degree."""
        return self.solution.value

    def _report(self) -> Report:
        return equal_state_report(self.solution, self.name, self.context, self.dtypes)


@overload
def solve(
    model: Model,
    unknown: Unknown,
    context: Whole = "64k",
    *,
    target: str | float | None = None,
    equal_state: None = None,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> SolveAnswer: ...


@overload
def solve(
    model: Model,
    unknown: Unknown,
    context: Whole = "64k",
    *,
    target: str | float | None = None,
    equal_state: str,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> EqualStateAnswer: ...


def solve(
    model: Model,
    unknown: Unknown,
    context: Whole = "64k",
    *,
    target: str | float | None = None,
    equal_state: str | None = None,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> SolveAnswer | EqualStateAnswer:
    """Return the largest context, window or degree that keeps a ratio, as `powerplan recommend --solve` prints it.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, a spec, or a config (as load_model takes it).
        unknown: "context", "window" or "p", of every layer.
        context: tokens at which windows and degrees are judged.
        target: the weight-state FLOP ratio to keep, as "3:1" or 3; 1:1 where None.
        equal_state: in place of a ratio, a mixer such as "power:p=2": the answer holds no more of a sequence than that
            mixer in every layer. Elements are compared, of keys and values with those of recurrent state, the
            normaliser left out.
        mixer, convention, dtype, weights_dtype, cache_dtype, state_dtype: as for recommend.

    Raises:
        InputError: an argument cannot be used, or the question does not fit the model.
        InfeasibleError: no value gives the ratio, or holds as little.

    Examples:
        >>> solve("gpt2-small", "context").value
        13403
        >>> solve("gpt2-small", "window", equal_state="power:p=2").value
        1040
    """
    check_choice(unknown, get_args(Unknown), "unknown")
    at, ratio = context_of(context, parameter("context")), read_ratio("1:1" if target is None else target)
    if equal_state is not None and target is not None:
        raise InputError(
            f"asks for a state, and {parameter('target')} for a ratio; leave one out", parameter("equal_state")
        )
    loaded = read_model(model, mixer)
    dtypes, convention = Dtypes(dtype, weights_dtype, cache_dtype, state_dtype), convention_of(convention)
    name = loaded.spec.name
    if equal_state is None:
        solution = search_ratio(loaded.spec, unknown, at, ratio, convention, dtypes)
        return SolveAnswer(solution=solution, name=name, context=at, target=ratio, notes=loaded.notes)
    with _told_of_equal_state():
        swap = parse_swap(equal_state)
        found = search_equal_state(loaded.spec, unknown, at, swap, convention, dtypes)
    notes = tuple(dict.fromkeys((*loaded.notes, *found.remarks)))
    return EqualStateAnswer(solution=found, name=name, context=at, dtypes=dtypes, notes=notes)


@contextmanager
def _told_of_equal_state() -> Iterator[None]:
    """Let messages about a mixer inside a `with` block name `equal_state`."""
    try:
        yield
    except InputError as error:
        mixer, where = parameter("mixer"), error.where or ""
        if where.partition(" ")[0] != mixer:
            raise
        raise InputError(error.problem, parameter("equal_state") + where.removeprefix(mixer)) from None
