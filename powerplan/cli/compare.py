"""`powerplan compare`."""

from __future__ import annotations

from typing import Annotated

import typer

import powerplan
from powerplan.cli import options, say


def compare(
    models: Annotated[list[str], options.model_argument("Two or more models, as for wsfr.", "MODEL...")],
    ctx: Annotated[str, typer.Option(help="Contexts in tokens: 65536, or a list such as 8k,64k.")] = "8k,128k",
    mixer: options.MixerOption = None,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    exclude: options.ExcludeOption = None,
    dtype: options.DtypeOption = "bf16",
    output: options.FormatOption = "table",
) -> None:
    """Models side by side: parameters, FLOPs, WSFR, state and decode bytes at several contexts."""
    if len(models) < 2:
        problem = f"compare needs two models or more; such as powerplan compare {models[0]} llama-3-8b"
        raise powerplan.InputError(problem, "MODEL")
    convention = options.convention(form, causal, exclude)
    say.answer(powerplan.compare(models, ctx, mixer=mixer, convention=convention, dtype=dtype), output)
