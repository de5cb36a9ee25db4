"""Runs Gluon kernels for Hopper GPUs on CPU tensors, program by program: what they compute, and when they may read it.

    with emulated("powerplan.kernels.triton.hopper"):
        engine = importlib.import_module("powerplan.kernels.triton.hopper.expand")
        engine.kernel[(programs,)](**arguments, num_warps=4)

Modules of the package are imported afresh with stand-ins for gluon.jit, gluon.language and what is asynchronous on a
Hopper GPU. All other modules have the real ones, and plain Triton kernels, of these modules too, run in Triton's
interpreter as ever. Layouts are ignored, but for what a view of shared memory by another shape needs.

A copy arrives at the wait for its barrier and a product is computed at the wait that covers it, the latest that a GPU
could. Where an earlier one would give another result, this raises:

- Shared memory begins as NaN. A copy makes its target NaN at once and arrives at the wait for its barrier: reading the
  target before raises, as does copying to, or writing, what an outstanding product or store reads.
- What threads store to shared memory must be fenced before a product or a copy reads it.
- A barrier counts arrivals and bytes. A wait that a GPU would never leave raises, as does one that would pass at once
  while something is under way: it waits for the wrong phase.
- The result of an asynchronous product can be used after a wait that covers it and has it among its deps.
- A product reads a left operand in registers until it is waited for. In a loop at run time every iteration writes the
  same registers, in an unrolled one each has its own. Making the operand again before the wait raises.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.machinery
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real
from triton.language.core import dtype as TritonDtype  # noqa: N812

from gluon_on_cpu import memory, products
from gluon_on_cpu.program import (
    Int,
    Pending,
    Pointer,
    constexpr,
    convert_layout,
    load,
    program,
    run_range,
    running,
    static_range,
    store,
)

OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}
"""What a launch may name beside the kernel's own arguments."""

DTYPES = {
    "int1": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

ASM: dict[str, Callable[..., Any]] = {
    r"ex2\.approx(\.ftz)?\.(f32|bf16|f16)": torch.exp2,
    r"lg2\.approx(\.ftz)?\.f32": torch.log2,
    r"rcp\.approx(\.ftz)?\.f32": torch.reciprocal,
    r"mov\.b(16|32|64)": lambda x: x,
}
"""PTX instructions that kernels may hold, by a pattern of their names."""


@contextmanager
def emulated(package: str, *, operands: bool = True, double: bool = False) -> Iterator[None]:
    """Import a package's modules afresh with stand-ins for Gluon while the context lasts; then all is as it was.

    Args:
        package: The package, or a module: its modules are those whose names begin with its own.
        operands: Raise where a left operand in registers is made again while a product may still read it. That is a
            matter of registers, which the compiler may have solved by luck.
        double: Sum products in float64, else in float32.
    """
    parent, _, last = package.rpartition(".")
    own = {name: module for name, module in sys.modules.items() if _within(name, package)}
    holder = importlib.import_module(parent) if parent else SimpleNamespace()
    attribute = vars(holder).get(last)
    for name in own:
        del sys.modules[name]
    finder = _Finder(package, _stand_ins(operands, double))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _within(name, package)]:
            del sys.modules[name]
        sys.modules.update(own)
        if attribute is not None:
            setattr(holder, last, attribute)
        elif hasattr(holder, last):
            delattr(holder, last)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


class _Finder:
    """Finds the modules of a package where they are, and has them loaded with stand-ins."""

    def __init__(self, package: str, stand_ins: dict[str, ModuleType]) -> None:
        self.package, self.stand_ins = package, stand_ins

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not _within(name, self.package):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin, self.stand_ins)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, stand_ins: dict[str, ModuleType]) -> None:
        super().__init__(name, path)
        self.stand_ins = stand_ins

    def exec_module(self, module: ModuleType) -> None:
        tree = _Rewritten().visit(ast.parse(Path(self.path).read_text(encoding="utf-8"), self.path))
        own = {"__import__": self._import, "range": run_range, "__bits__": lambda x: x.itemsize * 8}
        # Builtins of this module alone: its functions see them, whoever calls them.
        vars(module)["__builtins__"] = vars(builtins) | own
        exec(compile(ast.fix_missing_locations(tree), self.path, "exec"), vars(module))

    def _import(self, name: str, space: Any = None, local: Any = None, names: Any = (), level: int = 0) -> ModuleType:
        if level == 0 and name in self.stand_ins:
            if not names:
                raise ImportError(f"emulation wants `from {name.rpartition('.')[0]} import ...`, not `import {name}`")
            return self.stand_ins[name]
        return builtins.__import__(name, space, local, names, level)


