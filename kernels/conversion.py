"""From the shared layout of PowerState to the rows that an implementation works on, and back, with gradients.

An implementation lists its rows as (features, weight): row r of its phi(k) is weight times the product of those
features, and of its phi(q) the product alone. Rows may repeat a multiset, and may name features that do not exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial, prod, sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conversion:
    """Indices and factors between D entries of the shared layout and the rows of another."""

    to_index: Tensor
    to_factor: Tensor
    back_index: Tensor
    back_factor: Tensor

    def to(self, device: torch.device) -> Conversion:
        return Conversion(*(x.to(device) for x in (self.to_index, self.to_factor, self.back_index, self.back_factor)))

    def to_rows(self, x: Tensor) -> Tensor:
        """Return a state [N, D, W] of the shared layout in rows, [N, rows, W]."""
        return x.index_select(1, self.to_index) * self.to_factor.to(x)[:, None]

    def to_rows_adjoint(self, grad: Tensor) -> Tensor:
        """Return the gradient of `to_rows`' argument, [N, D, W], for that of its result, [N, rows, W]."""
        zeros = grad.new_zeros(grad.shape[0], len(self.back_index), grad.shape[2])
        return zeros.index_add_(1, self.to_index, grad * self.to_factor.to(grad)[:, None])

    def from_rows(self, x: Tensor) -> Tensor:
        """Return a state in rows, [N, rows, W], in the shared layout, [N, D, W]."""
        return x.index_select(1, self.back_index) * self.back_factor.to(x)[:, None]

    def from_rows_adjoint(self, grad: Tensor) -> Tensor:
        """Return the gradient of `from_rows`' argument, [N, rows, W], for that of its result, [N, D, W]."""
        zeros = grad.new_zeros(grad.shape[0], len(self.to_index), grad.shape[2])
        return zeros.index_copy_(1, self.back_index, grad * self.back_factor.to(grad)[:, None])


def conversion(rows: Iterable[tuple[tuple[int, ...], int]], d: int, p: int) -> Conversion:
    """Return the conversion for `rows`, each p features and a weight; features from d on are padding."""
    number = {multiset: index for index, multiset in enumerate(combinations_with_replacement(range(d), p))}
    to_index, to_factor = [], []
    back_index, back_factor = [0] * len(number), [0.0] * len(number)
    for features, weight in rows:
        multiset = tuple(sorted(features))
        if multiset[-1] >= d or not weight:
            to_index.append(0)
            to_factor.append(0.0)
            continue
        root = sqrt(factorial(p) // prod(factorial(multiset.count(feature)) for feature in set(multiset)))
        entry = number[multiset]
        back_index[entry] = len(to_index)
        back_factor[entry] = root / weight
        to_index.append(entry)
        to_factor.append(weight / root)
    return Conversion(
        torch.tensor(to_index),
        torch.tensor(to_factor, dtype=torch.float64),
        torch.tensor(back_index),
        torch.tensor(back_factor, dtype=torch.float64),
    )
