"""The commands that ask one function of `import powerplan` and print its answer: wsfr, compare, budget, decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

import powerplan
from powerplan.choices import By, Engine, Twin
from powerplan.cli import figures, options
from powerplan.cli.progress import at_work

if TYPE_CHECKING:
    from powerplan.answers.base import DrawnAnswer


def wsfr(
    model: options.Model,
    ctx: Annotated[
        str,
        typer.Option(help="Contexts in tokens: 65536, or a list such as 1k,64k; each is judged by itself."),
        options.ADDS,
    ] = "1k,8k,64k,1M",
    lengths: options.LengthsOption = None,
    like: options.LikeOption = None,
    mixer: options.MixerOption = None,
    by: Annotated[By | None, options.choice_option(By, "Split every context by component or by layer.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every formula with the numbers put in.")] = False,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    exclude: options.ExcludeOption = None,
    dtype: options.DtypeOption = "bf16",
    weights_dtype: options.WeightsDtypeOption = None,
    cache_dtype: options.CacheDtypeOption = None,
    state_dtype: options.StateDtypeOption = None,
    plot: options.PlotOption = None,
    force: options.ForceOption = False,
    output: options.FormatOption = "table",
) -> None:
    """Weight-state FLOP ratio of a model: FLOPs of weights and of state at each context, and where they balance."""
    if explain and output == "csv":
        problem = "--explain has no place in a table of numbers; take table, json or markdown"
        raise powerplan.InputError(problem, "--format csv")
    documents = options.as_lengths(lengths, [model], plot)
    figures.check(plot, force, [model])
    convention = options.convention(form, causal, exclude)
    answer = powerplan.wsfr(
        options.as_family(model, like),
        ctx,
        lengths=documents,
        mixer=mixer,
        by=by,
        explain=explain,
        convention=convention,
        dtype=dtype,
        weights_dtype=weights_dtype,
        cache_dtype=cache_dtype,
        state_dtype=state_dtype,
    )
    figures.show(answer, output, plot, force)


def compare(
    models: Annotated[
        list[str],
        options.name_argument("Models, as for wsfr; one alone is shown beside itself with --mixer.", "MODEL..."),
    ],
    ctx: Annotated[
        str, typer.Option(help="Contexts in tokens: 65536, or a list such as 8k,64k."), options.ADDS
    ] = "8k,128k",
    like: options.LikeOption = None,
    mixer: options.MixerOption = None,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    exclude: options.ExcludeOption = None,
    dtype: options.DtypeOption = "bf16",
    weights_dtype: options.WeightsDtypeOption = None,
    cache_dtype: options.CacheDtypeOption = None,
    state_dtype: options.StateDtypeOption = None,
    plot: options.PlotOption = None,
    force: options.ForceOption = False,
    output: options.FormatOption = "table",
) -> None:
    """Models side by side: parameters, FLOPs, WSFR, state and decode bytes at several contexts."""
    if len(models) < 2 and mixer is None:
        problem = (
            f"compare needs two models or more, or one with --mixer; such as powerplan compare {models[0]} llama-3-8b"
        )
        raise powerplan.InputError(problem, "MODEL")
    figures.check(plot, force, models)
    convention = options.convention(form, causal, exclude)
    answer = powerplan.compare(
        options.as_families(models, like),
        ctx,
        mixer=mixer,
        convention=convention,
        dtype=dtype,
        weights_dtype=weights_dtype,
        cache_dtype=cache_dtype,
        state_dtype=state_dtype,
    )
    figures.show(answer, output, plot, force)


def budget(
    models: Annotated[
        list[str] | None,
        options.name_argument("Models, as for wsfr; without one, which models the budget supports.", "[MODEL...]"),
    ] = None,
    ctx: Annotated[
        str | None,
        typer.Option(help="Contexts in tokens, such as 8k,64k; 64k if not given, 8k,32k,128k without MODEL."),
        options.ADDS,
    ] = None,
    flops: Annotated[str | None, typer.Option(help="Total training FLOPs, such as 1e21.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, such as 300B.")] = None,
    gpu_hours: Annotated[str | None, typer.Option(help="Device hours in all; needs --gpu.")] = None,
    gpu: options.DeviceOption = None,
    mfu: Annotated[str, typer.Option(help="Share of the dense bf16 peak that training reaches.")] = "0.4",
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices that work at once.")] = "1",
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens per optimizer step, such as 512k (=524288).")] = None,
    lengths: options.LengthsOption = None,
    like: options.LikeOption = None,
    mixer: options.MixerOption = None,
    measured: options.MeasuredOption = None,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    exclude: options.ExcludeOption = None,
    dtype: options.DtypeOption = "bf16",
    weights_dtype: options.WeightsDtypeOption = None,
    cache_dtype: options.CacheDtypeOption = None,
    state_dtype: options.StateDtypeOption = None,
    plot: options.PlotOption = None,
    force: options.ForceOption = False,
    output: options.FormatOption = "table",
) -> None:
    """What a budget buys: tokens, steps and days, also of other mixers; without MODEL, which models it supports."""
    if like is not None and not models:
        raise powerplan.InputError("is for a config.json, and there is no MODEL", "--like")
    documents = options.as_lengths(lengths, models or [], plot)
    figures.check(plot, force, models or [], measured)
    ask: Callable[..., DrawnAnswer] = powerplan.budget  # One call for both kinds of answers.
    with at_work("comparing sizes"):
        answer = ask(
            options.as_families(models, like) if models else None,
            ctx,
            flops=flops,
            tokens=tokens,
            gpu_hours=gpu_hours,
            gpu=gpu,
            mfu=mfu,
            devices=devices,
            batch_tokens=batch_tokens,
            lengths=documents,
            measured=measured,
            mixer=mixer,
            convention=options.convention(form, causal, exclude),
            dtype=dtype,
            weights_dtype=weights_dtype,
            cache_dtype=cache_dtype,
            state_dtype=state_dtype,
        )
    figures.show(answer, output, plot, force)


def decode(
    models: Annotated[list[str], options.name_argument("One or more models, as for wsfr.", "MODEL...")],
    ctx: Annotated[
        str, typer.Option(help="Contexts in tokens: 65536, or a list such as 128k,1M."), options.ADDS
    ] = "128k",
    batch: Annotated[
        str, typer.Option(help="Sequences decoded together: 8, or a list such as 1,8,64."), options.ADDS
    ] = "1,8,64",
    gpu: options.DeviceOption = None,
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices that share weights, state and work.")] = "1",
    twin: Annotated[
        Twin | None, options.choice_option(Twin, "Compare each model with itself when every layer has this mixer.")
    ] = None,
    cache_budget: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS", help="Evict: a layer keeps at most this much of a cache that grows, such as 4k."
        ),
    ] = None,
    prefill_chunk: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Read a prompt in chunks, such as 8k, and show the memory that takes.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Keep recurrent state as it was every so many tokens, for prefixes."),
    ] = None,
    engine: Annotated[
        Engine | None, options.choice_option(Engine, "Show what this engine allocates for a sequence.")
    ] = None,
    page: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Tokens of a page of a cache; the engine's own if not given.")
    ] = None,
    like: options.LikeOption = None,
    mixer: options.MixerOption = None,
    dtype: options.DtypeOption = "bf16",
    weights_dtype: options.WeightsDtypeOption = None,
    cache_dtype: options.CacheDtypeOption = None,
    state_dtype: options.StateDtypeOption = None,
    plot: options.PlotOption = None,
    force: options.ForceOption = False,
    output: options.FormatOption = "table",
) -> None:
    """What serving takes: bytes and time per decoded token, prefill, memory, the largest batch that fits."""
    figures.check(plot, force, models)
    answer = powerplan.decode(
        options.as_families(models, like),
        ctx,
        batch=batch,
        gpu=gpu,
        devices=devices,
        twin=twin,
        mixer=mixer,
        dtype=dtype,
        weights_dtype=weights_dtype,
        cache_dtype=cache_dtype,
        state_dtype=state_dtype,
        cache_budget=cache_budget,
        prefill_chunk=prefill_chunk,
        checkpoint_every=checkpoint_every,
        engine=engine,
        page=page,
    )
    figures.show(answer, output, plot, force)
