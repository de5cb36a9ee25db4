"""The step that compiles: what the benchmark launches, each kernel once, in many processes that share Triton's cache.

One process makes the calls. Where Triton's JIT would compile, it is recorded what, and the launch is left out. Types,
alignment and constants are so those of the call itself, and with them the name under which the result lies in the
cache. Processes that have never seen the GPU compile.

That name has the kernel's own key in it, which depends on what had one before: Triton takes the global constants of a
called function into it only where that function has a key already. So keys are made here, in the order of the benchmark
and not in that of the processes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch

from powerplan.kernels import power_attention
from powerplan.kernels.testing import arguments, results
from support.gpu.plan import Cell, Plan, check_case, plan
from support.gpu.untried import untried
from support.peers import prepare
from support.runner import reason
from support.shapes import DTYPES


@dataclass(frozen=True)
class Source:
    """A kernel and what it is compiled for, as Triton's JIT has found it in the arguments of a launch.

    Attributes:
        module, name: Where the kernel is.
        signature, constants, attributes: As triton.compiler.ASTSource takes them.
        options: Of the compiler.
        target: The GPU.
        key: The kernel's own, of its text and that of all that it calls.
    """

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    target: Any
    key: str


Take = Callable[[Source], None]


@contextmanager
def recorded(take: Take) -> Iterator[None]:
    """Hand to `take` what Triton would compile, once each, and launch nothing; results are garbage meanwhile."""
    from triton.runtime.jit import JITFunction

    seen: set[tuple[int, str]] = set()
    usual = JITFunction._do_compile

    def record(
        kernel: Any, key: str, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        if (id(kernel), key) in seen:
            return
        seen.add((id(kernel), key))
        target, function = kernel.device_caches[device][2], kernel.fn
        place = (function.__module__, function.__name__)
        take(Source(*place, signature, constants, attributes, dict(options.__dict__), target, kernel.cache_key))

    JITFunction._do_compile = record  # The JIT launches nothing where nothing was compiled.
    try:
        yield
    finally:
        JITFunction._do_compile = usual


def compile_source(source: Source) -> tuple[str, float]:
    """Compile a kernel as Triton's JIT does; return its name and the seconds that it took."""
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    start = time.monotonic()
    kernel = getattr(import_module(source.module), source.name)
    kernel.hash = source.key
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    made = language(kernel, source.signature, source.constants, source.attributes)
    triton.compile(made, target=source.target, options=source.options)
    return source.name, time.monotonic() - start


def calls(planned: Plan) -> list[tuple[str, Callable[[], object]]]:
    """Return the calls that the benchmark makes, by name, in its order, and before each the call that checks it.

    A check has kernels of its own, which return and differentiate a state.
    """
    found: dict[str, Callable[[], object]] = {}
    checks: set[tuple[Any, int, bool]] = set()
    for cell in (*planned.cells, planned.host):
        check = (cell.power, cell.shape.head_dim, cell.untried)
        if cell.shape.kind != "decode" and check not in checks:
            checks.add(check)
            found[f"check of {cell.name}"] = partial(_call, cell, _run_check)
        found[cell.name] = partial(_call, cell, _run)
    return list(found.items())


def _call(cell: Cell, call: Callable[[Cell], None]) -> None:
    with untried(cell.untried):
        call(cell)


def _run(cell: Cell) -> None:
    prepare(cell.shape, cell.power)()


def _run_check(cell: Cell) -> None:
    """Run the call of the check, which returns and differentiates a state too, without the oracle."""
    case, chunk = check_case(cell.shape, cell.power)
    inputs = case.inputs(DTYPES[cell.shape.dtype], cell.shape.device)
    settings: dict[str, Any] = {"p": case.p, "normalize": case.normalize, "chunk_size": chunk}
    impl = cell.power.impl.removeprefix("power-")
    out, state = power_attention(*arguments(inputs), inputs["log_g"], impl=impl, return_state=True, **settings)
    results(out, state, inputs)


def compile_calls(found: list[tuple[str, Callable[[], object]]], workers: int, gpu: bool) -> list[str]:
    """Compile what calls launch, and return what failed."""
    start = time.monotonic()
    failed: list[str] = []
    futures: dict[Future[tuple[str, float]], str] = {}
    # Forked from a process that has imported all and not yet seen the GPU: the first task starts all of them.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        pool.submit(os.getpid).result()

        def take(source: Source) -> None:
            futures[pool.submit(compile_source, source)] = source.name

        with recorded(take):
            for name, call in found:
                try:
                    call()
                except Exception as error:  # The other calls can go on, and the benchmark says what is wrong.
                    failed.append(f"{name}: {reason(error)}")
                    print(failed[-1], flush=True)
                if gpu:
                    torch.cuda.empty_cache()
        print(f"{time.monotonic() - start:6.1f} s  {len(found)} calls, {len(futures)} kernels to compile", flush=True)
        longest = total = 0.0
        for future in as_completed(futures):
            try:
                name, seconds = future.result()
            except Exception as error:
                failed.append(f"{futures[future]}: {reason(error)}")
                print(failed[-1], flush=True)
                continue
            longest, total = max(longest, seconds), total + seconds
            print(f"{time.monotonic() - start:6.1f} s  {name}: {seconds:.1f} s", flush=True)
    count = f"{len(futures)} kernels of {len(found)} calls in {total:.0f} s of CPU time, the longest {longest:.0f} s"
    print(f"{count}; failed: {failed[0]}" if failed else count)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if not options.dry:
        _import_kernels()
    return 1 if compile_calls(calls(plan(options.dry)), options.workers, gpu=not options.dry) else 0


def _import_kernels() -> None:
    """Import what the processes compile, once for all of them."""
    for name in ("decode", "run", "states", "hopper.run"):
        import_module(f"powerplan.kernels.triton.{name}")


if __name__ == "__main__":
    sys.exit(main())
