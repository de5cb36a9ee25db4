"""Derivatives that the chunked implementations do not have are errors that say so, and never zeros."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from powerplan.kernels import power_attention

SECOND = "power_attention have no second derivatives .*: use impl='reference' or impl='recurrent'"
FUNC = "impl='{}' has no gradients by torch.func .*: use torch.autograd, or impl='reference' or impl='recurrent'"
ENGINES = ["torch", "triton"]


def attend(impl: str) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        out = power_attention(x, x, x, x[..., 0].clamp(max=0), chunk_size=4, impl=impl)
        assert isinstance(out, Tensor)
        return out

    return call


def loss(impl: str) -> Callable[[Tensor], Tensor]:
    return lambda x: attend(impl)(x).square().sum()


def made() -> Tensor:
    return torch.randn(1, 6, 1, 4, generator=torch.Generator().manual_seed(0), device="cpu").to(
        torch.get_default_device()
    )


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("forward", [nullcontext, lambda: FlopCounterMode(display=False)], ids=["eager", "operator"])
@pytest.mark.parametrize("backward", [nullcontext, lambda: FlopCounterMode(display=False)], ids=["eager", "operator"])
def test_a_gradient_of_a_gradient(impl: str, forward: Callable[[], object], backward: Callable[[], object]) -> None:
    x = made().requires_grad_()
    with forward():  # type: ignore[attr-defined]
        value = loss(impl)(x)
    with backward():  # type: ignore[attr-defined]
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match=SECOND):
            grad.square().sum().backward()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("function", ["hessian", "hvp", "vhp"])
def test_hessians(impl: str, function: str) -> None:
    more = () if function == "hessian" else (made(),)
    with pytest.raises(RuntimeError, match=SECOND):
        getattr(torch.autograd.functional, function)(loss(impl), made(), *more)


def test_a_gradient_of_a_gradient_of_a_compiled_call() -> None:
    torch._dynamo.reset()
    x = made().requires_grad_()
    value = torch.compile(loss("torch"), backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|no second derivatives"):
        torch.autograd.grad(torch.autograd.grad(value, x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.vjp(f, x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.grad(torch.func.grad(f))(x),
        lambda f, x: torch.func.vmap(torch.func.grad(f))(x[None]),
        lambda f, x: torch.func.grad(lambda y: torch.func.vmap(f)(y).sum())(x[None]),
    ],
    ids=["grad", "vjp", "jacrev", "grad of grad", "vmap of grad", "grad of vmap"],
)
def test_gradients_by_torch_func(impl: str, differentiate: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=FUNC.format(impl)):
        differentiate(loss(impl), made())


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("mode", [nullcontext, lambda: FlopCounterMode(display=False)], ids=["eager", "operator"])
def test_batches_of_gradients(impl: str, mode: Callable[[], object]) -> None:
    x = made().requires_grad_()
    with mode():  # type: ignore[attr-defined]
        out = attend(impl)(x)
    with pytest.raises(RuntimeError, match="one gradient of their output at a time, without is_grads_batched=True"):
        torch.autograd.grad(out, x, torch.ones(3, *out.shape), is_grads_batched=True)


def change_and_go_back(out: Tensor, changed: Tensor) -> None:
    changed.mul_(2)
    out.sum().backward()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("changed", ["input", "output"])
@pytest.mark.parametrize("mode", [nullcontext, lambda: FlopCounterMode(display=False)], ids=["eager", "operator"])
def test_tensors_that_are_changed_before_the_backward_pass(impl: str, changed: str, mode: Callable[[], object]) -> None:
    leaf = made().requires_grad_()
    x = leaf.clone()
    with mode():  # type: ignore[attr-defined]
        out = attend(impl)(x)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|being modified inplace"):
            change_and_go_back(out, x.detach() if changed == "input" else out)


@pytest.mark.parametrize("impl", ["reference", "recurrent"])
def test_the_others_have_them(impl: str) -> None:
    x = made().double()
    second = torch.autograd.functional.hessian(loss(impl), x)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss(impl)))(x), second)
    step = 1e-6 * torch.randn_like(x)
    moved = [torch.func.grad(loss(impl))(x + sign * step) for sign in (1, -1)]
    torch.testing.assert_close((moved[0] - moved[1]) / 2, (second.flatten(4) @ step.flatten()), rtol=1e-4, atol=1e-9)
