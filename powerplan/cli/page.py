"""`powerplan report`."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

import powerplan
from powerplan.cli import options, say
from powerplan.cli.progress import at_work

CONTEXT, FILE = "128k", "plan.html"


def report(
    model: options.Model,
    ctx: Annotated[
        str,
        typer.Option(
            help="Contexts in tokens; the page is about the longest, and the one furthest from the target decides."
        ),
        options.ADDS,
    ] = CONTEXT,
    gpu: options.DeviceOption = None,
    devices: Annotated[
        str, typer.Option(metavar="INTEGER", help="Devices that train the model, and serve it together.")
    ] = "1",
    tokens: options.TokensOption = None,
    price: options.PriceOption = None,
    measured: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Show the times that powerplan profile --save wrote to this file."),
    ] = None,
    target: Annotated[str, typer.Option(help="Weight to state FLOPs: 1:1, 3:1, 1:2.")] = "1:1",
    top: Annotated[str, typer.Option(metavar="INTEGER", help="Sorts of candidates to show.")] = "6",
    like: options.LikeOption = None,
    mixer: options.MixerOption = None,
    file: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page; - is standard output.")
    ] = FILE,
    force: options.ForceOption = False,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    exclude: options.ExcludeOption = None,
    dtype: options.DtypeOption = "bf16",
    weights_dtype: options.WeightsDtypeOption = None,
    cache_dtype: options.CacheDtypeOption = None,
    state_dtype: options.StateDtypeOption = None,
) -> None:
    """One HTML page to look at: where a model stands, what balances it, decoding, training, how it is counted."""
    from powerplan.cli.files import File, deliver
    from powerplan.cli.interrupts import kept
    from powerplan.load import model_file
    from powerplan.output import check_targets
    from powerplan.units import format_bytes
    from powerplan.webpage.render import check_libraries

    target_file = None if file == "-" else file
    check_targets({"--output": target_file}, force, {"MODEL": model_file(model), "--measured": measured})
    check_libraries()
    given = {
        "--ctx": (ctx, ""),
        "--gpu": (gpu, None),
        "--devices": (devices, "1"),
        "--tokens": (tokens, None),
        "--price": (price, None),
        "--measured": (measured, None),
        "--target": (target, "1:1"),
        "--top": (top, "6"),
        "--like": (like, None),
        "--mixer": (mixer, None),
        "--form": (form, "recurrent"),
        "--causal": (causal, "exact"),
        "--exclude": ("lm-head" if exclude else None, None),
        "--dtype": (dtype, "bf16"),
        "--weights-dtype": (weights_dtype, None),
        "--cache-dtype": (cache_dtype, None),
        "--state-dtype": (state_dtype, None),
    }
    words = [word for option, (value, default) in given.items() if value != default for word in (option, str(value))]
    with at_work("comparing candidates"):
        page = powerplan.page(
            options.as_family(model, like),
            ctx,
            mixer=mixer,
            gpu=gpu,
            devices=devices,
            tokens=tokens,
            price=price,
            measured=measured,
            target=target,
            top=top,
            convention=options.convention(form, causal, exclude),
            dtype=dtype,
            weights_dtype=weights_dtype,
            cache_dtype=cache_dtype,
            state_dtype=state_dtype,
            command=shlex.join(["powerplan", "report", model, *words]),
        )
        content = page.html.encode()
    for remark in page.notes:
        say.note(remark)
    if target_file is None:
        _print(content)
        return
    with kept() as signals:
        remark = f": {format_bytes(len(content))}, one page for a browser"
        deliver(lambda: None, [File("--output", target_file, lambda: content, remark)], force, signals)


def _print(content: bytes) -> None:
    """Write a page to stdout in UTF-8, which it says it is in, whatever the encoding of the terminal."""
    sys.stdout.flush()
    stream = getattr(sys.stdout, "buffer", None)  # What stands for stdout in a notebook has none.
    if stream is None:
        sys.stdout.write(content.decode())
    else:
        stream.write(content)
