"""What a tape keeps of the call that it was written from, and the memory that it takes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hopper_on_cpu import hopper_on_cpu
from powerplan.kernels import power_attention
from powerplan.kernels.testing import Case, arguments
from powerplan.kernels.triton import replay
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.replay import Tapes, repeat
from powerplan.kernels.triton.tape import Tape
from powerplan.kernels.triton.workspace import ALIGNMENT, Use, packed


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


USES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 4000)), max_size=12)


@given(USES)
def test_what_is_used_at_one_time_shares_no_memory(drawn: list[tuple[int, int, int]]) -> None:
    uses = [Use(min(first, last), max(first, last), size) for first, last, size in drawn]
    offsets, total = packed(uses)
    ends = [offset + use.size for offset, use in zip(offsets, uses, strict=True)]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert total % ALIGNMENT == 0
    assert max(ends, default=0) <= total
    for index, one in enumerate(uses):
        for other in range(index):
            apart = uses[other].last < one.first or one.last < uses[other].first
            assert apart or ends[other] <= offsets[index] or ends[index] <= offsets[other]
    # No more than without sharing, and no less than what is there at the worst time.
    whole = [-(-use.size // ALIGNMENT) * ALIGNMENT for use in uses]
    assert total <= sum(whole)
    for now in range(13):
        assert total >= sum(size for use, size in zip(uses, whole, strict=True) if use.first <= now <= use.last)


def test_tensors_of_other_times_share_memory() -> None:
    offsets, total = packed([Use(0, 1, 1000), Use(1, 3, 100), Use(2, 3, 900)])
    assert offsets == [0, 1024, 0]
    assert total == 1280


def test_a_pass_takes_no_more_memory_than_its_largest_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside results; and less than all of its tensors would take. What shares memory gives the same bits."""
    planned: list[tuple[list[Use], int]] = []

    def listen(uses: list[Use]) -> tuple[list[int], int]:
        offsets, total = packed(uses)
        planned.append((uses, total))
        return offsets, total

    monkeypatch.setattr(replay, "packed", listen)
    case = Case(tokens=200, batch=1, groups=1, repeats=1, key_dim=32, value_dim=32)
    inputs = case.inputs(torch.bfloat16)
    tensors = [x for x in inputs.values() if x is not None]
    made = []
    with hopper_on_cpu():
        for _ in range(3):
            out = power_attention(*arguments(inputs), inputs["log_g"], chunk_size=64, impl="triton")
            assert isinstance(out, Tensor)
            made.append((out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for first, repeated in zip(made[0], made[2], strict=True):
        assert torch.equal(first, repeated)
    assert len(planned) == 2
    for (uses, total), share in zip(planned, (0.95, 0.8), strict=True):
        largest = max(sum(use.size for use in uses if use.first <= now <= use.last) for now in range(100))
        assert total <= largest + ALIGNMENT * len(uses)
        assert total < share * sum(use.size for use in uses)
