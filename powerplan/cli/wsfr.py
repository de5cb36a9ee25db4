"""`powerplan wsfr`."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.cli import options, say
from powerplan.report.render import Format
from powerplan.report.wsfr import By


def wsfr(
    model: options.Model,
    ctx: Annotated[
        str, typer.Option(help="Contexts in tokens: 65536, or a list such as 1k,8k,64k,1M.")
    ] = "1k,8k,64k,1M",
    mixer: options.MixerOption = None,
    by: Annotated[By | None, options.choice_option(By, "Split every context by component or by layer.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every formula with the numbers put in.")] = False,
    form: options.FormOption = options.Form.recurrent,
    causal: options.CausalOption = options.Causal.exact,
    exclude: options.ExcludeOption = None,
    dtype: options.DtypeOption = options.Dtype.bf16,
    output: options.FormatOption = Format.table,
) -> None:
    """Weight-state FLOP ratio of a model: at each context, which side is too heavy, and where they balance."""
    from powerplan.answers.wsfr import wsfr as wsfr_of
    from powerplan.errors import InputError

    if explain and output is Format.csv:
        raise InputError("--explain has no place in a table of numbers; take table, json or markdown", "--format csv")
    answer = wsfr_of(
        model,
        ctx,
        mixer=mixer,
        by=by.value if by else None,
        explain=explain,
        form=form.value,
        causal=causal.value,
        lm_head=not exclude,
        dtype=dtype.value,
    )
    say.answer(answer, output)
