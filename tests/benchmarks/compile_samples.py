"""Compiles tests/gluon_samples.py for sm_90a, for tests that read the JSON: python compile_samples.py [CACHE]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]

import gluon_samples  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.experimental.gluon.language import NVMMASharedLayout  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from compiling import Launch, compile_all  # noqa: E402


def outer(fault: str = "", tiles: int = 8) -> Launch:
    """A launch of outer_kernel over 128 rows."""
    v = 64
    x, y = (torch.empty(128, 8 * tiles, dtype=torch.bfloat16, device="meta") for _ in range(2))
    b = torch.empty(tiles * tiles * 64, v, dtype=torch.bfloat16, device="meta")
    out = torch.empty(128, v, dtype=torch.float32, device="meta")
    arguments = {
        "b_desc": TensorDescriptor.from_tensor(b, [64, v], NVMMASharedLayout(128, 16, 2)),
        "o_desc": TensorDescriptor.from_tensor(out, [64, v], NVMMASharedLayout(128, 32, 2)),
        "p_x": x,
        "p_y": y,
        "rows": 128,
    }
    constants = {"TILES": tiles, "V": v, "STAGES": 4, "FAULT": fault}
    return Launch(gluon_samples.outer_kernel, arguments | constants, warps=4, stages=1)


def chain(fault: str) -> Launch:
    x, v = (torch.empty(8, 64, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    arguments = {"p_x": x, "p_v": v, "p_out": x.float()[0], "blocks": 8, "FAULT": fault}
    return Launch(gluon_samples.chain_kernel, arguments, warps=4, stages=1, more={"maxnreg": 128})


def main() -> None:
    cache = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    launches = {
        "right": outer(),
        "rolled": outer("rolled"),
        "early": outer("early"),
        "three": outer(tiles=3),
        "chain": chain(""),
    }
    rows = compile_all(90, list(launches.values()), cache)
    json.dump({"triton": triton.__version__} | dict(zip(launches, rows, strict=True)), sys.stdout)


if __name__ == "__main__":
    main()
