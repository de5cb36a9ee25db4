"""The step that compiles: runs the calls that later steps make, in many processes that share Triton's cache."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from support.gpu.plan import Cell, Plan, check_case, plan
from support.runner import reason


def calls(planned: Plan) -> list[Cell]:
    """Return one cell for each set of kernels, those that compile longest first: the calls are those of the plan.

    A kernel is compiled for its constants (head dims, degree, gates, passes), not for a context.
    """
    found: dict[tuple[object, ...], Cell] = {}
    for cell in (*planned.cells, planned.host):
        shape = cell.shape
        found.setdefault((shape.kind, shape.head_dim, shape.dtype, cell.power), cell)
    return sorted(found.values(), key=lambda cell: (-cell.shape.head_dim, cell.shape.kind != "train"))


def compile_call(cell: Cell, checks: bool) -> float:
    """Run power attention once at a cell, or at the shape of its check; return the seconds that it took."""
    import torch

    from support.peers import prepare

    start = time.monotonic()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(1)
    if checks:
        _run_check(cell)
    else:
        prepare(cell.shape, cell.power)()
    if cell.shape.device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return time.monotonic() - start


def _run_check(cell: Cell) -> None:
    """Run the call of the check, which returns and differentiates a state too, without the oracle."""
    from powerplan.kernels import power_attention
    from powerplan.kernels.testing import arguments, results
    from support.shapes import DTYPES

    case, chunk = check_case(cell.shape, cell.power)
    inputs = case.inputs(DTYPES[cell.shape.dtype], cell.shape.device)
    settings = {"p": case.p, "normalize": case.normalize, "chunk_size": chunk, "return_state": True}
    impl = cell.power.impl.removeprefix("power-")
    out, state = power_attention(*arguments(inputs), inputs["log_g"], impl=impl, **settings)  # type: ignore[arg-type]
    results(out, state, inputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    # A check has kernels of its own, which return and differentiate a state: it compiles beside its cell.
    waiting = [(cell, checks) for checks in (False, True) for cell in calls(plan(options.dry))]
    waiting = [(cell, checks) for cell, checks in waiting if not (checks and cell.shape.kind == "decode")]
    failed: list[str] = []
    longest = 0.0
    with ProcessPoolExecutor(min(options.workers, len(waiting)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_call, *one): one for one in waiting}
        for future in as_completed(futures):
            cell, checks = futures[future]
            name = f"check of {cell.name}" if checks else cell.name
            try:
                seconds = future.result()
            except Exception as error:
                failed.append(f"{name}: {reason(error)}")
                print(failed[-1], flush=True)
                continue
            longest = max(longest, seconds)
            print(f"{time.monotonic() - start:6.1f} s  {name}: {seconds:.1f} s", flush=True)
    count = f"{len(waiting) - len(failed)} of {len(waiting)} calls ran, the longest in {longest:.0f} s"
    print(f"{count}; {failed[0]}" if failed else count)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
