"""`powerplan wsfr` and `powerplan dims`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import FormatOption, Model
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
    mixer: Annotated[
        str | None,
        typer.Option(help="What if every sequence mixer were this: attention, window:4096, power:p=2 or linear."),
    ] = None,
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
    from powerplan.load import load_model
    from powerplan.mixers.base import Convention
    from powerplan.report.wsfr import wsfr_report
    from powerplan.units import parse_contexts
    from powerplan.whatif import with_mixer

    contexts = parse_contexts(ctx, "--ctx")
    loaded = load_model(model)
    spec, notes = loaded.spec, list(loaded.notes)
    if mixer is not None:
        spec, remarks = with_mixer(spec, mixer)
        notes += remarks
    convention = Convention(causal.value, form.value, Excluded.lm_head not in (exclude or []))
    report = wsfr_report(Accounting(spec, convention), contexts, dtype.value, by, explain)
    for remark in notes:
        say.note(remark)
    say.show(report, output)


def dims(
    head_dim: Annotated[str, typer.Option(help="Head dims d: 64, or a list such as 32,64,128.")] = "64",
    p: Annotated[str, typer.Option("--p", help="Degrees: 2, or a list such as 2,3,4.")] = "1,2,3,4,5,6",
    tile: Annotated[int, typer.Option(min=1, max=4096, help="Tile of the tiled embedding.")] = 8,
    v_head_dim: Annotated[
        int | None, typer.Option(min=1, max=65536, help="Value head dim; the head dim where not given.")
    ] = None,
    output: FormatOption = Format.table,
) -> None:
    """Dimensions of the power embeddings: tpow, spow and tiled spow, savings, state, the window of the same state."""
    from powerplan.mixers.power import MAX_DEGREE
    from powerplan.report.catalogue import dims_report
    from powerplan.units import parse_integers

    head_dims = parse_integers(head_dim, "--head-dim", 1, 65536)
    degrees = parse_integers(p, "--p", 1, MAX_DEGREE)
    say.show(dims_report(head_dims, degrees, tile, v_head_dim), output)
