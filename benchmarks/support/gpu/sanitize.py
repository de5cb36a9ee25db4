"""The step that looks for wrong accesses: compute-sanitizer over small calls, memcheck beside racecheck."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.gpu.steps import SKIPPED

HEAD_DIMS = (64, 128)
TOKENS, CHUNK = 300, 128
"""Two whole chunks and a short one."""

FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")
"""Where compute-sanitizer is, if not on the PATH."""

FOUND = 9
"""Exit status of compute-sanitizer where it found an error."""


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, None where it is not installed."""
    on_path = shutil.which("compute-sanitizer")
    places = [Path(folder) / "compute-sanitizer" for folder in FOLDERS]
    return on_path or next((str(place) for place in places if place.is_file()), None)


def calls(dry: bool) -> None:
    """Run forward and backward passes, and a step of decoding, at each head dim; then what no GPU has run."""
    import torch

    from powerplan.dims import UNTRIED_HOPPER_HEAD_DIMS
    from support.gpu.untried import untried

    for head_dim in HEAD_DIMS:
        _call(2, head_dim, dry)
    with untried(True):
        for p, head_dim in UNTRIED_HOPPER_HEAD_DIMS.items():
            _call(p, head_dim // 8 if dry else head_dim, dry)
        _call(2, HEAD_DIMS[0], dry, "float16")
    if not dry:
        torch.cuda.synchronize()


def _call(p: int, head_dim: int, dry: bool, name: str = "bfloat16") -> None:
    """Run one call; name: that of its dtype on a GPU."""
    import torch

    from powerplan.dims import odd_degree
    from powerplan.kernels import power_attention_step
    from powerplan.kernels.api import power_attention
    from powerplan.kernels.testing import Case, arguments

    device, impl, dtype = ("cpu", "torch", torch.float32) if dry else ("cuda", "triton", getattr(torch, name))
    case = Case(p, not odd_degree(p), True, False, 1, TOKENS, 2, 2, head_dim, head_dim)
    inputs = case.inputs(dtype, device)
    q, k, v = arguments(inputs)
    log_g = inputs["log_g"]
    assert log_g is not None
    settings: dict[str, Any] = {"p": p, "normalize": case.normalize}
    out, state = power_attention(q, k, v, log_g, chunk_size=CHUNK, return_state=True, impl=impl, **settings)
    torch.autograd.grad(out.float().sum() + state.kv.sum(), (q, k, v, log_g))
    with torch.no_grad():
        now = (q[:, 0], k[:, 0], v[:, 0], log_g[:, 0], state)
        power_attention_step(*now, impl="recurrent" if dry else impl, **settings)


def sanitized(tool: str, sanitizer: str, limit_s: float) -> tuple[str, int | None]:
    """Return the last lines of one tool, and its exit status; None where the limit ended it."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += ["--target-processes", "application-only"]  # Not the assembler that a compiling kernel starts.
    # Each tensor has an allocation of its own: an access past its end is no access to another.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        [*command, sys.executable, "-m", "support.gpu.sanitize", "--calls"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return output, None
    return output, process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60, help="seconds")
    parser.add_argument("--calls", action="store_true", help="run the calls, without a sanitizer")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.calls:
        calls(options.dry)
        return 0
    if options.dry:
        calls(dry=True)
        print("the calls ran, without a sanitizer")
        return 0
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is not installed")
        return SKIPPED
    return _all(sanitizer, options.limit)


def _all(sanitizer: str, limit_s: float) -> int:
    """Run both tools at the same time, print what they say, and return the exit status of the step."""
    from concurrent.futures import ThreadPoolExecutor

    end = time.monotonic() + limit_s - 3  # seconds for what is printed
    tools = ("memcheck", "racecheck")
    with ThreadPoolExecutor(len(tools)) as pool:
        results = list(pool.map(lambda tool: sanitized(tool, sanitizer, end - time.monotonic()), tools))
    words, failed = [], False
    for tool, (output, status) in zip(tools, results, strict=True):
        print(f"{tool}\n{output}", flush=True)
        word = {0: "clean", None: "not finished", FOUND: "errors found"}.get(status, f"ended with {status}")
        words.append(f"{tool} {word}")
        # racecheck replays each access to shared memory, and may take longer than there is time.
        failed |= status not in (0, None) or (status is None and tool == "memcheck")
    print(", ".join(words))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
