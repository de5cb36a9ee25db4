"""What tests of recurrences in chunks share: gradients, states in pieces and steps, float32 beside float64."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

Given = dict[str, Tensor]
"""Inputs by name, tokens in the second dim."""

Run = Callable[[Given], Tensor]
"""From inputs to outputs."""


def check_gradients(inputs: Given, run: Run, by_steps: Run) -> None:
    """Check that the gradient of every input is the recurrence's."""
    given = {name: x.requires_grad_() for name, x in inputs.items()}
    out, expected = run(given), by_steps(given)
    grad = torch.randn_like(out)
    own, other = (torch.autograd.grad(result, list(given.values()), grad) for result in (out, expected))
    for name, left, right in zip(given, own, other, strict=True):
        torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}")


def check_pieces(
    given: Given,
    scan: Callable[[Given, Tensor | None], tuple[Tensor, Tensor]],
    step: Callable[..., tuple[Tensor, Tensor]],
    without_tokens: Container[str] = (),
) -> None:
    """Check that 60 tokens give the same as pieces of 1, 17 and 39 and three single ones, each after the state before.

    scan: takes inputs and the state before them. step: takes those of one token, and `state`. without_tokens: inputs
    that are the same for all tokens.
    """
    whole, last = scan(given, None)
    outs: list[Tensor] = []
    state: Tensor | None = None
    for start, stop in ((0, 1), (1, 18), (18, 57)):
        piece = {name: x if name in without_tokens else x[:, start:stop] for name, x in given.items()}
        out, state = scan(piece, state)
        outs.append(out)
    for index in range(57, 60):
        assert state is not None
        one: dict[str, Any] = {name: x if name in without_tokens else x[:, index] for name, x in given.items()}
        out, state = step(**one, state=state)
        outs.append(out[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    torch.testing.assert_close(state, last)


def check_float32(narrow: Given, run: Run, allowed: float) -> None:
    """Check that outputs and gradients of float32 inputs are finite and follow those of float64.

    allowed: the largest error, as a share of the largest entry.
    """
    given = {name: x.requires_grad_() for name, x in narrow.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in narrow.items()}
    out, expected = run(given), run(exact)
    assert (out - expected).abs().max() <= allowed * expected.abs().max()
    grads = [
        torch.autograd.grad(result.square().sum(), list(parts.values()))
        for result, parts in ((out, given), (expected, exact))
    ]
    for name, own, other in zip(given, *grads, strict=True):
        assert own.isfinite().all(), name
        assert (own - other).abs().max() <= allowed * other.abs().max(), name
