"""A call of the Hopper engine over packed sequences, and what its kernels compute of it in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.triton.layout import padded_dim, steps
from powerplan.kernels.triton.prepare import OutputGrad, Prepared, prepare
from powerplan.kernels.triton.shapes import LaunchShape

ROUNDING = 2**-11
"""Half of the distance of two float16 numbers, against the smaller one."""

CHUNK, GROUPS, REPEATS = 64, 2, 2
"""Tokens of a chunk; heads."""

BOUNDS = [0, 70, 71, 199]
"""Three sequences of 2, 1 and 2 chunks. There is a slot for a sixth chunk, which is not used."""

SLOTS = [(0, 64), (64, 70), (70, 71), (71, 135), (135, 199)]
FIRST, LAST = {0, 2, 3}, {1, 2, 4}
TOKENS = BOUNDS[-1]


class Made:
    """A call over BOUNDS, in float16 with gates if nothing else is said, of the engine's launches."""

    def __init__(
        self,
        engine: Any,
        key_dim: int,
        value_dim: int,
        gated: bool = True,
        p: int = 2,
        dtype: torch.dtype = torch.float16,
        normalize: bool = True,
    ) -> None:
        self.p, self.dtype = p, dtype
        self.make = torch.Generator().manual_seed(0)
        q, k, v = self.normal(1, 4, key_dim), self.normal(1, 2, key_dim), self.normal(1, 2, value_dim)
        log_g = -torch.rand(1, TOKENS, GROUPS, generator=self.make) * 0.1 if gated else None
        call = CallShape.of(q.shape, k.shape, v.shape, p, key_dim**-0.5, CHUNK, normalize)
        shape = LaunchShape(call, 3, dtype, 90, hopper=True)
        inputs = Inputs(q, k, v, log_g, torch.tensor(BOUNDS))
        self.calls = engine.HopperLaunches(shape, inputs)
        self.shape = shape
        self.prepared = prepare(self.calls, True)
        self.width, self.columns = self.shape.phi_width, padded_dim(value_dim)
        self.q, self.k, self.v = self.calls.q, self.calls.k, self.calls.v
        # a of each token, and of the last token of its chunk, [tokens, G]
        self.since, self.total = torch.zeros(2, TOKENS, GROUPS, dtype=torch.float64)
        for start, stop in SLOTS:
            if log_g is not None:
                self.since[start:stop] = log_g[0, start:stop].double().cumsum(0)
            self.total[start:stop] = self.since[stop - 1]

    def normal(self, *batch_heads_dim: int) -> Tensor:
        batch, heads, dim = batch_heads_dim
        return torch.randn(batch, TOKENS, heads, dim, generator=self.make).to(self.dtype)

    def backward(self, value_dim: int) -> Prepared:
        """Return what is prepared for a backward pass."""
        grad, out = self.normal(1, 4, value_dim)[0], self.normal(1, 4, value_dim)[0]
        norm = 1 + torch.rand(TOKENS, 4, generator=self.make)
        return prepare(self.calls, True, OutputGrad(grad, out, norm))

    def states(self, dtype: torch.dtype | None = None) -> Tensor:
        """[slots, G, rows, columns]."""
        return torch.randn(6, GROUPS, self.shape.rows, self.columns, generator=self.make).to(dtype or self.dtype)

    def phi(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., rows], without weights, in the order of layout.py."""
        x = torch.nn.functional.pad(x, (0, self.width - x.shape[-1]))
        products = []
        for *fixed, lead, last, _ in steps(self.width, self.p):
            tile = x[..., lead : lead + 8] * x[..., fixed].prod(-1, keepdim=True)
            products.append((tile[..., None] * x[..., None, last : last + 8]).flatten(-2))
        return torch.cat(products, -1)


def through(made: Made, x: Tensor, states: Tensor) -> Tensor:
    """phi(x) S of each token's chunk: x [tokens, heads, K] -> [tokens, heads, columns]."""
    heads_of_group = x.shape[1] // GROUPS
    outs = []
    for slot, (start, stop) in enumerate(SLOTS):
        of_heads = states[slot].repeat_interleave(heads_of_group, 0)
        outs.append(torch.einsum("thr,hrv->thv", made.phi(x[start:stop]), of_heads))
    return torch.cat(outs)


def decay(made: Made, of_keys: bool) -> Tensor:
    """Between the state and each token and head, [tokens, heads, 1]."""
    exponent = made.total - made.since if of_keys else made.since.repeat_interleave(REPEATS, 1)
    return exponent.exp()[..., None] * (1.0 if of_keys else made.calls.power_scale)


def check_part(part: Tensor, exact: Tensor, allowed: Tensor, of_keys: bool, has_edge: bool) -> None:
    for slot, (start, stop) in enumerate(SLOTS):
        rows = slice(start, stop)
        if has_edge or slot not in (LAST if of_keys else FIRST):
            assert ((part[rows].double() - exact[rows]).abs() <= allowed[rows]).all()
        else:
            assert part[rows].isnan().all()  # not written
