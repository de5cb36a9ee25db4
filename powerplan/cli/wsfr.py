"""`powerplan wsfr`."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import (
    Causal,
    CausalOption,
    Dtype,
    DtypeOption,
    ExcludeOption,
    Form,
    FormatOption,
    FormOption,
    MixerOption,
    Model,
    choice_option,
    convention_of,
    read_model,
)
from powerplan.report.render import Format
from powerplan.report.wsfr import By


def wsfr(
    model: Model,
    ctx: Annotated[
        str, typer.Option(help="Contexts in tokens: 65536, or a list such as 1k,8k,64k,1M.")
    ] = "1k,8k,64k,1M",
    mixer: MixerOption = None,
    by: Annotated[By | None, choice_option(By, "Split every context by component or by layer.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every formula with the numbers put in.")] = False,
    form: FormOption = Form.recurrent,
    causal: CausalOption = Causal.exact,
    exclude: ExcludeOption = None,
    dtype: DtypeOption = Dtype.bf16,
    output: FormatOption = Format.table,
) -> None:
    """Weight-state FLOP ratio of a model: per context, who is too heavy, and where it balances."""
    from powerplan.accounting import Accounting
    from powerplan.errors import InputError
    from powerplan.report.wsfr import wsfr_report
    from powerplan.units import parse_contexts

    if explain and output is Format.csv:
        raise InputError("--explain has no place in a table of numbers; take table, json or markdown", "--format csv")
    contexts = parse_contexts(ctx, "--ctx")
    spec, notes = read_model(model, mixer)
    report = wsfr_report(Accounting(spec, convention_of(form, causal, exclude)), contexts, dtype.value, by, explain)
    for remark in notes:
        say.note(remark)
    say.show(report, output)
