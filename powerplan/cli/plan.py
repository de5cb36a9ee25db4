"""`powerplan wsfr`, `powerplan compare` and `powerplan dims`."""

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
    complete_model,
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
    by: Annotated[By | None, typer.Option(help="Split every context by component or by layer.")] = None,
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


def dims(
    head_dim: Annotated[str, typer.Option(help="Head dims d: 64, or a list such as 32,64,128.")] = "64",
    p: Annotated[str, typer.Option("--p", help="Degrees: 2, or a list such as 2,3,4.")] = "1,2,3,4,5,6",
    tile: Annotated[str, typer.Option(metavar="INTEGER", help="Tile of the tiled embedding.")] = "8",
    v_head_dim: Annotated[
        str | None, typer.Option(metavar="INTEGER", help="Value head dim; the head dim where not given.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="States of these mixers beside power attention's instead: kda,mamba2 or all."),
    ] = None,
    output: FormatOption = Format.table,
) -> None:
    """Dimensions of the power embeddings: tpow, spow and tiled spow, savings, state, the window of the same state."""
    from powerplan.mixers.power import MAX_DEGREE
    from powerplan.report.dims import dims_report, states_report
    from powerplan.units import parse_integer, parse_integers

    head_dims = parse_integers(head_dim, "--head-dim", 1, 65536)
    degrees = parse_integers(p, "--p", 1, MAX_DEGREE)
    width = parse_integer(tile, "--tile", 1, 4096)
    values = None if v_head_dim is None else parse_integer(v_head_dim, "--v-head-dim", 1, 65536)
    if kind is None:
        say.show(dims_report(head_dims, degrees, width, values), output)
    else:
        say.show(states_report(head_dims, degrees, values, kind), output)
