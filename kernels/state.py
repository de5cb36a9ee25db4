"""PowerState: what power attention remembers of a sequence, in the layout that all implementations share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PowerState(NamedTuple):
    """State of N sequences with G key/value heads after their last token T.

    With a = cumsum(log_g) over each sequence, and phi = `spow` with its D = C(K+p-1, p) entries (arXiv 2507.04239):

    kv: [N, G, D, V], the sum over tokens j of exp(a_T - a_j) phi(k_j) v_j^T, plus exp(a_T) times the initial kv.
    key: [N, G, D], the sum over tokens j of exp(a_T - a_j) phi(k_j), plus exp(a_T) times the initial key. Its product
        with phi(q) is the sum of weights to divide by. None where the attention is not normalised.

    Both are float32, or float64 for float64 inputs. The scale of the attention weights is not part of them: it is
    applied to the queries. All implementations take and return this layout.
    """

    kv: Tensor
    key: Tensor | None = None

    def select(self, rows: Tensor) -> PowerState:
        """Return the states of these sequences, as beam search reorders them.

        Args:
            rows: [M] int64 on the states' device, in any order and with repeats: sequence i of the answer is sequence
                rows[i] here.
        """
        return PowerState(self.kv.index_select(0, rows), None if self.key is None else self.key.index_select(0, rows))


def vanishes(norm: Tensor) -> Tensor:
    """Return which sums of weights count as 0: those below the least normal number of float32, or float64 in float64.

    Such a number has lost digits, and so has the output that it divides.
    """
    return norm.abs() < torch.finfo(torch.promote_types(norm.dtype, torch.float32)).tiny


def divisor(norm: Tensor) -> Tensor:
    """Return what to divide by, for sums of weights of any shape.

    It is infinite where a sum vanishes, so that the output and its gradients are 0 there; and NaN where a sum has
    overflowed, as a finite number divided by it would be 0.
    """
    return norm.masked_fill(norm.isinf(), torch.nan).masked_fill(vanishes(norm), torch.inf)
