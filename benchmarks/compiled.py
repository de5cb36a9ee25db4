"""Compiles every shipped kernel configuration for GPUs that need not be there: registers, spills, shared memory, SASS.

Usage: python benchmarks/compiled.py [--arch 80 90 100] [--dtype bf16] [--p 2] [--thorough] [--out RESULT.json]
Exits with 1 where a kernel spills, needs more shared memory than the GPU has, misses its matrix instructions, does not
keep an operand of a product (sass.py), or has its products serialised by ptxas.

`make compiled` renews the results in benchmarks/results, which tests take for kernels that have not changed since.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import walk_packages
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import triton
from tabulate import tabulate
from triton.runtime.jit import JITFunction

import powerplan.kernels.triton
from compiling import Launch, compile_all, keep
from powerplan.dims import odd_degree, spow_dim
from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.triton import decode, run
from powerplan.kernels.triton.shapes import LaunchShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_KB = {80: 99, 90: 227, 100: 227}
"""Shared memory that a block may use (CUDA C++ Programming Guide, technical specifications per compute capability).

8.0 has 163 KB; its configurations serve 8.6, 8.9 and 12.0 too, which have 99.
"""

MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The instruction of the matrix unit for 16-bit operands and tf32."""

DIMS = {
    1: [(64, 64), (128, 128)],
    2: [(32, 32), (64, 64), (64, 128), (128, 128)],
    3: [(32, 32), (64, 64), (64, 128)],
    4: [(16, 16), (32, 32), (32, 128)],
}
"""Head dims of the entries of blocks.json by degree; a call takes the entry of the least that hold its own."""


HOPPER_DIMS = [(32, 32), (64, 64), (64, 128), (128, 64), (128, 128)]
"""Head dims, padded, that the Hopper engine is compiled for at p = 2; thorough: all pairs of the three."""

UNTRIED_DIMS = {
    1: [(64, 64), (32, 32), (64, 128), (128, 64), (128, 128)],
    3: [(64, 64), (32, 32), (40, 40), (64, 128)],
    4: [(32, 32), (16, 16), (24, 24), (32, 128)],
}
"""Head dims for degrees that no GPU has run: the first; thorough: all."""


def dims_of(dtype: str, p: int) -> list[tuple[int, int]]:
    """Return the head dims of the entries: operands of 32 bits leave less room (support.py says what is taken)."""
    if dtype == "fp32":
        return {1: [(64, 64)], 2: [(32, 32), (64, 64)], 3: [(32, 32), (64, 64)], 4: [(16, 16), (32, 64)]}[p]
    return [(64, 64), (64, 128)] if p == 1 and dtype == "fp16" else DIMS[p]


OF_CONFIGURATION = {"configuration", "arch", "kernel", "faults", "key"}
"""What a row holds beside what the compiler made of a kernel."""

PRODUCTS = ("scan_kernel", "output_kernel", "queries_kernel", "keys_kernel")

TOKENS = 4096


@dataclass(frozen=True)
class Configuration:
    """One instance of the kernels; all of its launches are compiled."""

    dtype: str
    p: int
    key_dim: int
    value_dim: int
    gated: bool
    normalize: bool
    repeats: int = 1
    carried: bool = False
    hopper: bool = False

    @property
    def is_variant(self) -> bool:
        """Whether it has the blocks of another one, with gates and without groups."""
        return not self.gated or self.repeats > 1

    @property
    def name(self) -> str:
        flags = {"gated": self.gated, "norm": self.normalize, "state": self.carried, "hopper": self.hopper}
        shown = " ".join(flag for flag, there in flags.items() if there)
        return f"{self.dtype} p={self.p} K={self.key_dim} V={self.value_dim} R={self.repeats} {shown}".strip()


def shipped(dtypes: list[str], degrees: list[int], thorough: bool) -> Iterator[Configuration]:
    """Yield what is compiled: every entry of blocks.json with gates, normaliser and carried states where it can.

    In 16 bits each once with neither, too, and in fp16 with groups of four heads; of these, those for sm_90. thorough:
    so in all dtypes and for all GPUs, and all smaller head dims that an entry serves.
    """
    for dtype, p in product(dtypes, degrees):
        norm = p % 2 == 0
        for key_dim, value_dim in dims_of(dtype, p):
            yield Configuration(dtype, p, key_dim, value_dim, True, norm, carried=True)
            if thorough or dtype != "fp32":  # Products wait for one another in one variant, and not in the other.
                yield Configuration(dtype, p, key_dim, value_dim, False, False)
            if thorough or dtype == "fp16":
                yield Configuration(dtype, p, key_dim, value_dim, True, norm, repeats=4)
        for dim in (16, 32) if thorough else ():
            yield Configuration(dtype, p, dim, dim, True, norm)
    for dtype in ("bf16", "fp16"):
        if dtype in dtypes and 2 in degrees:
            yield from of_hopper(dtype, thorough)
    if "bf16" in dtypes:
        yield from of_untried(degrees, thorough)


