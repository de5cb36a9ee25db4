"""Power attention against softmax attention, windows and other packages: checked first, then timed.

Usage: python benchmarks/attention.py [--preset cpu-targets | gpu-targets | gpu-paper | quick] [--out RESULT.json] ...
Runs on a GPU where there is one, else on the CPU. Each implementation is held to its error budget against float64
before anything is timed; repeats are taken in turns. A time is the median, with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from powerplan.errors import InputError
from powerplan.lists import parse_words
from powerplan.profile.timing import clock_of, copy_rate, matmul_rate
from powerplan.units import parse_contexts, parse_integers
from support.files import write
from support.peers import IMPLS
from support.presets import PRESETS, Preset, Sweep, overridden
from support.report import Machine, breakdown_tables, device_name, result, tables, target_table
from support.runner import Runner, WrongResultError
from support.shapes import DTYPES, PASSES

Value = TypeVar("Value")


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = _options(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Backends that cannot run say why in a warning for each condition, and then raise.
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", category=UserWarning, module="support")
    preset = _preset(options)
    clock = clock_of(device)
    dtype = DTYPES[preset.sweeps[0].dtype or ("bf16" if device == "cuda" else "fp32")]
    threads = torch.get_num_threads() if device == "cpu" else None
    machine = Machine(device_name(device), matmul_rate(device, dtype, clock), copy_rate(device, clock), threads)
    runner = Runner(
        device,
        clock,
        repeats=options.repeats,
        limit_s=options.time_limit,
        start=start,
        memory=options.memory,
        profiled=options.breakdown,
        say=lambda line: print(f"{time.monotonic() - start:6.1f} s  {line}", file=sys.stderr),
    )
    try:
        rows = runner.run(preset.sweeps)
    except WrongResultError as error:
        print(f"wrong result, so nothing is timed: {error}", file=sys.stderr)
        return 1
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    data = result(asked, machine, rows, preset.targets, time.monotonic() - start)
    matmul, copy = machine.matmul_flops_per_s / 1e9, machine.copy_bytes_per_s / 1e9
    print(f"{machine.device}: matrix product {matmul:,.0f} GFLOP/s, copy {copy:,.0f} GB/s, torch {torch.__version__}\n")
    for block in (
        tables(rows, machine),
        breakdown_tables(rows),
        target_table(data["targets"]) if preset.targets else "",
    ):
        if block:
            print(f"{block}\n")
    if options.out is not None:
        write(data, options.out)
    return 0


def _preset(options: argparse.Namespace) -> Preset:
    if options.preset is not None:
        return overridden(PRESETS[options.preset], options.impls, options.dtype)
    gates = (False, True) if options.gated is None else (options.gated,)
    return Preset(
        (
            Sweep(
                options.passes,
                tuple(options.contexts),
                tuple(options.head_dims),
                tuple(options.p),
                tuple(options.chunk_sizes or (None,)),
                options.batch,
                options.heads,
                options.kv_heads,
                gates,
                options.impls,
                options.dtype,
            ),
        )
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), help="what to measure; the settings of shapes below are then not used")
    add("--passes", type=_names(PASSES), default=PASSES, metavar="LIST", help=f"of {', '.join(PASSES)}")
    add("--contexts", type=_read(parse_contexts), default=[1024, 4096, 16384], metavar="LIST", help="1k,16k,1M")
    add("--head-dims", type=_integers(1024), default=[64], metavar="LIST")
    add("--p", type=_integers(4), default=[2], metavar="LIST", help="degrees")
    add("--chunk-sizes", type=_integers(2**20), metavar="LIST", help="tokens; the default without")
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, help="as many as heads without")
    add("--gated", action=argparse.BooleanOptionalAction, help="both without")
    add("--dtype", choices=DTYPES, help="fp32 on a CPU and bf16 on a GPU without")
    add("--impls", type=_names(IMPLS), metavar="LIST", help=f"of {', '.join(IMPLS)}")
    add("--repeats", type=int, default=7, help="of forward and train; of a decoding step at least 60")
    add("--time-limit", type=float, default=600, metavar="SECONDS", help="of the whole run; what does not fit is named")
    add(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory in runs of their own"
    )
    add("--breakdown", action="store_true", help="profile power attention at the longest context")
    add("--device", choices=("cpu", "cuda"))
    add("--threads", type=int, help="of a CPU")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_args(arguments)


def _read(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """Return `parse` with its errors as argparse shows them."""

    def read(text: str) -> Value:
        try:
            return parse(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(error.problem) from None  # argparse names the option.

    return read


def _integers(most: int) -> Callable[[str], list[int]]:
    return _read(lambda text: parse_integers(text, "", 1, most))


def _names(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    return _read(lambda text: tuple(parse_words(text, allowed, "")))


if __name__ == "__main__":
    sys.exit(main())
