"""What a tape keeps of the call that it was written from."""

from __future__ import annotations

import gc
import weakref

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.replay import Tapes, repeat
from powerplan.kernels.triton.tape import Tape


@triton.jit
def double_kernel(desc, p_to, size: tl.constexpr):
    """Store twice a tile [size, size] of a described tensor."""
    o = tl.arange(0, size)
    tl.store(p_to + o[:, None] * size + o[None, :], 2 * desc.load([0, 0]))


def test_a_tape_holds_no_tensor_of_its_call_by_a_descriptor() -> None:
    """A descriptor has its tensor, and the states of a long call are gigabytes."""
    described: list[weakref.ref[Tensor]] = []

    def double(x: Tensor) -> Tensor:
        def lay_out() -> tuple[Tensor]:
            copied, doubled = torch.empty_like(x), torch.empty_like(x)
            launch(double_kernel, 1, {"desc": TensorDescriptor.from_tensor(x, [16, 16]), "p_to": copied, "size": 16})
            launch(
                double_kernel, 1, {"desc": TensorDescriptor.from_tensor(copied, [16, 16]), "p_to": doubled, "size": 16}
            )
            described.append(weakref.ref(copied))
            return (doubled,)

        (result,) = repeat(tapes, "double", (x,), lay_out)
        assert result is not None
        return result

    tapes: Tapes = {}
    for value in (1.0, 2.0, 3.0):
        x = torch.full((16, 16), value)
        described.append(weakref.ref(x))
        assert torch.equal(double(x), 4 * x)
    del x
    gc.collect()
    assert [type(tape) for tape in tapes.values()] == [Tape]
    assert [ref() for ref in described] == [None] * 5  # The third call ran by the tape, which made no descriptor here.
