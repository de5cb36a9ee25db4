"""The kernels of attention within a chunk at degrees other than 2, each alone, against float64.

What comes from the state is given to them: for p = 1 as S, for p = 3 and 4 as their parts of sums and gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device import ON_GPU
from torch import Tensor

from hopper_on_cpu import PACKAGE, hopper_on_cpu
from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.triton.prepare import prepare
from powerplan.kernels.triton.shapes import LaunchShape

pytestmark = pytest.mark.skipif(
    ON_GPU, reason="with a GPU there is nothing to emulate: the other files test the engine"
)

ROUNDING, CHUNK, GROUPS, REPEATS, HEADS, K, V, PADDED = 2**-11, 128, 2, 2, 4, 20, 24, 32
"""Half of the distance of two float16 numbers, against the smaller one; tokens of a chunk; heads; head dims."""

BOUNDS = [0, 150, 151, 290]
"""Packed sequences of 2, 1 and 2 chunks. A chunk has two blocks of 64 tokens, a part of one, or one token."""

SLOTS = [(0, 128), (128, 150), (150, 151), (151, 279), (279, 290)]
FIRST, LAST, TOKENS = {0, 2, 3}, {1, 2, 4}, BOUNDS[-1]

SETTINGS = pytest.mark.parametrize(
    ("p", "gated", "normalize", "has_edge"),
    [
        (1, True, False, False),
        (1, False, False, True),
        (3, True, False, True),
        (3, False, False, False),
        (4, True, True, False),
        (4, False, True, True),
        (4, True, False, True),
    ],
)
"""Degrees, with gates, the normaliser, and a state before the first chunk (after the last) of a sequence or without."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with hopper_on_cpu():
        yield importlib.import_module(f"{PACKAGE}.run")


