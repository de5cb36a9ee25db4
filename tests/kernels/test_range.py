"""Queries and keys of any size: the output is right, or NaN or infinite where weights overflow, or 0 where they vanish.

Weights are powers: at p = 4 float32 holds those of products from 3e-10 to 4e9.
"""

from __future__ import annotations

import pytest
import torch
from device import triton_dtypes
from torch import Tensor

from powerplan.kernels import PowerState, empty_state, power_attention, power_attention_step

# Triton's interpreter computes with numpy, which warns of what a GPU does without a word.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

SIZES = [1e-19, 1e-10, 1e-5, 1e-2, 1.0, 1e2, 6e4, 1e6, 1e9, 1e19]
DEGREES = [(1, False), (2, True), (2, False), (3, False), (4, True), (4, False)]
LEAST = torch.finfo(torch.float32).tiny


def sized(size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of one sequence of 6 tokens; features of q and k are about `size`."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 6, 1, 3, generator=make, device="cpu") + 0.5 for _ in range(3))
    default = torch.get_default_device()
    return (q * size).to(default, dtype), (k * size).to(default, dtype), v.to(default, dtype)


@pytest.mark.parametrize("impl", ["reference", "recurrent", "torch", "triton"])
@pytest.mark.parametrize(("p", "normalize"), DEGREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_output_is_wrong_and_finite(p: int, normalize: bool, dtype: torch.dtype, impl: str) -> None:
    if impl == "triton" and dtype not in triton_dtypes():
        pytest.skip("the interpreter of triton cannot multiply bfloat16: make gpu runs this on a GPU")
    if impl == "reference" and dtype != torch.float32:
        pytest.skip("it evaluates the definition in the inputs' dtype, whose range it has")
    limits = torch.finfo(dtype)
    # One token a chunk of 3, and the state before it: both ways that a weight is made.
    for size in SIZES[::3] if impl == "triton" else SIZES:
        q, k, v = sized(size, dtype)
        out = power_attention(q, k, v, p=p, normalize=normalize, chunk_size=3, impl=impl)
        assert isinstance(out, Tensor)
        wide = (q.double(), k.double(), v.double())
        exact = power_attention(*wide, p=p, normalize=normalize, impl="reference")
        sums = power_attention(*wide[:2], torch.ones_like(wide[2]), p=p, normalize=False, impl="reference")
        assert isinstance(exact, Tensor)
        assert isinstance(sums, Tensor)
        right = (out.double() - exact).abs() <= 16 * limits.eps * exact.abs() + limits.tiny
        vanished = (out == 0) & (sums < 2 * LEAST)
        assert (right | vanished | ~out.isfinite()).all(), f"size {size}: {out}, exact {exact}"
        # Far from both ends of the range there is no way out.
        lengths = [x.double().norm(dim=-1).max() for x in (q, k)]
        norms = max(*lengths, lengths[0] * lengths[1] * 3**-0.5) ** p
        largest = exact.abs().max()
        if norms < 1e36 and sums.min() > 1e-36 and limits.tiny < exact.abs().min() and largest < limits.max / 2:
            assert right.all(), f"size {size}: {out}, exact {exact}"


@pytest.mark.parametrize("impl", ["recurrent", "torch", "triton"])
def test_a_sum_that_overflows_is_no_zero(impl: str) -> None:
    """Values small enough that their weighted sum is finite, divided by a sum of weights that is not."""
    q, k, v = sized(3e9, torch.float32)
    out = power_attention(q, k, v * 1e-30, chunk_size=3, impl=impl)
    assert isinstance(out, Tensor)
    assert ((out > 0.4e-30) | ~out.isfinite()).all()
    assert not out.isfinite().all()


@pytest.mark.parametrize("impl", ["recurrent", "torch", "triton"])
def test_weights_that_vanish_have_output_0_and_gradients_0(impl: str) -> None:
    q, k, v = (x.requires_grad_() for x in sized(1e-11, torch.float32))
    log_g = torch.zeros(1, 6, 1, requires_grad=True)
    out = power_attention(q, k, v, log_g, chunk_size=3, impl=impl)
    assert isinstance(out, Tensor)
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v, log_g)):
        assert (grad == 0).all()


@pytest.mark.parametrize("impl", ["recurrent", "triton"])
@pytest.mark.parametrize("size", [1e-19, 1e-11, 1.0, 1e11])
def test_a_step_has_the_same_range(impl: str, size: float) -> None:
    q, k, v = sized(size, torch.float32)
    state: PowerState = empty_state(k, v, 2)
    for token in range(6):
        with torch.no_grad():
            out, state = power_attention_step(q[:, token], k[:, token], v[:, token], None, state, impl=impl)
        if size < 1e-10:
            assert (out == 0).all()
        elif size > 1e10:
            assert not out.isfinite().any()
    if size == 1.0:
        torch.testing.assert_close(out, power_attention(q, k, v)[:, -1])  # type: ignore[call-overload]