def of_hopper(dtype: str, thorough: bool) -> Iterator[Configuration]:
    """Yield what is compiled of the Hopper engine for p = 2: every setting is a constant of its kernels."""
    for key_dim, value_dim in product((32, 64, 128), repeat=2) if thorough else HOPPER_DIMS:
        yield Configuration(dtype, 2, key_dim, value_dim, True, True, carried=True, hopper=True)
        if thorough or (key_dim == value_dim and key_dim >= 64):
            yield Configuration(dtype, 2, key_dim, value_dim, True, True, repeats=4, hopper=True)
        if thorough or key_dim == value_dim:
            yield Configuration(dtype, 2, key_dim, value_dim, False, False, hopper=True)


def of_untried(degrees: list[int], thorough: bool) -> Iterator[Configuration]:
    """Yield what is compiled of its kernels for other degrees."""
    for p in sorted(UNTRIED_DIMS.keys() & set(degrees)):
        norm = not odd_degree(p)
        for key_dim, value_dim in UNTRIED_DIMS[p] if thorough else UNTRIED_DIMS[p][:1]:
            yield Configuration("bf16", p, key_dim, value_dim, True, norm, carried=True, hopper=True)
            if thorough:
                yield Configuration("bf16", p, key_dim, value_dim, True, norm, repeats=4, hopper=True)
                yield Configuration("bf16", p, key_dim, value_dim, False, False, hopper=True)


def launches(config: Configuration, arch: int) -> list[Launch]:
    """Return the kernels that a forward and a backward pass launch, with their arguments, on tensors without memory."""
    groups = 4
    dtype = DTYPES[config.dtype]

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    heads = groups * config.repeats
    q, k = empty(2, TOKENS, heads, config.key_dim), empty(2, TOKENS, groups, config.key_dim)
    v = empty(2, TOKENS, groups, config.value_dim)
    log_g = empty(2, TOKENS, groups, of=torch.float32) if config.gated else None
    scale = config.key_dim**-0.5
    call = CallShape.of(q.shape, k.shape, v.shape, config.p, scale, 1024, config.normalize)
    shape = LaunchShape(call, sequences=2, dtype=dtype, arch=90 if arch >= 90 else 80, hopper=config.hopper)
    inputs = Inputs(q, k, v, log_g)
    launched: list[Launch] = []

    def listen(
        kernel: Any,
        programs: int,
        arguments: dict[str, Any],
        warps: int = 4,
        stages: int = 2,
        options: dict[str, Any] | None = None,
    ) -> None:
        launched.append(Launch(kernel, arguments, warps, stages, options or {}))

    with ExitStack() as listening:
        # Every module holds the function that starts a kernel under its own name.
        for name in modules_of_kernels():
            holder = import_module(name)
            if hasattr(holder, "launch"):
                listening.enter_context(patch.object(holder, "launch", listen))
        size = (2, groups, spow_dim(config.key_dim, config.p))
        state = empty(*size, call.state_columns, of=torch.float32) if config.carried else None
        outputs = run.forward(inputs, state, shape, config.carried)
        run.backward(empty(2, TOKENS, heads, config.value_dim), state, inputs, outputs, shape, config.carried)
        kv = empty(*size, config.value_dim, of=torch.float32)
        key = empty(*size if config.normalize else (0,), of=torch.float32)
        gate = None if log_g is None else log_g[:, 0]
        decode.step(q[:, 0], k[:, 0], v[:, 0], gate, kv, key, config.p, 0.125)
        if config.normalize:  # The first step after a prefill, whose state has the normaliser as its last column.
            joined = empty(*size, config.value_dim + 1, of=torch.float32)
            decode.step(q[:, 0], k[:, 0], v[:, 0], gate, joined[..., :-1], joined[..., -1], config.p, 0.125)
    return launched


def start_worker() -> None:
    """Hash all functions of kernels, in one order, and spare what is imported from garbage collection.

    Triton 3.6 counts the constants that a function reads in the hash of what calls it if that function has been hashed
    before, and only then: keys of results would depend on what a process has compiled. A full collection would visit
    half a million objects of torch and triton, 6 % of the time.
    """
    for name in sorted(modules_of_kernels()):
        functions = vars(import_module(name))
        for function in sorted(functions):
            if isinstance(functions[function], JITFunction):
                _ = functions[function].cache_key
    gc.freeze()


