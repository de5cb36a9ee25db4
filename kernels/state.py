"""PowerState: what power attention remembers of a sequence, in the one layout that all implementations share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PowerState(NamedTuple):
    """State of N sequences after their last token T, with a = cumsum(log_g) over each sequence.

    kv:  [N, G, D, V], sum over j of exp(a_T - a_j) phi(k_j) v_j^T, plus exp(a_T) times the initial kv
    key: [N, G, D], sum over j of exp(a_T - a_j) phi(k_j) likewise: its product with phi(q) is the normaliser; None
        where the attention is not normalised

    D = C(K+p-1, p) in the order of powerplan.kernels.spow. float32, or float64 for float64 inputs. The scale of the
    attention weights is not part of it: it is applied to the queries.
    """

    kv: Tensor
    key: Tensor | None = None


def divisor(norm: Tensor) -> Tensor:
    """Return the sum of weights to divide by: 1 where it is 0, so that a query that sees nothing gets 0."""
    return norm.masked_fill(norm == 0, 1)
