"""Peak memory of one run beyond its inputs and outputs: by the allocator on a GPU, in a fresh process on a CPU."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.peers import prepare
from support.shapes import Shape, Variant

STATUS = Path("/proc/self/status")
WARM_TOKENS = 64


def peak_bytes(shape: Shape, variant: Variant) -> int | None:
    """Return the peak beyond inputs and outputs of one run of `variant` in bytes; None where it cannot be measured."""
    if shape.device == "cuda":
        return _on_gpu(shape, variant)
    if not STATUS.exists():
        return None
    request = json.dumps({"shape": asdict(shape), "variant": asdict(variant), "threads": torch.get_num_threads()})
    folder = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "support.memory", request]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def _bytes(result: Any) -> int:
    """Return the bytes of all tensors in nested tuples."""
    if isinstance(result, Tensor):
        return result.nbytes
    return sum(_bytes(part) for part in result) if isinstance(result, tuple) else 0


def _on_gpu(shape: Shape, variant: Variant) -> int:
    run = prepare(shape, variant)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes(result)


def _resident(name: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")


def _in_this_process(shape: Shape, variant: Variant) -> int:
    """Return the rise of the resident set's high-water mark over what a short run and the inputs left resident.

    The short run first: code and threads are no part of what the context costs. What it freed goes back to the system,
    lest the run take it again unseen. The mark may then stand above the resident set, which can only make the result
    too large.
    """
    prepare(replace(shape, tokens=min(shape.tokens, WARM_TOKENS)), variant)()
    run = prepare(shape, variant)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _resident("VmRSS:")
    result = run()
    return max(0, _resident("VmHWM:") - before - _bytes(result))


def main() -> int:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    print(_in_this_process(Shape(**request["shape"]), Variant(**request["variant"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
