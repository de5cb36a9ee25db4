"""float32 multiplies outside the matrix unit, one multiply-add after the other: here the interpreter does so, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from powerplan.kernels import power_attention
from powerplan.kernels.testing import Case, arguments, plain, widened
from powerplan.kernels.triton import output


@pytest.fixture(autouse=True)
def _chains_of_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dot(_: Any, left: TensorHandle, right: TensorHandle, total: TensorHandle, *rest: Any) -> TensorHandle:
        rows, columns, chain = left.data.astype(np.float64), right.data.astype(np.float64), total.data
        for index in range(rows.shape[1]):  # In float64 a product of two float32 is exact: one rounding, as in an FMA.
            chain = (chain + rows[:, index, None] * columns[None, index]).astype(np.float32)
        return TensorHandle(chain, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@triton.jit
def add_to_chain(b_left, b_right, b_sum, P: tl.constexpr, PRECISION: tl.constexpr):  # noqa: N803
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


def output_error() -> float:
    """Return the relative error of the output of 32 tokens at p = 4: half of them read a state of 20,480 rows."""
    case = Case(p=4, tokens=32, batch=1, groups=1, repeats=1, key_dim=16, value_dim=16, gated=False)
    inputs = case.inputs(torch.float32)
    exact, _ = plain(case, widened(case, inputs))
    with torch.no_grad():
        out = power_attention(*arguments(inputs), p=4, chunk_size=16, impl="triton")
    assert isinstance(out, torch.Tensor)
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.slow
def test_the_output_is_not_one_chain_over_all_steps_of_phi(monkeypatch: pytest.MonkeyPatch) -> None:
    in_steps = output_error()
    monkeypatch.setattr(output, "add_product", add_to_chain)
    in_one_chain = output_error()
    assert in_one_chain > 3 * in_steps
    assert in_steps < 5 * torch.finfo(torch.float32).eps
