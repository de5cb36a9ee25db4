"""Compiles launches of Triton and Gluon kernels for GPUs that need not be there, and reads what the compiler made."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import cubin
import sass

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""Triton's names of the dtypes of tensors that kernels take."""


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is launched with.

    Attributes:
        kernel: A function of triton.jit or of Gluon's jit.
        arguments: All of its parameters by name: tensors (without memory), tensor descriptors, numbers, constants.
        warps: Warps of a program.
        stages: Loads that are under way at a time.
        more: Other options of the compiler, such as maxnreg.
    """

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def gluon(self) -> bool:
        return isinstance(self.kernel, GluonJITFunction)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True} | self.more

    def source(self) -> ASTSource:
        """Return what the compiler takes: types of the arguments, and which of them are constants or aligned.

        As at a launch: pointers, and integers that are multiples of 16, are aligned; an integer 1 is a constant.
        """
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            kind, aligned = "constexpr", False
            if isinstance(value, torch.Tensor):
                kind, aligned = f"*{TYPES[value.dtype]}", True
            elif isinstance(value, TensorDescriptor):
                kind = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
            elif not parameter.is_constexpr and isinstance(value, float):
                kind = "fp32"
            elif not parameter.is_constexpr and isinstance(value, bool):
                kind = "u1"
            elif not parameter.is_constexpr and isinstance(value, int) and value != 1:
                kind, aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[parameter.name] = value
            if aligned:
                attributes[index,] = [["tt.divisibility", 16]]
        language = GluonASTSource if self.gluon else ASTSource
        return language(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_all(arch: int, launches: Sequence[Launch], cache: Path | None = None) -> list[dict[str, Any]]:
    """Return what the compiler made of launches for compute capability arch / 10; equal ones are compiled once.

    The keys of a result: key (a hash of all that the others depend on), gluon (whether the kernel is Gluon's), warps,
    registers (of a thread), stack and spills (bytes), local (loads and stores of local memory), shared (bytes), matrix
    (how often each instruction of a matrix unit occurs), barriers, instructions, operands (of wgmma, those that are not
    kept: sass.py), remarks (what ptxas changed about wgmma), compile_s.

    Args:
        arch: 80 for sm_80, 90 for sm_90a, and so on.
        launches: What to compile.
        cache: A folder that keeps results: a launch is compiled again only where its kernel, Triton or this code have
            changed. None keeps none.
    """
    sources = [launch.source() for launch in launches]
    keys = [_key(arch, launch, source) for launch, source in zip(launches, sources, strict=True)]
    rows: dict[str, dict[str, Any]] = {}
    new: dict[str, tuple[dict[str, Any], bytes]] = {}
    for key, launch, source in zip(keys, launches, sources, strict=True):
        kept = None if cache is None else cache / f"{key}.json"
        if kept is not None and kept.exists():
            rows[key] = json.loads(kept.read_text(encoding="utf-8"))
        elif key not in new:
            new[key] = _compile(arch, launch, source)
    texts = cubin.disassemble([binary for _, binary in new.values()], arch) if new else []
    for (key, (row, _)), text in zip(new.items(), texts, strict=True):
        rows[key] = row | _inspected(text)
        if cache is not None:
            keep(cache, key, rows[key])
    return [{"key": key} | rows[key] for key in keys]


def _compile(arch: int, launch: Launch, source: ASTSource) -> tuple[dict[str, Any], bytes]:
    log = io.StringIO()
    begin = time.perf_counter()
    # What ptxas says is printed, and only where it runs: Triton's own cache of binaries is left out.
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    row = cubin.resources(log.getvalue()) | {
        "shared": made.metadata.shared,
        "warps": launch.warps,
        "gluon": launch.gluon,
        "remarks": cubin.remarks(log.getvalue()),
        "compile_s": round(time.perf_counter() - begin, 2),
    }
    return row, made.asm["cubin"]


def _inspected(text: str) -> dict[str, Any]:
    listing = sass.Listing(text)
    counts = listing.counts()
    return {
        "local": counts["LDL"] + counts["STL"],
        "matrix": {name: counts[name] for name in sorted(counts) if name.endswith("MMA")},
        "barriers": counts["BAR"],
        "instructions": sum(counts.values()),
        "operands": [str(fault) for fault in listing.faults()],
    }


@lru_cache(maxsize=1)
def _tools() -> str:
    """Return what results depend on beside the kernel: the versions of Triton and ptxas, and how results are read."""
    here = Path(__file__).resolve().parent
    files = [(here / name).read_bytes() for name in ("compiling.py", "cubin.py", "sass.py")]
    paths = [triton.knobs.nvidia.ptxas.version, triton.knobs.nvidia.ptxas_blackwell.version]
    return f"{triton.__version__} {paths} {hashlib.sha256(b''.join(files)).hexdigest()}"


def _key(arch: int, launch: Launch, source: ASTSource) -> str:
    # The hash of a source covers types and values, and the text of the kernel and of all that it calls, but no names.
    parts = [_tools(), arch, launch.name, source.hash(), list(source.signature), sorted(launch.options.items())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def keep(cache: Path, key: str, row: dict[str, Any]) -> None:
    """Write a result without its key to the folder of a cache."""
    path = cache / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes may read it, or write the same.
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(row), encoding="utf-8")
    part.replace(path)
