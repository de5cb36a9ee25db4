"""`powerplan compare`."""

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
    complete_model,
    convention_of,
    read_model,
)
from powerplan.report.render import Format


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Two or more models, as for wsfr.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ],
    ctx: Annotated[str, typer.Option(help="Contexts in tokens: 65536, or a list such as 8k,64k.")] = "8k,128k",
    mixer: MixerOption = None,
    form: FormOption = Form.recurrent,
    causal: CausalOption = Causal.exact,
    exclude: ExcludeOption = None,
    dtype: DtypeOption = Dtype.bf16,
    output: FormatOption = Format.table,
) -> None:
    """Models side by side: parameters, FLOPs, WSFR, state and decode bytes at several contexts."""
    from powerplan.accounting import Accounting
    from powerplan.errors import InputError
    from powerplan.report.compare import compare_report
    from powerplan.units import parse_contexts

    contexts = parse_contexts(ctx, "--ctx")
    if len(models) < 2:
        raise InputError(f"compare needs two models or more; such as powerplan compare {models[0]} llama-3-8b", "MODEL")
    convention = convention_of(form, causal, exclude)
    accountings: list[Accounting] = []
    remarks: list[str] = []
    for model in models:
        spec, notes = read_model(model, mixer)
        accountings.append(Accounting(spec, convention))
        remarks.extend(f"{spec.name}: {remark}" for remark in notes)
    report = compare_report(accountings, contexts, dtype.value)
    for remark in remarks:
        say.note(remark)
    say.show(report, output)
