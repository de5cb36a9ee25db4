"""The Hopper engine on a CPU: its Gluon kernels in emulation, its plain Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

import torch
import triton.language as tl

from gluon_on_cpu import emulated
from powerplan.dims import hopper_takes
from powerplan.kernels.call import CallShape
from powerplan.kernels.triton import prepare, shapes

PACKAGE = "powerplan.kernels.triton.hopper"


def _takes(call: CallShape, dtype: torch.dtype, device: torch.device) -> bool:
    """`shapes.uses_hopper` for any device, for float16 too, and for kernels that no GPU has run."""
    return dtype.itemsize == 2 and hopper_takes(call.p, call.head_dim, call.v_head_dim, untried=True)


def _operand(dtype: torch.dtype) -> tuple[object, str, torch.dtype]:
    """`config.operand` for products of plain Triton: the interpreter cannot multiply bfloat16."""
    return tl.float32, "ieee", dtype


@contextmanager
def hopper_on_cpu() -> Iterator[None]:
    """Let impl="triton" take the Hopper engine for all its degrees, in float16 or bfloat16, while the context lasts."""
    # A shape remembers its engine.
    shapes._launch_shape.cache_clear()
    try:
        with emulated(PACKAGE), ExitStack() as patches:
            patches.enter_context(patch.object(shapes, "uses_hopper", _takes))
            for module in (prepare, import_module(f"{PACKAGE}.sums")):
                patches.enter_context(patch.object(module, "operand", _operand))
            yield
    finally:
        shapes._launch_shape.cache_clear()