class _Rewritten(ast.NodeTransformer):
    """x += y makes a new x, as in Triton: torch would change the tensor that other names hold too."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr != "primitive_bitwidth":
            return node
        return ast.copy_location(ast.Call(ast.Name("__bits__", ast.Load()), [node.value], []), node)


class Kernel:
    """What gluon.jit returns: called from a kernel it runs in place, with a grid it runs every program."""

    def __init__(self, fn: Callable[..., Any], operands: bool, double: bool) -> None:
        self.fn, self.__name__, self.operands, self.double = fn, fn.__name__, operands, double
        self.arg_names = fn.__code__.co_varnames[: fn.__code__.co_argcount]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        sizes = (*grid, 1, 1)[:3]

        def launch(*args: Any, **kwargs: Any) -> None:
            known = self.arg_names
            unknown = kwargs.keys() - OPTIONS - set(known)
            if unknown:
                raise TypeError(f"{self.__name__} has no argument {', '.join(sorted(unknown))}")
            warps = int(kwargs.get("num_warps", 4))
            positional = [_argument(x) for x in args]
            named = {name: _argument(x) for name, x in kwargs.items() if name in known}
            for z, y, x in itertools.product(*(range(size) for size in reversed(sizes))):
                with program((x, y, z), sizes, warps, self.operands, self.double) as here:
                    self.fn(*positional, **named)
                    here.finish()

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer.to(x)
    if isinstance(x, TritonDtype):
        return DTYPES[{"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(x.name, x.name)]
    if hasattr(x, "block_shape") and hasattr(x, "base"):
        return memory.Descriptor(x)
    return Int(x) if type(x) in (int, bool) else x


def _shape(shape: Any) -> list[int]:
    return [int(x) for x in shape]


def _scalars(plain: Callable[[Any, Any], Any], over_tensors: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        like = x if isinstance(x, Tensor) else y
        x, y = (v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=like.dtype) for v in (x, y))
        return over_tensors(x, y)
    found = plain(x, y)
    return Int(found) if isinstance(found, int) else found


def _of_floats(function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    return function(x if isinstance(x, Tensor) else torch.as_tensor(float(x)))


def _where(condition: Any, x: Any, y: Any) -> Any:
    if not any(isinstance(v, Tensor) for v in (condition, x, y)):
        return x if condition else y
    return torch.where(torch.as_tensor(condition).bool(), x, y)


def _inline(asm: str, constraints: str, args: Any, dtype: Any = None, **_: Any) -> Any:
    name = asm.split(None, 1)[0]
    for pattern, function in ASM.items():
        if re.fullmatch(pattern, name):
            return function(*args)
    raise NotImplementedError(f"{name} is not emulated: add it to ASM in {Path(__file__).name}")


def _static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise AssertionError(message)


def _reduced(over_all: Callable[..., Tensor], x: Tensor, axis: int | None = None, keep_dims: bool = False) -> Tensor:
    if axis is None:
        return over_all(x)
    return over_all(x, dim=int(axis), keepdim=keep_dims)


def _fma(x: Any, y: Any, z: Any) -> Tensor:
    like = next(v for v in (x, y, z) if isinstance(v, Tensor))
    wide = [v.double() if isinstance(v, Tensor) else v for v in (x, y, z)]
    return (wide[0] * wide[1] + wide[2]).to(like.dtype)


def _stand_ins(operands: bool, double: bool) -> dict[str, ModuleType]:
    """Return what modules of the package get for the names of Gluon's modules."""
    gl = ModuleType("gl")

    def missing(name: str) -> Any:
        raise NotImplementedError(f"gl.{name} is not emulated: add it to {Path(__file__).name}")

    # Layouts are the real ones, which check their own arguments.
    vars(gl).update({name: value for name, value in vars(real).items() if name.endswith("Layout")}, __getattr__=missing)
    vars(gl).update(DTYPES, constexpr=constexpr, tensor=Tensor, shared_memory_descriptor=memory.Shared)
    vars(gl).update(
        static_range=static_range,
        range=run_range,
        program_id=lambda axis=0: Int(running().index[axis]),
        num_programs=lambda axis=0: Int(running().grid[axis]),
        num_warps=lambda: Int(running().warps),
        load=load,
        store=store,
        allocate_shared_memory=memory.allocate,
        arange=lambda start, stop, layout=None: torch.arange(int(start), int(stop), dtype=torch.int32),
        zeros=lambda shape, dtype, layout=None: torch.zeros(_shape(shape), dtype=dtype),
        full=lambda shape, value, dtype, layout=None: (
            torch.zeros(_shape(shape), dtype=dtype) + torch.as_tensor(value, dtype=dtype)
        ),
        zeros_like=torch.zeros_like,
        full_like=torch.full_like,
        where=_where,
        sum=partial(_reduced, torch.sum),
        max=partial(_reduced, torch.amax),
        min=partial(_reduced, torch.amin),
        cumsum=lambda x, axis=0: x.cumsum(int(axis)),
        expand_dims=lambda x, axis: x.unsqueeze(int(axis)),
        broadcast=torch.broadcast_tensors,
        reshape=lambda x, shape: x.reshape(_shape(shape)),
        permute=lambda x, order: x.permute(_shape(order)),
        convert_layout=convert_layout,
        set_auto_layout=lambda x, layout: x,
        join=lambda x, y: torch.stack((x, y), -1),
        split=lambda x: (x[..., 0], x[..., 1]),
        cast=lambda x, dtype: x.to(dtype),
        fma=_fma,
        minimum=partial(_scalars, min, torch.minimum),
        maximum=partial(_scalars, max, torch.maximum),
        cdiv=lambda x, y: -(-x // y),
        to_tensor=lambda x: Int(x) if type(x) is int else x,
        multiple_of=lambda x, values: x,
        max_contiguous=lambda x, values: x,
        assume=_static_assert,
        static_assert=_static_assert,
        device_assert=_static_assert,
        inline_asm_elementwise=_inline,
        barrier=lambda **_: None,
        thread_barrier=lambda: None,
    )
    for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs", "sin", "cos", "floor", "ceil"):
        setattr(gl, name, partial(_of_floats, getattr(torch, name)))

    def jit(fn: Callable[..., Any] | None = None, **_: Any) -> Any:
        return partial(Kernel, operands=operands, double=double) if fn is None else Kernel(fn, operands, double)

    gluon, nvidia, hopper = ModuleType("gluon"), ModuleType("nvidia"), ModuleType("hopper")
    vars(gluon).update(jit=jit, constexpr_function=lambda fn: fn, language=gl)
    copy = memory.copy_to_shared
    back = memory.copy_to_global
    vars(hopper).update(
        warpgroup_mma=products.product,
        warpgroup_mma_wait=products.wait_for_products,
        warpgroup_mma_init=lambda x: x,
        warpgroup_mma_accumulator=Pending,
        fence_async_shared=memory.fence,
        mbarrier=memory.BARRIERS,
        # The names of triton 3.6 and of 3.9: kernels take the one that is there.
        tma=SimpleNamespace(
            async_copy_global_to_shared=copy,
            async_load=copy,
            async_copy_shared_to_global=back,
            async_store=back,
            store_wait=memory.wait_for_stores,
        ),
    )
    nvidia.hopper = hopper  # type: ignore[attr-defined]
    gl.nvidia = nvidia  # type: ignore[attr-defined]
    experimental = ModuleType("experimental")
    experimental.gluon = gluon  # type: ignore[attr-defined]
    root = "triton.experimental"
    return {
        root: experimental,
        f"{root}.gluon": gluon,
        f"{root}.gluon.language": gl,
        f"{root}.gluon.language.nvidia": nvidia,
        f"{root}.gluon.language.nvidia.hopper": hopper,
    }