def modules_of_kernels() -> list[str]:
    """Return the names of the modules that hold kernels, and what launches them."""
    return [module.name for module in walk_packages(powerplan.kernels.triton.__path__, "powerplan.kernels.triton.")]


def faults(config: Configuration, arch: int, kernel: str, row: dict[str, Any]) -> list[str]:
    """Return what is wrong with one compiled kernel."""
    found = []
    if row["local"] or row["stack"]:
        found.append(f"spills: {row['local']} local loads and stores, {row['stack']} bytes of stack")
    if row["shared"] > SHARED_KB[arch] * 1024:
        found.append(f"{row['shared'] / 1024:.0f} KB of shared memory, and the GPU has {SHARED_KB[arch]}")
    if (kernel in PRODUCTS or row["gluon"]) and config.dtype != "fp32":
        # Blocks of fewer than 64 rows, which a state of p = 1 and operands of 32 bits ask for, use the older one.
        small = config.dtype == "fp16" or (config.p == 1 and config.key_dim < 64)
        least = "HMMA" if small else MATRIX[arch]
        if least not in row["matrix"] and MATRIX[arch] not in row["matrix"]:
            found.append(f"no {least}: {row['matrix'] or 'no matrix instruction'}")
    # Of plain Triton's products it is Triton that says when they run.
    return [*found, *row["operands"], *(row["remarks"] if row["gluon"] else ())]


def kept_rows(path: Path, dtypes: list[str], arches: list[int]) -> dict[str, dict[str, Any]]:
    """Return the results in a file of --out for these dtypes and architectures, by key, as compile_all keeps them."""
    wanted = {(dtype, f"sm_{arch}") for dtype, arch in product(dtypes, arches)}
    return {
        row["key"]: {name: value for name, value in row.items() if name not in OF_CONFIGURATION}
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if (row["configuration"].split()[0], row["arch"]) in wanted
    }


def rows_of(task: tuple[Configuration, int, Path | None]) -> list[dict[str, Any]]:
    """Return one row for each kernel of a configuration, compiled for one architecture."""
    config, arch, cache = task
    rows = []
    launched = launches(config, arch)
    for launch, made in zip(launched, compile_all(arch, launched, cache), strict=True):
        wrong = faults(config, arch, launch.name, made)
        name = launch.name + (" backward" if launch.arguments.get("BACKWARD") else "")
        rows.append({"configuration": config.name, "arch": f"sm_{arch}", "kernel": name, **made, "faults": wrong})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_KB))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--p", type=int, nargs="+", default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    parser.add_argument("--thorough", action="store_true", help="head dims and variants that share blocks, too")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kept", type=Path, help="a file of --out: what has not changed since is not compiled")
    parser.add_argument("--again", type=int, default=0, help="kernels of --kept to compile all the same and compare")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    configurations = list(shipped(options.dtype, options.p, options.thorough))
    kept = {} if options.kept is None else kept_rows(options.kept, options.dtype, options.arch)
    # Keys are hashes: the least ones are a sample, and another one where kernels have changed.
    again = set(sorted(kept)[: options.again])
    # Configurations share kernels: results go to a folder that all processes read.
    with TemporaryDirectory() as folder, ProcessPoolExecutor(options.workers, initializer=start_worker) as pool:
        cache = Path(folder)
        for key in kept.keys() - again:
            keep(cache, key, kept[key])
        tasks = [
            (config, arch, cache)
            for config in configurations
            for arch in options.arch
            if arch == 90 or not (config.hopper or (config.is_variant and not options.thorough))
        ]
        rows = [row for part in pool.map(rows_of, tasks) for row in part]
    for row in rows:
        if row["key"] in again:
            row["faults"] += [
                f"{name}: {row[name]}, and {value} in {options.kept}"
                for name, value in kept[row["key"]].items()
                if name != "compile_s" and row[name] != value
            ]
    columns = ("configuration", "arch", "kernel", "registers", "warps", "local", "shared", "matrix", "compile_s")
    table = [[row[name] for name in columns] + ["; ".join(row["faults"])] for row in rows]
    print(tabulate(table, headers=[*columns, "faults"]))
    wrong = sum(bool(row["faults"]) for row in rows)
    new = len({row["key"] for row in rows} - (kept.keys() - again))
    print(f"\n{len(rows)} kernels, {new} compiled now, {wrong} with faults (triton {triton.__version__})")
    if options.out is not None:
        result = {
            "schema": "powerplan.compiled/1",
            "date": datetime.now(UTC).date().isoformat(),
            "triton": triton.__version__,
            "torch": torch.__version__,
            "configurations": [asdict(config) for config in configurations],
        }
        lines = ",\n  ".join(map(json.dumps, rows))
        text = json.dumps(result, indent=1).removesuffix("\n}")
        options.out.write_text(f'{text},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
