"""fp16 multiplies as tf32, whose operands a GPU cuts off after 10 bits: here the interpreter does so, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from powerplan.kernels import power_attention
from powerplan.kernels.testing import (
    Case,
    arguments,
    beyond_budget,
    budget,
    largest_error,
    plain,
    results,
    state_of,
    widened,
)
from powerplan.kernels.triton import keys, output, phi_gradient, queries, scan
from powerplan.kernels.triton.features import rounded

LONG = Case(tokens=300, batch=1, groups=1, repeats=1, key_dim=32, value_dim=32)


@pytest.fixture(autouse=True)
def _cut_off_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = InterpreterBuilder.create_dot

    def cut_off(operand: TensorHandle) -> TensorHandle:
        bits = np.ascontiguousarray(operand.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(bits.view(np.float32), operand.dtype)

    def create_dot(self: Any, left: TensorHandle, right: TensorHandle, total: Any, precision: Any, *rest: Any) -> Any:
        assert precision == ir.INPUT_PRECISION.TF32
        return exact(self, cut_off(left), cut_off(right), total, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@triton.jit
def rounded_kernel(p_x, p_rounded, SIZE: tl.constexpr):  # noqa: N803
    o_x = tl.arange(0, SIZE)
    tl.store(p_rounded + o_x, rounded(tl.load(p_x + o_x), tl.float32, "tf32"))


@triton.jit
def cut_off(b_x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # noqa: N803
    return b_x.to(OPERAND)


def run(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    inputs = case.inputs(torch.float16)
    returned = power_attention(
        *arguments(inputs),
        inputs["log_g"],
        p=case.p,
        normalize=case.normalize,
        chunk_size=16 if case.tokens < 100 else 128,
        initial_state=state_of(inputs),
        return_state=True,
        impl="triton",
    )
    return results(*returned, inputs), inputs


def test_operands_are_rounded_to_the_nearest_of_10_bits() -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    bits[:64] = bits[:64] // 2**13 * 2**13 + 2**12  # halfway
    bits[64:128] &= 2**23 - 1  # subnormal
    x = bits.to(torch.int32).view(torch.float32)
    x[128:131] = torch.tensor([0.0, -torch.inf, torch.inf])
    x[131:133] = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    got = torch.empty_like(x)
    rounded_kernel[(1,)](x, got, len(x))
    exponent = torch.frexp(x.double())[1].clamp(min=-125)
    unit = torch.ldexp(torch.ones(len(x), dtype=torch.float64), exponent - 11)
    nearest = x.double().sign() * (x.double().abs() / unit + 0.5).floor() * unit
    assert torch.equal(got[x.isfinite()], nearest.float()[x.isfinite()])
    assert torch.equal(got[x.isinf()], x[x.isinf()])
    assert torch.equal(got.isnan(), x.isnan())
    assert got[131:133].isnan().all()


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("p", "normalize"), [(1, False), (2, True), (2, False), (3, False), (4, True), (4, False)])
def test_fp16_is_within_the_budget_of_sixteen_bit_operands(p: int, normalize: bool, with_state: bool) -> None:
    case = Case(p=p, normalize=normalize, tokens=40, key_dim=6, with_state=with_state)
    if p == 4:  # 64 steps of phi, each a few milliseconds in the interpreter
        case = replace(case, tokens=20, batch=1, groups=1, key_dim=5)
    assert beyond_budget(case, torch.float16, *run(case), low_products=True) == {}


@pytest.mark.parametrize(("rounds", "beyond"), [(True, set()), (False, {"state kv", "gradient of log_g"})])
def test_rounding_keeps_errors_of_one_sign_out_of_sums(
    rounds: bool, beyond: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the usual budget is enough for rounded operands, over 300 tokens, and not for operands cut off."""
    if not rounds:
        for module in (keys, output, phi_gradient, queries, scan):
            monkeypatch.setattr(module, "rounded", cut_off)
    got, inputs = run(LONG)
    wide = widened(LONG, inputs)
    exact, allowed = results(*plain(LONG, wide), wide), budget(LONG, torch.float16, factor=2, low_products=True)
    assert {name for name in exact if not largest_error(got[name], exact[name]) <= allowed[name]} == beyond
