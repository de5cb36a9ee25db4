"""The step for other packages and FlexAttention, which compile for long: each in a process of its own, with a limit."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from support.gpu.plan import LONGEST, K
from support.gpu.results import ResultFile
from support.shapes import Shape, Variant

ONE_S = 25.0
"""Seconds for one of them, its start and what it compiles included."""

REPEATS = 9

RESULT = "result: "
"""Begins the line with which a process hands over what it measured."""


@dataclass(frozen=True)
class Other:
    """An implementation at its own head dim (key and value), at a cell whose other shape it shares."""

    impl: str
    head_dim: int
    cell: str
    package: str

    @property
    def name(self) -> str:
        return f"{self.impl} d{self.head_dim}"

    @property
    def state_per_head(self) -> int | None:
        """Numbers that a head remembers of the past; None for softmax attention, which keeps it all."""
        return None if self.impl == "flex" else self.head_dim**2


LONG_64, LONG_128 = (LONGEST[head_dim].name for head_dim in (64, 128))

OTHERS = (
    Other("simple-gla", 64, LONG_64, "fla"),
    Other("gated-delta", 128, LONG_128, "fla"),
    Other("kda", 128, LONG_128, "fla"),
    Other("simple-gla", 128, LONG_128, "fla"),
    Other("retention", 64, LONG_64, "retention"),
    Other("flex", 64, LONG_64, "torch"),
    Other("flex", 128, LONG_128, "torch"),
)
"""All at 64k tokens in training, the one that compiles longest last."""


def run_of(other: Other, shape: Shape) -> Any:
    """Return a training call of one implementation. Raises UnavailableError where it cannot run here."""
    from support.peers import UnavailableError, prepare

    if other.impl in ("gated-delta", "kda"):
        if shape.device != "cuda":
            raise UnavailableError(f"{other.package} runs on CUDA devices only")
        return _delta(other, shape)
    return prepare(shape, Variant(other.impl, 2 if other.impl == "retention" else None, gated=True))


def _delta(other: Other, shape: Shape) -> Any:
    """Return a training call of a delta rule: gates a head has (gated delta rule), or each of its keys' dims (KDA)."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    made = shape.inputs()
    q, k, v, log_g = (made[name] for name in ("q", "k", "v", "log_g"))
    q, k = (F.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))
    beta = torch.rand(v.shape[:3], device=v.device).to(v.dtype)
    if other.impl == "kda":
        log_g = log_g[..., None].expand(q.shape).contiguous()
        # Its faster way, for gates above exp(-5).
        function = partial(import_module("fla.ops.kda").chunk_kda, safe_gate=True)
    else:
        function = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    inputs = [x.requires_grad_() for x in (q, k, v, log_g, beta)]
    grad = torch.randn_like(v)

    def train() -> Any:
        return torch.autograd.grad(function(*inputs)[0], inputs, grad)

    return train


def measure_one(other: Other, dry: bool) -> dict[str, Any]:
    """Return the times of one implementation, or why there are none."""
    from powerplan.profile.timing import clock_of, spread
    from support.runner import reason

    shape = Shape("train", 64 * K, 1, 8, 8, other.head_dim, "bf16", "cuda")
    if dry:
        shape = replace(shape, tokens=64, heads=1, kv_heads=1, head_dim=8, dtype="fp32", device="cpu")
    try:
        run = run_of(other, shape)
        run()
        clock = clock_of(shape.device)
        return {"seconds": asdict(spread([clock(run) for _ in range(REPEATS)]))}
    except Exception as error:  # Another package's error is a row without a time, whatever it is.
        return {"skipped": reason(error)}


def in_a_process(other: Other, dry: bool, limit_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """Return what a process of its own measures of one implementation within the limit."""
    command = [sys.executable, "-m", "support.gpu.others", "--one", other.name]
    process = subprocess.Popen(
        command + ["--dry"] * dry,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"skipped": f"stopped after {limit_s:.0f} s"}
    lines = output.strip().splitlines() or ["it said nothing"]
    found = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    return dict(json.loads(found[-1])) if found else {"skipped": lines[-1][:160]}


def row(other: Other, found: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one implementation for the result file."""
    place = {"cell": other.cell, "clock": "call", "impl": other.impl, "head_dim": other.head_dim}
    return place | {"state_per_head": other.state_per_head} | found


def compile_all(dry: bool, limit_s: float) -> int:
    """Compile what each needs, all at the same time, into the caches of Triton and inductor; nothing is recorded.

    What FLA finds fastest beside other work is not kept: it would be timed with that.
    """
    there = [other for other in OTHERS if _is_there(other, dry)]
    with ThreadPoolExecutor(max(1, len(there))) as pool:
        environment = {"FLA_CACHE_RESULTS": "0"}
        found = list(pool.map(lambda other: in_a_process(other, dry, limit_s, environment), there))
    for other, result in zip(there, found, strict=True):
        print(f"{other.name}: {result.get('skipped', 'compiled')}", flush=True)
    print(f"{sum('seconds' in result for result in found)} of {len(there)} compiled")
    return 0


def _is_there(other: Other, dry: bool) -> bool:
    # FlexAttention takes half a minute to compile on a CPU, and has no backward pass there.
    return find_spec(other.package) is not None and not (dry and other.impl == "flex")


def measure_all(file: ResultFile, dry: bool, limit_s: float, start: float) -> int:
    """Measure one after another until the limit, and record each."""
    count = 0
    for other in OTHERS:
        left = limit_s - (time.monotonic() - start)
        if not _is_there(other, dry):
            absent = f"the package {other.package} is not installed"
            found: dict[str, Any] = {"skipped": "not in the dry mode" if other.package == "torch" else absent}
        elif left < 5:
            found = {"skipped": "no time was left"}
        else:
            found = in_a_process(other, dry, min(ONE_S, left - 1), {})
        file.add("rows", row(other, found))
        count += "seconds" in found
        text = found.get("skipped") or f"{found['seconds']['median'] * 1e3:.3g} ms"
        print(f"{time.monotonic() - start:6.1f} s  {other.cell:30} {other.name:24} {text}", flush=True)
    print(f"{count} of {len(OTHERS)} timed")
    return 0


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=120, help="seconds")
    parser.add_argument("--one", metavar="NAME", help="measure one, and print it")
    parser.add_argument("--compile", action="store_true", help="compile only")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.one is not None:
        other = next(other for other in OTHERS if other.name == options.one)
        print(RESULT + json.dumps(measure_one(other, options.dry)))
        return 0
    if options.compile:
        return compile_all(options.dry, options.limit)
    return measure_all(ResultFile(options.out), options.dry, options.limit, start)


if __name__ == "__main__":
    sys.exit(main())
