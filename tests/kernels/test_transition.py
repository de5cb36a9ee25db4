"""What a stretch of tokens does to the state before it: the algebra that the exchange between ranks is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from powerplan.kernels.distributed.transition import after, applied, gradient, transposed

SIZES = {"head": (1, 1), "feature": (4, 1), "matrix": (4, 4)}


def some(kind: str, columns: int = 3) -> list[Tensor]:
    """Return two transitions [2, 3, ...], and two states [2, 3, 4, columns]."""
    torch.manual_seed(0)
    own = [torch.rand(2, 3, *SIZES[kind], dtype=torch.float64) for _ in range(2)]
    return own + [torch.randn(2, 3, 4, columns, dtype=torch.float64) for _ in range(2)]


def as_matrix(transition: Tensor) -> Tensor:
    """Return a transition [..., 4, 4]."""
    if transition.shape[-1] == 4:
        return transition
    return transition[..., 0].expand(*transition.shape[:-2], 4).diag_embed()


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("kind", SIZES)
def test_transitions_are_matrices_in_short(kind: str, columns: int) -> None:
    one, two, before, own = some(kind, columns)
    torch.testing.assert_close(after(one, before, own), as_matrix(one) @ before + own)
    torch.testing.assert_close(after(None, before, own), before + own)
    torch.testing.assert_close(as_matrix(applied(two, one)), as_matrix(two) @ as_matrix(one))
    torch.testing.assert_close(as_matrix(transposed(one)), as_matrix(one).mT)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("kind", SIZES)
def test_gradients_are_those_of_autograd(kind: str, columns: int) -> None:
    transition, _, before, own = some(kind, columns)
    transition.requires_grad_()
    grad = torch.randn_like(own)
    (expected,) = torch.autograd.grad(as_matrix(transition) @ before + own, transition, grad)
    torch.testing.assert_close(gradient(transition.shape, before, grad), expected)


def test_features_of_one_have_a_matrix_of_one() -> None:
    one, before, own = (torch.randn(2, 1, 1, columns, dtype=torch.float64) for columns in (1, 3, 3))
    torch.testing.assert_close(after(one, before, own), one @ before + own)
    torch.testing.assert_close(gradient(one.shape, before, own), own @ before.mT)


def test_products_are_not_rounded_under_autocast() -> None:
    transition, _, before, own = (x.float() for x in some("matrix"))
    calls = [
        lambda: after(transition, before, own),
        lambda: applied(transition, before),
        lambda: gradient(transition.shape, before, own),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            inside = call()
        assert torch.equal(inside, call())