class Made:
    """A call over BOUNDS in float16, with gradients y of its sums of weighted values and u of its sums of weights."""

    def __init__(self, engine: Any, p: int, gated: bool, normalize: bool, has_edge: bool) -> None:
        self.p, self.normalize, self.has_edge = p, normalize, has_edge
        self.make = torch.Generator().manual_seed(p)
        self.q, self.k, self.v = self.normal(HEADS, K), self.normal(GROUPS, K), self.normal(GROUPS, V)
        self.y, self.u = self.normal(HEADS, V), self.normal(HEADS, 1).float()[..., 0].contiguous()
        self.states = torch.randn(6, GROUPS, PADDED, PADDED, generator=self.make).half()
        log_g = -0.2 * torch.rand(1, TOKENS, GROUPS, generator=self.make) if gated else None
        size = (1, TOKENS, GROUPS)
        call = CallShape.of((1, TOKENS, HEADS, K), (*size, K), (*size, V), p, K**-0.5, CHUNK, normalize)
        inputs = Inputs(self.q[None], self.k[None], self.v[None], log_g, torch.tensor(BOUNDS))
        self.calls = engine.HopperLaunches(LaunchShape(call, 3, torch.float16, 90, hopper=True), inputs)
        prepare(self.calls, False)
        self.sums = torch.zeros(TOKENS, GROUPS, dtype=torch.float64)
        for start, stop in SLOTS:
            if log_g is not None:
                self.sums[start:stop] = log_g[0, start:stop].double().cumsum(0)

    def normal(self, heads: int, dim: int) -> Tensor:
        return torch.randn(TOKENS, heads, dim, generator=self.make).half()

    def part(self, heads: int, dim: int, of_keys: bool) -> tuple[Tensor, Tensor]:
        """Return what stands for a part from the state, NaN where it is not written, and what it counts as."""
        part = torch.randn(TOKENS, heads, dim, generator=self.make)
        counted = part.double()
        for slot in () if self.has_edge else LAST if of_keys else FIRST:
            part[slice(*SLOTS[slot])], counted[slice(*SLOTS[slot])] = torch.nan, 0.0
        return part, counted

    def launch(self, engine: Any, name: str, rows: dict[str, Tensor], others: dict[str, Tensor], **more: Any) -> None:
        """Launch a kernel over rows of its own and those that it walks over."""
        own = engine.blocks(name, self.calls.shape)
        arguments = {f"{key}_desc": self.calls._rows(x, own.rows) for key, x in rows.items()}
        arguments |= {f"{key}_desc": self.calls._rows(x, own.columns) for key, x in others.items()}
        arguments |= {"BN": own.rows, "BM": own.columns} if name == "keys" else {"BM": own.rows, "BN": own.columns}
        heads = GROUPS if name == "keys" else HEADS
        pair = (self.states, self.calls.placeholder)
        self.calls._within(getattr(engine, f"{name}_kernel"), arguments | more, pair, heads, own, self.has_edge)

    def state_part(self, of_keys: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the state adds for p = 1: q S to out; of keys the number whose gradients it adds to dk and dv."""
        total, found = 0.0, []
        for slot, (start, stop) in enumerate(SLOTS):
            rows, state = slice(start, stop), self.states[slot].double()[:, :K, :V]
            if not self.has_edge and slot in (LAST if of_keys else FIRST):
                state = state * 0
            if of_keys:
                decay = (self.sums[stop - 1] - self.sums[rows]).exp()
                total = total + torch.einsum("tgk,gkv,tgv,tg->", k[rows], state, v[rows], decay)
            else:
                state, decay = (x.repeat_interleave(REPEATS, y) for x, y in ((state, 0), (self.sums[rows].exp(), 1)))
                found.append(torch.einsum("thk,hkv,th->thv", q[rows], state, decay) * K**-0.5)
        return total if of_keys else torch.cat(found)

    def within(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of weighted values [tokens, H, V] and of weights [tokens, H] within the chunks."""
        total, norm = [], []
        for start, stop in SLOTS:
            rows = slice(start, stop)
            keys, values, sums = (x[rows].repeat_interleave(REPEATS, 1) for x in (k, v, self.sums))
            unseen = torch.ones(stop - start, stop - start).tril().logical_not()[..., None]
            decay = (sums[:, None] - sums[None]).masked_fill(unseen, -torch.inf).exp()
            weights = (torch.einsum("thk,shk->tsh", q[rows], keys) * K**-0.5) ** self.p * decay
            total.append(torch.einsum("tsh,shv->thv", weights, values))
            norm.append(weights.sum(1))
        return torch.cat(total), torch.cat(norm)

    def gradients(self, of_keys: bool, *, of_terms: bool) -> tuple[Tensor, ...]:
        """Return dq, or dk and dv, within the chunks and for p = 1 through the state; of the terms' absolute values."""
        q, k, v, y = (x.double().abs() if of_terms else x.double() for x in (self.q, self.k, self.v, self.y))
        u = self.u.double().abs() if of_terms else self.u.double()
        wanted = [x.requires_grad_() for x in ((k, v) if of_keys else (q,))]
        total, norm = self.within(q, k, v)
        found = (total * y).sum() + ((norm * u).sum() if self.normalize else 0.0)
        if self.p == 1:
            states, self.states = self.states, self.states.abs() if of_terms else self.states
            part = self.state_part(of_keys, q, k, v)
            found = found + (part if of_keys else (part * y).sum())
            self.states = states
        return torch.autograd.grad(found, wanted)


def check(found: Tensor, exact: Tensor, terms: Tensor, roundings: int) -> None:
    """Hold a result to `roundings` of every term to 16 bits and one of itself; sums are in float32.

    float16 has no relative rounding below 2^-14, but an absolute one of 2^-25.
    """
    allowed = ROUNDING * (1.01 * roundings * terms + 1.01 * exact.abs()) + 2**-18 * terms + 2**-20
    excess = ((found.double() - exact).abs() - allowed).max().item()
    assert excess <= 0, excess


@SETTINGS
def test_output(engine: Any, p: int, gated: bool, normalize: bool, has_edge: bool) -> None:
    made = Made(engine, p, gated, normalize, has_edge)
    (part, part_counted), (norm_part, norm_counted) = made.part(HEADS, V, False), made.part(HEADS, 1, False)
    out, norm = torch.full_like(part, torch.nan).half(), torch.full((TOKENS, HEADS), torch.nan)
    # Sums of weights are positive at even degrees.
    more = {"p_part": part, "p_norm_part": norm_part.abs(), "p_out": out, "p_norm": norm, "DIM": V}
    made.launch(engine, "output", {"q": made.q}, {"k": made.k, "v": made.v}, **more)
    q, k, v = (x.double() for x in (made.q, made.k, made.v))
    total, exact_norm = made.within(q, k, v)
    terms, _ = made.within(q.abs(), k.abs(), v.abs())
    added = made.state_part(False, q, k, v) if p == 1 else part_counted
    total, terms = total + added, terms + added.abs()
    if normalize:
        exact_norm = exact_norm + norm_counted.abs()[..., 0]
        check(norm, exact_norm, exact_norm, 0)
        total, terms = total / exact_norm[..., None], terms / exact_norm[..., None]
    check(out, total, terms, 1)


@SETTINGS
def test_queries(engine: Any, p: int, gated: bool, normalize: bool, has_edge: bool) -> None:
    made = Made(engine, p, gated, normalize, has_edge)
    (part, counted), dq = made.part(HEADS, K, False), torch.full_like(made.q, torch.nan)
    dot = torch.full((TOKENS, HEADS), torch.nan)
    more = {"p_grad_norm": made.u, "p_part": part, "p_dq": dq, "p_q_dot_dq": dot, "DIM": K}
    made.launch(engine, "queries", {"q": made.q, "y": made.y}, {"k": made.k, "v": made.v}, **more)
    (exact,), (terms,) = made.gradients(False, of_terms=False), made.gradients(False, of_terms=True)
    if p > 1:
        exact, terms = exact + counted, terms + counted.abs()
    check(dq, exact, terms, 1)
    if gated:
        check(dot, (made.q * exact).sum(-1), (made.q.abs() * terms).sum(-1), 1)


@SETTINGS
def test_keys(engine: Any, p: int, gated: bool, normalize: bool, has_edge: bool) -> None:
    made = Made(engine, p, gated, normalize, has_edge)
    (part_k, counted_k), (part_v, counted_v) = made.part(GROUPS, K, True), made.part(GROUPS, V, True)
    dk, dv = torch.full_like(made.k, torch.nan), torch.full_like(made.v, torch.nan)
    dot = torch.full((TOKENS, GROUPS), torch.nan)
    more = {"p_grad_norm": made.u, "p_part_k": part_k, "p_part_v": part_v, "p_dk": dk, "p_dv": dv, "p_k_dot_dk": dot}
    rows, others = {"k": made.k, "v": made.v}, {"q": made.q, "y": made.y}
    made.launch(engine, "keys", rows, others, **more, DIM_K=K, DIM_V=V)
    exact, terms = (list(made.gradients(True, of_terms=of_terms)) for of_terms in (False, True))
    if p > 1:
        for index, counted in enumerate((counted_k, counted_v)):
            exact[index], terms[index] = exact[index] + counted, terms[index] + counted.abs()
    check(dk, exact[0], terms[0], 1)
    check(dv, exact[1], terms[1], 1)
    if gated:
        check(dot, (made.k * exact[0]).sum(-1), (made.k.abs() * terms[0]).sum(-1), 1)
