"""The normaliser's state for p = 4 in the kernels of hopper/: a state of degree 3 whose values are keys.

(q.k)^4 = (q.k)^3 k.q = phi_3(q)^T (phi_3(k) k^T) q, so that with Z = sum phi_3(k) k^T a query's sum of weights is
(phi_3(q) Z).q, and 4 phi_3(q) Z its gradient by q. At K = V = 32 phi_3(q) Z is 0.07 of the products of phi_4(q) S; a
column of ones beside the values would be 8 more columns of the matrix unit. For p = 2 it is Z = sum k k^T (prepare.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from powerplan.kernels.triton.layout import TILE, settle, steps


@dataclass(frozen=True)
class KeyRows:
    """Between the key part of PowerState for p, [D], and Z = sum phi(k) k^T of degree p - 1, [rows, K].

    An entry holds sqrt(n) T with T the sum of products of p features and n their orders; a row of Z holds w T with w
    the weight of its step. The gradient of Z without weights is symmetric, too: every place of a product has the same.

    Attributes:
        entry: [rows K], the entry of each place.
        factor: [rows K], what makes the place of it; 0 for padding.
        inverse_root: [rows K], 1 / sqrt(n); 0 for padding.
        place: [D], a place of each entry.
        back_factor: [D], what makes the entry of it.
        root: [D], sqrt(n).
        head_dim: K.
    """

    entry: Tensor
    factor: Tensor
    inverse_root: Tensor
    place: Tensor
    back_factor: Tensor
    root: Tensor
    head_dim: int

    def to_rows(self, key: Tensor, adjoint: bool) -> Tensor:
        """[..., D] -> [..., rows, K]; adjoint: a gradient of `from_rows`' result -> that of its argument."""
        found = key.index_select(-1, self.entry) * (self.inverse_root if adjoint else self.factor)
        return found.view(*key.shape[:-1], -1, self.head_dim)

    def from_rows(self, rows: Tensor, adjoint: bool) -> Tensor:
        """[..., rows, K] -> [..., D]; adjoint: a gradient of `to_rows`' result -> that of its argument."""
        return rows.flatten(-2).index_select(-1, self.place) * (self.root if adjoint else self.back_factor)


@lru_cache(maxsize=16)
def key_rows(d: int, p: int, width: int, device: torch.device) -> KeyRows:
    """Return the conversion for d features; width: features that the steps are of, d and padding."""
    table = torch.tensor(steps(width, p - 1))
    within = torch.arange(TILE)
    # [steps, 8, 8, p - 1]: the fixed features, then those of both tiles.
    fixed = table[:, None, None, : p - 3].expand(-1, TILE, TILE, -1)
    lead = (table[:, p - 3, None, None] + within[:, None]).expand(-1, TILE, TILE)
    last = (table[:, p - 2, None, None] + within).expand(-1, TILE, TILE)
    features = torch.cat((fixed, lead[..., None], last[..., None]), -1).flatten(0, 2)
    weight = table[:, p - 1].repeat_interleave(TILE * TILE).double().repeat_interleave(d)
    column = torch.arange(d).repeat(len(features))
    chosen = torch.cat((features.repeat_interleave(d, 0), column[:, None]), 1).sort(1).values
    entries = torch.tensor(list(combinations_with_replacement(range(d), p)))
    powers = torch.tensor([width**place for place in reversed(range(p))])
    inside = (chosen < d).all(1)
    # In the order of combinations these numbers ascend.
    entry = torch.searchsorted((entries * powers).sum(1), (chosen * powers).sum(1)).where(inside, 0)
    orders = torch.zeros(len(entries), dtype=torch.float64)
    orders.index_add_(0, entry[inside], weight[inside])
    root = orders.sqrt()
    place = torch.zeros(len(entries), dtype=torch.int64)
    place[entry[inside]] = torch.arange(len(entry))[inside]
    factor, inverse_root = (x.where(inside, 0.0) for x in (weight / root[entry], 1 / root[entry]))
    back_factor = root / weight[place]
    made = KeyRows(
        entry.to(device),
        factor.float().to(device),
        inverse_root.float().to(device),
        place.to(device),
        back_factor.float().to(device),
        root.float().to(device),
        d,
    )
    settle(device)
    return made
