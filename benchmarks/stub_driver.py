"""Triton's own launchers over a CUDA driver that does nothing, for host_time.py: no GPU is needed, but a C compiler is.

A small library stands for libcuda.so.1: every function of it that Triton calls returns success. Triton builds its
driver module, and in 3.6 a launcher for each signature, as on a machine with a GPU. A launch then expands descriptors,
has tensor maps encoded and parses all arguments in Triton's own code. What CUDA's driver itself takes to encode a map
and to start a kernel is left out.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget

FUNCTIONS = """
    cuCtxGetDevice cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain
    cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuModuleGetFunction cuModuleLoadData
    cuModuleUnload cuOccupancyMaxActiveClusters cuPointerGetAttribute cuStreamIsCapturing cuTensorMapEncodeIm2col
"""
"""What Triton's modules, from 3.6 to 3.9, refer to and nobody here needs an answer of."""

SOURCE = """
#include <stdint.h>
#include <string.h>
long started, encoded;
int cuLaunchKernelEx(void) { ++started; return 0; }
int cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, uint64_t address) {
  ++encoded;
  memset(map, 0, 128);
  map[0] = address;
  return 0;
}
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
"""


def lacking() -> str | None:
    """Return what this machine lacks, or None."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang, or the one that CC names)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers (Python.h)"
    return None


class StubDriver:
    """Triton's driver for CUDA, for a GPU of compute capability 9.0 that is not there.

    Whoever opens libcuda.so.1 in this process from now on finds the stub.

    Args:
        folder: Keeps the library and what Triton builds, which does not belong into its cache.
    """

    def __init__(self, folder: Path) -> None:
        source, library = folder / "stub.c", folder / "libcuda.so.1"
        empty = "".join(f"int {name}(void) {{ return 0; }}\n" for name in FUNCTIONS.split())
        source.write_text(SOURCE + empty, encoding="utf-8")
        compiler = os.environ.get("CC") or shutil.which("gcc") or "clang"
        subprocess.run(
            [compiler, source, "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library], check=True
        )
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.started, self.encoded = (ctypes.c_long.in_dll(loaded, name) for name in ("started", "encoded"))
        knobs.nvidia.libcuda_path = str(folder)
        knobs.cache.dir = str(folder / "cache")
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


METADATA = {
    "global_scratch_size": 0,
    "global_scratch_align": 1,
    "profile_scratch_size": 0,
    "profile_scratch_align": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "instrumentation_mode": "",
    "num_ctas": 1,
}
"""What the compiler tells a launcher of the kernels here, beside descriptors."""


class StubKernel:
    """Stands for a kernel that was compiled for a signature, with the launcher that Triton makes for it."""

    function = 1
    packed_metadata = (4, 1, 0)

    def __init__(self, kernel: Any, signature: dict[str, Any], driver: Any) -> None:
        self.src = SimpleNamespace(fn=kernel, constants={}, signature=signature)
        described = [kind for kind in signature.values() if kind.startswith("tensordesc")]
        self.metadata = SimpleNamespace(**METADATA, tensordesc_meta=[layout(kind) for kind in described])
        self.run = driver.launcher_cls(self.src, self.metadata)

    def launch_metadata(self, *_: Any) -> None:
        return None


def layout(kind: str) -> dict[str, Any]:
    """Return what the compiler tells a launcher of a descriptor of 16-bit values: how a tile of it is encoded."""
    found = re.match(r"tensordesc<(bf16|fp16)\[(\d+), ?(\d+)\].*swizzle_byte_width=(\d+)", kind)
    assert found is not None, kind
    dtype, rows, columns, swizzle = found.groups()
    return {
        "swizzle": {"32": 1, "64": 2, "128": 3}[swizzle],
        "elem_size": 2,
        "elem_type": {"fp16": 6, "bf16": 10}[dtype],
        "block_size": [int(rows), min(int(columns), int(swizzle) // 2)],
        "fp4_padded": False,
    }
