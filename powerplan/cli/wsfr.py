"""`powerplan wsfr`."""

from __future__ import annotations

from typing import Annotated

import typer

import powerplan
from powerplan.choices import By
from powerplan.cli import options, say


def wsfr(
    model: options.Model,
    ctx: Annotated[
        str, typer.Option(help="Contexts in tokens: 65536, or a list such as 1k,8k,64k,1M.")
    ] = "1k,8k,64k,1M",
    mixer: options.MixerOption = None,
    by: Annotated[By | None, options.choice_option(By, "Split every context by component or by layer.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every formula with the numbers put in.")] = False,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    exclude: options.ExcludeOption = None,
    dtype: options.DtypeOption = "bf16",
    output: options.FormatOption = "table",
) -> None:
    """Weight-state FLOP ratio of a model: at each context, which side is too heavy, and where they balance."""
    if explain and output == "csv":
        problem = "--explain has no place in a table of numbers; take table, json or markdown"
        raise powerplan.InputError(problem, "--format csv")
    convention = options.convention(form, causal, exclude)
    answer = powerplan.wsfr(model, ctx, mixer=mixer, by=by, explain=explain, convention=convention, dtype=dtype)
    say.answer(answer, output)
