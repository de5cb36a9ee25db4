"""What a pass prepares in one launch, against float64: sums of gates, gradients of the quotient, squares, copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device import ON_GPU
from torch import Tensor

from hopper_on_cpu import hopper_on_cpu
from powerplan.kernels.call import LOWEST_LOG_GATE, CallShape, Inputs
from powerplan.kernels.triton import prepare as module
from powerplan.kernels.triton.config import most_registers
from powerplan.kernels.triton.launches import Launches
from powerplan.kernels.triton.prepare import OutputGrad, prepare
from powerplan.kernels.triton.shapes import LaunchShape

pytestmark = pytest.mark.skipif(ON_GPU, reason="calls kernels of both engines, and one of them emulates here")

CHUNK, BOUNDS = 200, [0, 250, 251, 600]
SLOTS = [(0, 200), (200, 250), (250, 251), (251, 451), (451, 600)]
"""Chunks of BOUNDS; one slot more is not used."""

GROUPS, REPEATS, TOKENS = 2, 2, BOUNDS[-1]


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program has 128 tokens, so that a chunk of 200 has two, and one of 50 one without tokens."""
    monkeypatch.setattr(module, "SPAN", 128)
    monkeypatch.setattr(module, "SHORT_SPAN", 128)
    with hopper_on_cpu():
        yield


class Made:
    """A call over BOUNDS and its sums of gates in float64, a [tokens, G] and a_M of each token's chunk."""

    def __init__(self, hopper: bool, gated: bool, p: int = 2) -> None:
        make = torch.Generator().manual_seed(0)

        def normal(heads: int, dim: int) -> Tensor:
            return torch.randn(1, TOKENS, heads, dim, generator=make).half()

        self.q, self.k, self.v = normal(GROUPS * REPEATS, 20), normal(GROUPS, 20), normal(GROUPS, 24)
        self.grad, self.out = normal(GROUPS * REPEATS, 24)[0], normal(GROUPS * REPEATS, 24)[0]
        self.norm = torch.rand(TOKENS, GROUPS * REPEATS, generator=make) + 0.5
        self.norm[3, 1] = 0.0  # a query that sees nothing
        log_g = -torch.rand(1, TOKENS, GROUPS, generator=make) * 0.05
        log_g[0, [20, 130]] = -torch.inf
        call = CallShape.of(self.q.shape, self.k.shape, self.v.shape, p, 0.25, CHUNK, p == 2)
        shape = LaunchShape(call, 3, torch.float16, 90, hopper=hopper)
        inputs = Inputs(self.q, self.k, self.v, log_g if gated else None, torch.tensor(BOUNDS))
        self.calls = Launches(shape, inputs)
        self.since, self.total = torch.zeros(2, TOKENS, GROUPS, dtype=torch.float64)
        for start, stop in SLOTS:
            if gated:
                self.since[start:stop] = log_g[0, start:stop].double().clamp(min=LOWEST_LOG_GATE).cumsum(0)
            self.total[start:stop] = self.since[stop - 1]

    @property
    def output(self) -> OutputGrad:
        return OutputGrad(self.grad, self.out, self.norm)

    def of_heads(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(REPEATS, 1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_sums_of_gates_hold_more_digits_than_float32(p: int, backward: bool) -> None:
    made = Made(False, True, p)
    prepare(made.calls, True, made.output if backward else None)
    words = made.calls.log_g_cumsum
    assert torch.equal(words[..., 0], made.since.float())
    torch.testing.assert_close(words.double().sum(-1), made.since, rtol=2**-47, atol=0)


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("has_states", [False, True])
def test_gradients_of_the_quotient(hopper: bool, has_states: bool) -> None:
    made = Made(hopper, True)
    inverse_norm, grad_norm, y = prepare(made.calls, has_states, made.output).norm_grads
    inverse = torch.where(made.norm == 0, 0.0, 1 / made.norm.double())
    exact = -(made.grad.double() * made.out.double()).sum(-1) * inverse
    torch.testing.assert_close(grad_norm.double(), exact, rtol=2**-20, atol=2**-20)
    if hopper:
        torch.testing.assert_close(y.double(), made.grad.double() * inverse[..., None], rtol=2**-10, atol=2**-23)
    else:
        assert y is made.grad
        torch.testing.assert_close(inverse_norm.double(), inverse, rtol=2**-22, atol=0)


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_squares_by_head_and_span(gated: bool, backward: bool, hopper: bool) -> None:
    made = Made(hopper, gated)
    prepared = prepare(made.calls, True, made.output if backward else None)
    parts = prepared.squares
    assert parts is not None
    x, factor = made.k[0], (made.total - made.since).exp()
    if backward:
        x = made.q[0]
        factor = made.of_heads(made.since).exp() * prepared.norm_grads.grad_norm.double() * 0.25**2
    wide = torch.nn.functional.pad(x.double(), (0, 12))
    repeats = REPEATS if backward else 1
    assert parts.shape == (6, GROUPS, 2 * repeats, 32, 32)
    assert (parts[5] == 0).all()
    for slot, (start, stop) in enumerate(SLOTS):
        for piece in range(2 * repeats):
            head, span = divmod(piece, 2)
            rows = slice(start + 128 * span, min(start + 128 * (span + 1), stop))
            left, scaled = (
                each[rows].unflatten(1, (GROUPS, repeats))[:, :, head] for each in (wide, wide * factor[..., None])
            )
            exact, terms = (torch.einsum("tgi,tgj->gij", *x) for x in ((left, scaled), (left.abs(), scaled.abs())))
            assert ((parts[slot, :, piece].double() - exact).abs() <= 2**-19 * terms + 1e-30).all()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("p", [2, 3])
def test_copies(p: int, gated: bool, backward: bool) -> None:
    """Time last, and times the factor; 0 past the end of a chunk, in padding, and in a slot that is not used."""
    made = Made(True, gated, p)
    prepared = prepare(made.calls, True, made.output if backward else None)
    assert prepared.copies is not None
    xt, y_copy = prepared.copies
    x, y, factor = made.k[0], made.v[0], (made.total - made.since).exp()
    if backward:
        x, y, factor = made.q[0], prepared.norm_grads.y, made.of_heads(made.since).exp() * 0.25**p
    scaled = y.double() * factor[..., None]
    expected_x, expected_y = torch.zeros_like(xt), torch.zeros_like(y_copy).double()
    for slot, (start, stop) in enumerate(SLOTS):
        expected_x[slot, :, :20, : stop - start] = x[start:stop].permute(1, 2, 0)
        expected_y[slot, :, : stop - start, :24] = scaled[start:stop].transpose(0, 1)
    assert torch.equal(xt, expected_x)
    torch.testing.assert_close(y_copy.double(), expected_y, rtol=2**-10, atol=2**-23)


def test_nothing_to_prepare_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(False, False, 1)
    monkeypatch.setattr(module, "launch", lambda *_: pytest.fail("a launch"))
    assert prepare(made.calls, True).squares is None
    assert prepare(made.calls, True, made.output).norm_grads.y is made.grad


def test_the_compiler_for_amd_is_not_told_of_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_registers(64) == {"maxnreg": 64}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert most_registers(64) is None
