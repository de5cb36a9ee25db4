"""`powerplan wsfr` and `powerplan dims`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import FormatOption, MixerOption, Model, read_model
from powerplan.report.render import Format
from powerplan.report.wsfr import By


class Form(StrEnum):
    recurrent = "recurrent"
    chunked = "chunked"


class Causal(StrEnum):
    exact = "exact"
    full = "full"


class Excluded(StrEnum):
    lm_head = "lm-head"


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"
    int4 = "int4"


def wsfr(
    model: Model,
    ctx: Annotated[
        str, typer.Option(help="Contexts in tokens: 65536, or a list such as 1k,8k,64k,1M.")
    ] = "1k,8k,64k,1M",
    mixer: MixerOption = None,
    by: Annotated[By | None, typer.Option(help="Split every context by component or by layer.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every formula with the numbers put in.")] = False,
    form: Annotated[
        Form, typer.Option(help="Cost in proportion to the state, or as a chunked kernel executes it.")
    ] = Form.recurrent,
    causal: Annotated[
        Causal, typer.Option(help="Count the keys that a causal mask leaves, or the full context.")
    ] = Causal.exact,
    exclude: Annotated[list[Excluded] | None, typer.Option(help="Leave this out of the weight FLOPs.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Weights and key/value cache; recurrent state is fp32 always.")
    ] = Dtype.bf16,
    output: FormatOption = Format.table,
) -> None:
    """Weight-state FLOP ratio of a model: per context, who is too heavy, and where it balances."""
    from powerplan.accounting import Accounting
    from powerplan.errors import InputError
    from powerplan.mixers.base import Convention
    from powerplan.report.wsfr import wsfr_report
    from powerplan.units import parse_contexts

    if explain and output is Format.csv:
        raise InputError("--explain has no place in a table of numbers; take table, json or markdown", "--format csv")
    contexts = parse_contexts(ctx, "--ctx")
    spec, notes = read_model(model, mixer)
    convention = Convention(causal.value, form.value, Excluded.lm_head not in (exclude or []))
    report = wsfr_report(Accounting(spec, convention), contexts, dtype.value, by, explain)
    for remark in notes:
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
