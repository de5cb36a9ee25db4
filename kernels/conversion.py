"""From the layout of PowerState to the rows that an engine works on, and back, with gradients.

An engine lists its rows as (features, weight): row r of its phi(k) is `weight` times the product of these features, and
row r of its phi(q) is the product alone. Rows may repeat a multiset of features, and may name features that do not
exist, which are padding.
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
    """Indices and factors between the D entries of PowerState's layout and the rows of another.

    Attributes:
        to_index: [rows], the entry that each row takes.
        to_factor: [rows], the factor that it takes it with; 0 for padding.
        back_index: [D], one of the rows that hold each entry.
        back_factor: [D], the factor that turns that row into the entry.
    """

    to_index: Tensor
    to_factor: Tensor
    back_index: Tensor
    back_factor: Tensor

    def to(self, device: torch.device) -> Conversion:
        """Return the conversion with its tensors on a device."""
        return Conversion(*(x.to(device) for x in (self.to_index, self.to_factor, self.back_index, self.back_factor)))

    def to_rows(self, x: Tensor) -> Tensor:
        """Return states in PowerState's layout, [states, D, W], in rows, [states, rows, W]."""
        return x.index_select(1, self.to_index) * self.to_factor.to(x)[:, None]

    def to_rows_adjoint(self, grad: Tensor) -> Tensor:
        """Return the gradient of `to_rows`' argument, [states, D, W], for that of its result, [states, rows, W]."""
        zeros = grad.new_zeros(grad.shape[0], len(self.back_index), grad.shape[2])
        return zeros.index_add_(1, self.to_index, grad * self.to_factor.to(grad)[:, None])

    def from_rows(self, x: Tensor) -> Tensor:
        """Return states in rows, [states, rows, W], in PowerState's layout, [states, D, W]."""
        return x.index_select(1, self.back_index) * self.back_factor.to(x)[:, None]

    def from_rows_adjoint(self, grad: Tensor) -> Tensor:
        """Return the gradient of `from_rows`' argument, [states, rows, W], for that of its result, [states, D, W]."""
        zeros = grad.new_zeros(grad.shape[0], len(self.to_index), grad.shape[2])
        return zeros.index_copy_(1, self.back_index, grad * self.back_factor.to(grad)[:, None])


def conversion(rows: Iterable[tuple[tuple[int, ...], int]], d: int, p: int) -> Conversion:
    """Return the conversion for rows of p features and a weight each; features from d on are padding."""
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
