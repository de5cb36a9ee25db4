"""What a stretch of tokens does to the state before it: multiplies it by its transition, and adds its own state.

H' = A H + S, for states [..., D, W]. A transition A is [..., 1, 1], one decay of each head (power attention);
[..., D, 1], one decay of each feature of its keys (gated linear attention); or [..., D, D], a matrix of each head
(delta rules). The first two multiply element by element.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_matrix(transition: Tensor) -> bool:
    """Whether a transition has a matrix of each head, and not decays."""
    return transition.shape[-1] > 1


def applied(transition: Tensor, x: Tensor) -> Tensor:
    """Return a transition times x: a state, or the transition of the stretch before."""
    return _product(transition, x) if is_matrix(transition) else transition * x


def after(transition: Tensor | None, before: Tensor, own: Tensor) -> Tensor:
    """Return the state after a stretch: its own, plus its transition times the state before. None stands for 1."""
    if transition is None:
        return before + own
    if is_matrix(transition):
        return _product(transition, before).add_(own)
    return torch.addcmul(own, transition, before)


def transposed(transition: Tensor) -> Tensor:
    """Return what the gradient of the state after a stretch is multiplied by, for that of the state before."""
    return transition.mT if is_matrix(transition) else transition


def gradient(size: torch.Size, before: Tensor, grad_after: Tensor) -> Tensor:
    """Return the gradient of a transition of `size`, from the state before and the gradient of the state after."""
    if size[-1] > 1:
        return _product(grad_after, before.mT)
    return (before * grad_after).sum_to_size(size)


def _product(one: Tensor, two: Tensor) -> Tensor:
    with torch.autocast(one.device.type, enabled=False):  # which would round it to half precision
        return one @ two
