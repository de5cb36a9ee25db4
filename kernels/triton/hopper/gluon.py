"""Gluon, and what differs between the versions of it.

Gluon is an experimental part of triton, whose names move. The kernels of this folder take from here what has moved
between triton 3.6 and 3.9.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["all_threads", "constexpr_function", "copy_tile", "gl", "viewed", "viewed_as"]

constexpr_function: Any = gluon.constexpr_function

# Starts a copy of a tile from global to shared memory. It was async_copy_global_to_shared before triton 3.7.
copy_tile: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

# Waits for all threads of the program. It was thread_barrier before triton 3.7.
all_threads: Any = getattr(gl, "barrier", None) or gl.thread_barrier

# Shared memory seen with another shape. The method was _reinterpret before triton 3.7.
if hasattr(getattr(gl, "shared_memory_descriptor", None), "reinterpret"):

    @gluon.jit
    def viewed(memory, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
        """Return the same memory as [COUNT, ROWS, COLUMNS]."""
        return memory.reinterpret(memory.dtype, [COUNT, ROWS, COLUMNS], memory.layout)

    @gluon.jit
    def viewed_as(memory, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
        """Return the same memory as [COUNT, ROWS, COLUMNS] in another layout."""
        return memory.reinterpret(memory.dtype, [COUNT, ROWS, COLUMNS], LAYOUT)

else:

    @gluon.jit
    def viewed(memory, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
        """Return the same memory as [COUNT, ROWS, COLUMNS]."""
        return memory._reinterpret(memory.dtype, [COUNT, ROWS, COLUMNS], memory.layout)

    @gluon.jit
    def viewed_as(memory, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
        """Return the same memory as [COUNT, ROWS, COLUMNS] in another layout."""
        return memory._reinterpret(memory.dtype, [COUNT, ROWS, COLUMNS], LAYOUT)
