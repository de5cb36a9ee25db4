"""The command line that asks what a call of a library function asks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from powerplan.answers.base import Model, list_text, text_of
from powerplan.choices import LM_HEAD
from powerplan.hardware import Device
from powerplan.lists import split_words
from powerplan.load import ConfigObject, LoadedModel
from powerplan.measured import MeasuredTimes
from powerplan.mixers.formulas import Convention
from powerplan.spec import ModelSpec
from powerplan.units import context_text

_OPTIONS = {"prefer": "--weights-vs-state"}
"""Options that are not called as the parameter is."""


def command_of(function: Callable[..., Any], given: Mapping[str, Any], contexts: list[int]) -> tuple[str, ...]:
    """Return the words of the command line of a function's name, with the parameters that are not as by default.

    given: the parameters by name, with "model" among them; `top` is left out. contexts: "context" in tokens.
    """
    model = given["model"]
    words = ["powerplan", function.__name__, _model_text(model), "--ctx", ",".join(map(context_text, contexts))]
    if isinstance(model, LoadedModel) and model.like is not None:
        words += ["--like", model.like]
    for name, parameter in inspect.signature(function).parameters.items():
        value = given[name]
        if name not in ("model", "context", "top", "convention") and str(value) not in (
            "None",
            "()",
            "[]",
            str(parameter.default),
        ):
            words += [_OPTIONS.get(name) or f"--{name.replace('_', '-')}", _text(name, value)]
    return (*words, *_convention_words(given["convention"] or Convention(), given.get("exclude", ())))


def _model_text(model: Model) -> str:
    if isinstance(model, ModelSpec):
        return model.name
    if isinstance(model, (Mapping, ConfigObject)):
        return "config.json"
    return model.origin.removeprefix("catalogue: ") if isinstance(model, LoadedModel) else str(model)


def _text(name: str, value: Any) -> str:
    if isinstance(value, Device):
        return value.name
    if isinstance(value, MeasuredTimes):
        return value.path
    if isinstance(value, Path):
        return str(value)
    if name == "target" and not isinstance(value, str):
        return f"{text_of(value)}:1"
    return list_text(value)


def _convention_words(convention: Convention, excluded: Any) -> list[str]:
    words = []
    for name in ("form", "causal"):
        if getattr(convention, name) != getattr(Convention(), name):
            words += [f"--{name}", getattr(convention, name)]
    named = split_words(excluded) if isinstance(excluded, str) else excluded
    if not convention.lm_head and LM_HEAD not in named:
        words += ["--exclude", LM_HEAD]
    return words
