"""The result file of benchmarks/gpu.py: one JSON object, rewritten whole after each row. Needs no torch.

schema     "powerplan.gpu-benchmark/1"
date, device, versions, machine
           day (UTC); name of the GPU; of python, powerplan, torch, cuda, triton, fla-core and retention; the rates
           measured in the same run, matmul_flops_per_s (bf16, 8192^3) and copy_bytes_per_s (read and written)
steps      name, ended (passed, failed, stopped, skipped), seconds, limit_s, said (its last line)
checks     variant, share_of_budget (at most 1), against: of power attention against float64, before it is timed
           ("untried" in a variant or a cell: with the Hopper kernels that no GPU has run)
rows       one for each implementation at a shape: cell (name of the comparison), pass, context, batch, heads,
           kv_heads, head_dim, dtype, impl, p, gated; seconds (median, p20, p80, repeats), flops, share_of_matmul,
           over_fastest_sdpa; or `skipped`, with the reason. clock is "call", from the host's call to the end of its
           work; "graph", the same for a call that is replayed from a CUDA graph ("captured" in a cell); or "device",
           with the work queued ahead. Rows of other packages have state_per_head, the numbers
           of their state.
kernels    one for each launch of a training call in its order: cell, kernel, index (of this kernel's launches,
           from 0), role, seconds
roles      cell, role (prepare, output, states, dq, ..., and "states, states_kernel alone"), flops (useful: phi with the
           rows of the kernels' layout, the masked half not counted; None where there are none), seconds,
           share_of_matmul, kernels (names of those whose time it is)
host       cell, seconds (median, p20, p80, repeats) of a call until it returns, cpu_seconds in all threads, launches
crossovers head_dim, context where power attention overtakes the fastest SDPA (None: nowhere), slower_at and
           faster_at (measured contexts on either side), contexts (SDPA's time over power attention's, by context)
targets    shape, measure, sign, bound, value (None: not measured), met
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from support.files import write

SCHEMA = "powerplan.gpu-benchmark/1"

LISTS = ("steps", "checks", "rows", "kernels", "roles", "host", "crossovers", "targets")

PACKAGES = ("torch", "triton", "fla-core", "retention", "numpy")


class ResultFile:
    """The file, which one process at a time may write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return what is in the file; an empty result where there is none."""
        if not self.path.exists():
            return {"schema": SCHEMA} | {name: [] for name in LISTS}
        data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return data

    def set(self, **values: Any) -> None:
        """Replace keys of the result."""
        write(self.read() | values, self.path)

    def add(self, name: str, *records: dict[str, Any]) -> None:
        """Append records to one of the lists."""
        data = self.read()
        data[name] += records
        write(data, self.path)


def versions() -> dict[str, str | None]:
    """Return the versions of packages; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
