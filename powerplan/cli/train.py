"""`powerplan train`."""

from __future__ import annotations

from typing import Annotated

import typer

import powerplan
from powerplan.choices import Loss, Master, MatmulsDtype, Optimizer, Schedule, Trainer, TrainingDtype
from powerplan.cli import options, say
from powerplan.cli.options import choice_option


def train(
    model: options.Model,
    ctx: Annotated[str | None, typer.Option(help="Context in tokens, such as 65536; 64k if not given.")] = None,
    gpu: options.DeviceOption = None,
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="How many devices train together.")] = "1",
    tokens: options.TokensOption = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKENS@CONTEXT", help="A stage of the run, such as 950B@8k; give one for each."),
    ] = None,
    batch_tokens: Annotated[
        str | None, typer.Option(help="Tokens per optimizer step over all devices; about 4M if not given.")
    ] = None,
    lengths: options.LengthsOption = None,
    micro_batch: Annotated[
        str, typer.Option(metavar="INTEGER|auto", help="Sequences that a device works on at once.")
    ] = "auto",
    parallel: Annotated[
        str,
        typer.Option(
            metavar="DEGREES|auto",
            help="Degrees such as fsdp=8,tp=4 of data (fsdp, replicas), tensor (tp), pipeline (pp, interleave), "
            "context (cp) and expert (ep) parallelism.",
        ),
        options.ADDS,
    ] = "auto",
    zero: Annotated[
        str,
        typer.Option(
            metavar="0|1|2|3",
            help="What is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too (FSDP).",
        ),
    ] = "3",
    schedule: Annotated[
        Schedule,
        choice_option(Schedule, "Order of micro-batches in a pipeline; dualpipe hides the traffic of experts."),
    ] = "1f1b",
    recompute: Annotated[
        str, typer.Option(metavar="HOW|auto", help="Activations that are computed again: none, selective or full.")
    ] = "auto",
    optimizer: Annotated[Optimizer, choice_option(Optimizer, "The optimizer.")] = "adamw",
    master: Annotated[
        Master, choice_option(Master, "A copy of the weights in fp32 that the optimizer works on, or none.")
    ] = "fp32",
    loss: Annotated[Loss, choice_option(Loss, "The logits of all tokens at once, or of some thousand.")] = "whole",
    efficiency: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Shares of the dense peak: 0.5 of all, or a list of weights=0.6, attention, recurrent, "
            "experts (matmuls of routed ones) and fp8 (of the fp8 peak).",
        ),
        options.ADDS,
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES", help="Shares of traffic that hide behind compute: a list of experts=0.9 and tensor=0.5."
        ),
        options.ADDS,
    ] = None,
    price: options.PriceOption = None,
    node_devices: Annotated[
        str | None, typer.Option(metavar="INTEGER", help="Devices of a node, where not the catalogue's.")
    ] = None,
    link_gbs: Annotated[
        str | None, typer.Option(metavar="GB/s", help="Rate within a node, per device and direction, likewise.")
    ] = None,
    network_gbs: Annotated[
        str | None, typer.Option(metavar="GB/s", help="Rate between nodes, per device and direction, likewise.")
    ] = None,
    like: options.LikeOption = None,
    mixer: options.MixerOption = None,
    measured: options.MeasuredOption = None,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    exclude: options.ExcludeOption = None,
    dtype: Annotated[
        TrainingDtype, choice_option(TrainingDtype, "Number format of weights in matmuls and of activations.")
    ] = "bf16",
    matmuls_dtype: Annotated[
        MatmulsDtype | None, choice_option(MatmulsDtype, "Of layers' products with weights, if not --dtype.")
    ] = None,
    gradients_dtype: Annotated[
        TrainingDtype | None,
        choice_option(TrainingDtype, "Of gradients; if not given fp32 with a master copy, else --dtype."),
    ] = None,
    moments_dtype: Annotated[
        TrainingDtype | None, choice_option(TrainingDtype, "Of the optimizer's moments, likewise.")
    ] = None,
    export: Annotated[
        Trainer | None, choice_option(Trainer, "Print the plan as this trainer reads it, in place of the report.")
    ] = None,
    write: Annotated[
        str | None, typer.Option(metavar="FILE", help="Save what --export prints, and print the report.")
    ] = None,
    force: options.ForceOption = False,
    output: options.FormatOption = "table",
) -> None:
    """A training run: does it fit, how is it split, how long is a step, what does it cost; and with other mixers."""
    from powerplan.cli.files import File, deliver
    from powerplan.cli.interrupts import kept
    from powerplan.load import model_file
    from powerplan.output import check_targets

    documents = options.as_lengths(lengths, [model])
    check_targets({"--write": write}, force, {"MODEL": model_file(model), "--measured": measured, "--lengths": lengths})
    if write is not None and export is None:
        raise powerplan.InputError("needs the trainer; such as --export torchtitan", "--write")
    answer = powerplan.train(
        options.as_family(model, like),
        ctx,
        gpu=gpu,
        devices=devices,
        tokens=tokens,
        stages=stage or (),
        batch_tokens=batch_tokens,
        lengths=documents,
        micro_batch=micro_batch,
        parallel=parallel,
        zero=zero,
        schedule=schedule,
        recompute=recompute,
        optimizer=optimizer,
        master=master,
        loss=loss,
        efficiency=efficiency,
        overlap=overlap,
        measured=measured,
        price=price,
        node_devices=node_devices,
        link_gbs=link_gbs,
        network_gbs=network_gbs,
        mixer=mixer,
        convention=options.convention(form, causal, exclude),
        dtype=dtype,
        matmuls_dtype=matmuls_dtype,
        gradients_dtype=gradients_dtype,
        moments_dtype=moments_dtype,
    )
    if export is None:
        say.answer(answer, output)
        return
    if documents is not None:
        say.note(f"what {export} reads says nothing of document masks: its own setting has to turn them on")
    exported = answer.export(export)
    if write is None:
        for remark in answer.notes:
            say.note(remark)
        say.text(exported)
        return
    with kept() as signals:
        files = [File("--write", write, exported.encode, f": {export}")]
        deliver(lambda: say.answer(answer, output), files, force, signals)
