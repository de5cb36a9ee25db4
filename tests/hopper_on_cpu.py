"""The Hopper engine on a CPU: its Gluon kernels in emulation, its plain Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import triton.language as tl

from gluon_on_cpu import emulated
from powerplan.kernels.call import CallShape
from powerplan.kernels.triton import prepare, shapes

PACKAGE = "powerplan.kernels.triton.hopper"


def _takes(call: CallShape, dtype: torch.dtype, device: torch.device) -> bool:
    """`shapes.uses_hopper` for any device, and for float16 too."""
    return call.p == 2 and dtype.itemsize == 2 and max(call.head_dim, call.v_head_dim) <= 128


def _operand(dtype: torch.dtype) -> tuple[object, str, torch.dtype]:
    """`config.operand` for the normaliser's squares: the interpreter cannot multiply bfloat16."""
    return tl.float32, "ieee", dtype


@contextmanager
def hopper_on_cpu() -> Iterator[None]:
    """Let impl="triton" take the Hopper engine for calls with p = 2 in float16 or bfloat16, while the context lasts."""
    # A shape remembers its engine.
    shapes._launch_shape.cache_clear()
    try:
        with emulated(PACKAGE), patch.object(shapes, "uses_hopper", _takes), patch.object(prepare, "operand", _operand):
            yield
    finally:
        shapes._launch_shape.cache_clear()
