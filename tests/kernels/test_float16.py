"""float16 in the Hopper engine, whose operands are scaled: its range, and that scales change nothing else.

On a GPU the same calls run on what takes them there, which under POWERPLAN_HOPPER=all is this engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from device import ON_GPU
from torch import Tensor

from hopper_on_cpu import hopper_on_cpu
from powerplan.kernels import power_attention, power_state
from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.ops import chunked_power
from powerplan.kernels.state import PowerState
from powerplan.kernels.testing import Case, arguments, largest_error, plain, state_of, widened
from powerplan.kernels.triton.shapes import launch_shape
from powerplan.kernels.triton.tape import Operate, Tape

# Triton's interpreter computes with numpy, which warns of what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SMALL = Case(tokens=130, batch=1, groups=1, repeats=2, key_dim=20, value_dim=24, with_state=True)
"""Three chunks of 64, the last of 2 tokens."""

LEAST = 2.0**-24
"""The distance of the smallest numbers of float16: what a result near 0 loses where it is scaled down."""


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> Iterator[None]:
    with nullcontext() if ON_GPU else hopper_on_cpu():
        yield


class Powers(NamedTuple):
    """Powers of two that a call's tensors are multiplied by; those of states and gradients follow.

    scale is that of scores, grad that of the gradient of the output.
    """

    q: int = 0
    k: int = 0
    v: int = 0
    scale: int = 0
    grad: int = 0


class Gained(NamedTuple):
    """A result divided by the power of two that it gains, and how far rounding it near 0 may have moved it."""

    value: Tensor
    rounding: float


def gained(x: Tensor, gain: int) -> Gained:
    rounding = LEAST * 2.0 ** max(-gain, 0) if x.dtype == torch.float16 else 0.0
    return Gained(x.detach().double() * 2.0**-gain, rounding)


def coarse(x: Tensor) -> Tensor:
    """Return x in eighths: float16 holds them exactly where they are scaled down, too."""
    return (x.detach() * 8).round() / 8


def called(case: Case, powers: Powers, **settings: Any) -> dict[str, Gained]:
    """Return all results of a call whose tensors are multiplied by powers of two."""
    of_weights = 0 if case.normalize else 2 * (powers.q + powers.k + powers.scale)
    gains = {"q": powers.q, "k": powers.k, "v": powers.v, "kv": 2 * powers.k + powers.v, "key": 2 * powers.k}
    gains |= {"log_g": 0, "out": powers.v + of_weights}
    of_loss = gains["out"] + powers.grad
    given: dict[str, Tensor | None] = {}
    for name, x in case.inputs(torch.float16).items():
        if x is not None:
            x = (coarse(x) if name in ("q", "k", "v") else x.detach()) * 2.0 ** gains[name]
        given[name] = None if x is None else x.requires_grad_()
    state = None if given["kv"] is None else PowerState(given["kv"], given["key"])
    chosen = {"scale": case.scale * 2.0**powers.scale, "normalize": case.normalize, "initial_state": state} | settings
    out, end = power_attention(
        *arguments(given), given["log_g"], chunk_size=64, return_state=True, impl="triton", **chosen
    )
    parts = {"out": out, "kv": end.kv} | ({} if end.key is None else {"key": end.key})
    make = torch.Generator().manual_seed(1)
    weights = [
        coarse(torch.randn(part.shape, generator=make, device="cpu")).to(part) * 2.0 ** (of_loss - gains[name])
        for name, part in parts.items()
    ]
    named = {name: x for name, x in given.items() if x is not None}
    grads = torch.autograd.grad(list(parts.values()), list(named.values()), weights)
    return {name: gained(part, gains[name]) for name, part in parts.items()} | {
        f"gradient of {name}": gained(grad, of_loss - gains[name]) for name, grad in zip(named, grads, strict=True)
    }


def check_equal(found: dict[Any, Gained], expected: dict[Any, Gained]) -> None:
    for name, (value, rounding) in found.items():
        assert value.isfinite().all(), name
        error = (value - expected[name].value).abs().max().item()
        assert error <= max(rounding, expected[name].rounding), f"{name}: {error}"


@pytest.mark.parametrize(
    ("powers", "changes"),
    [
        (Powers(q=8, k=8, grad=6), {}),
        (Powers(q=-9, k=-9, grad=-6), {}),
        (Powers(q=5, k=-5), {"gated": False}),
        (Powers(v=9, grad=-9), {"with_state": False}),
        (Powers(q=6, k=6, scale=-12), {"normalize": False}),
        (Powers(q=-8, k=-8, scale=16, grad=-4), {"normalize": False, "gated": False}),
    ],
    ids=str,
)
def test_powers_of_two_change_nothing_else(powers: Powers, changes: dict[str, Any]) -> None:
    """Bit for bit: products of operands that are not scaled would be infinite, or vanish."""
    case = replace(SMALL, **changes)
    check_equal(called(case, powers), called(case, Powers()))


def test_what_every_token_has_of_its_own_changes_nothing_else() -> None:
    """The length of a query divides out of a normalised output, and multiplies its gradient."""
    case = replace(SMALL, with_state=False)
    inputs = {name: x if x is None else x.detach() for name, x in case.inputs(torch.float16).items()}
    q, k, v = (coarse(x) for x in arguments(inputs))
    size = torch.arange(case.tokens, device=q.device).remainder(17).sub(8).float().exp2()[None, :, None, None]
    weights = coarse(torch.randn((*v.shape[:2], 2, 24), generator=torch.Generator().manual_seed(1), device="cpu")).to(q)

    def called_with(q: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        asked = [x.clone().requires_grad_() for x in (q, k, v)]
        out = power_attention(*asked, inputs["log_g"], chunk_size=64, impl="triton")
        assert isinstance(out, Tensor)
        return out.detach(), *torch.autograd.grad(out, asked, weights)

    expected, found = called_with(q, weights), called_with((q * size).to(q.dtype), weights)
    for index in (0, 2, 3):
        assert torch.equal(found[index], expected[index])
    assert ((found[1].double() * size - expected[1].double()).abs() <= LEAST * size.clamp(min=1)).all()


@pytest.mark.parametrize(("gates", "names"), [("mild", "qkv"), ("resets", "qkv"), ("steep", "v")])
def test_late_and_lonely_tokens_keep_their_digits(gates: str, names: str) -> None:
    """Each row of each gradient against its own size, in the median: not the largest rows alone are right.

    The sums of weights of late tokens are large, and those of tokens after a closed gate as small as one q.k squared.
    Where all gates are steep a token sees itself alone, and the gradients of queries and keys are next to nothing.
    """
    case = replace(SMALL, tokens=1000, key_dim=16, value_dim=16, with_state=False, gates=gates)
    inputs = case.inputs(torch.float16)
    out = power_attention(*arguments(inputs), inputs["log_g"], chunk_size=128, impl="triton")
    wide = widened(case, inputs)
    exact, _ = plain(case, wide)
    assert isinstance(out, Tensor)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(out)
    for name in names:
        (grad,) = torch.autograd.grad(out, inputs[name], weights, retain_graph=True)
        (expected,) = torch.autograd.grad(exact, wide[name], weights.double(), retain_graph=True)
        error = (grad - expected).abs().amax(-1) / expected.abs().amax(-1).clamp(min=1e-30)
        late = error[:, -case.tokens // 4 :]
        assert max(error.median().item(), late.median().item()) <= 4 * torch.finfo(torch.float16).eps, name


@pytest.mark.parametrize("size", [2.0**-20, 2.0**20])
def test_states_of_any_size(size: float) -> None:
    """An initial state that is next to nothing beside what is added to it, or that is nearly all there is."""
    case = replace(SMALL, tokens=70)
    inputs = case.inputs(torch.float16)
    for name in ("kv", "key"):
        state = inputs[name]
        assert state is not None
        inputs[name] = (state.detach() * size).requires_grad_()
    wide = {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}
    start, wide_start = (PowerState(each["kv"], each["key"]) for each in (inputs, wide))
    settings: dict[str, Any] = {"chunk_size": 64, "return_state": True}
    out, end = power_attention(*arguments(inputs), inputs["log_g"], initial_state=start, impl="triton", **settings)
    exact, wide_end = power_attention(
        *arguments(wide), wide["log_g"], initial_state=wide_start, impl="reference", **settings
    )
    eps = torch.finfo(torch.float16).eps
    for found, expected in ((out, exact), (end.kv, wide_end.kv), (end.key, wide_end.key)):
        assert largest_error(found, expected) <= 8 * eps * expected.abs().max().item()
    names = ("q", "k", "v", "kv", "key")
    grads = torch.autograd.grad(out.float().sum(), [inputs[name] for name in names])
    for name, grad, expected in zip(
        names, grads, torch.autograd.grad(exact.sum(), [wide[name] for name in names]), strict=True
    ):
        assert largest_error(grad, expected) <= 64 * eps * expected.abs().max().item(), name


@pytest.mark.parametrize(("of_values", "of_keys"), [(2.0**15, 2.0**-6), (1.0, -32.0)], ids=["long values", "negative"])
def test_states_of_other_tokens(of_values: float, of_keys: float) -> None:
    """A state's values may be longer than the call's, whose outputs are then too; and its sums of weights negative."""
    made = torch.Generator().manual_seed(1)
    q, k, v, weights = (torch.randn((1, 320, 1, 16), generator=made, device="cpu").abs().half() for _ in range(4))
    before = [torch.randn((1, 50, 1, 16), generator=made, device="cpu").abs() for _ in range(2)]
    _, state = power_attention(before[0], *before, p=2, return_state=True, impl="reference")
    assert state.key is not None
    given = [q, k, v * 2.0**-4, state.kv * (of_values * of_keys * 2.0**-4), state.key * of_keys]

    def grads(dtype: torch.dtype | None, **settings: Any) -> tuple[Tensor, ...]:
        asked = [x.to(dtype or x.dtype).requires_grad_() for x in given]
        out = power_attention(*asked[:3], chunk_size=64, initial_state=PowerState(*asked[3:]), **settings)
        assert isinstance(out, Tensor)
        return out, *torch.autograd.grad(out, asked, (weights * 2.0**-8).to(out.dtype))

    for found, expected in zip(grads(None, impl="triton"), grads(torch.float64, impl="reference"), strict=True):
        assert largest_error(found, expected) <= 16 * torch.finfo(torch.float16).eps * expected.abs().max().item()


def test_sequences_have_scales_of_their_own() -> None:
    """Packed ones are those of each, bit for bit, though the keys of one are 2^10 times as long as another's."""
    bounds = [0, 1, 64, 128, 228]
    case = replace(SMALL, tokens=bounds[-1], key_dim=8, with_state=False)
    inputs = {name: x if x is None else x.detach() for name, x in case.inputs(torch.float16).items()}
    lengths = torch.tensor([stop - start for start, stop in pairwise(bounds)])
    sizes = torch.tensor([0, 4, -6, 0]).float().exp2().repeat_interleave(lengths)[None, :, None, None]
    timed = {name: coarse(x) * sizes.to(x) if name == "k" else x for name, x in inputs.items() if x is not None}

    def called_at(tokens: slice, **settings: Any) -> list[Tensor]:
        own = {name: x[:, tokens].clone().requires_grad_() for name, x in timed.items()}
        out, end = power_attention(*own.values(), chunk_size=64, return_state=True, impl="triton", **settings)
        grads = torch.autograd.grad(out.float().square().sum() + end.kv.sum(), list(own.values()))
        return [out.detach(), *grads]

    each = zip(*(called_at(slice(*ends)) for ends in pairwise(bounds)), strict=True)
    packed = called_at(slice(None), cu_seqlens=torch.tensor(bounds))
    for found, parts in zip(packed, each, strict=True):
        assert torch.equal(found, torch.cat(parts, 1))


def test_tokens_that_are_not_finite_leave_those_before_them_alone() -> None:
    case = replace(SMALL, with_state=False)
    inputs = {name: x if x is None else x.detach() for name, x in case.inputs(torch.float16).items()}
    q, k, v = (x.clone() for x in arguments(inputs))
    expected = power_attention(q, k, v, inputs["log_g"], chunk_size=64, impl="triton")
    k[:, 100], v[:, 110, :, 0] = torch.inf, torch.nan
    found = power_attention(q, k, v, inputs["log_g"], chunk_size=64, impl="triton")
    assert isinstance(expected, Tensor)
    assert isinstance(found, Tensor)
    assert torch.equal(found[:, :64], expected[:, :64])
    assert not found[:, 100].isfinite().any()


def test_a_long_key_takes_no_digits_from_others() -> None:
    """A scale that makes it 1 long would leave phi of the others 2^-16 times as large, in fp16 next to nothing."""
    case = replace(SMALL, tokens=200, key_dim=16, value_dim=16, with_state=False)
    inputs = {name: x if x is None else x.detach() for name, x in case.inputs(torch.float16).items()}
    _, k, _ = arguments(inputs)
    k[:, -1] *= 2.0**8
    inputs = {name: x if x is None else x.requires_grad_() for name, x in inputs.items()}
    out = power_attention(*arguments(inputs), inputs["log_g"], chunk_size=64, impl="triton")
    wide = widened(case, inputs)
    exact, _ = plain(case, wide)
    assert isinstance(out, Tensor)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(out)
    grads = torch.autograd.grad(out, [inputs[name] for name in "qkv"], weights)
    expected = torch.autograd.grad(exact, [wide[name] for name in "qkv"], weights.double())
    for name, found, right in zip(("out", *"qkv"), (out, *grads), (exact, *expected), strict=True):
        error = (found - right).abs().amax(-1) / right.abs().amax(-1).clamp(min=1e-30)
        assert error.median() <= 2 * torch.finfo(torch.float16).eps, name


@pytest.mark.parametrize(("normalize", "save_states"), [(True, True), (False, True), (True, False)])
def test_fake_tensors_are_like_real_ones(normalize: bool, save_states: bool) -> None:
    """Saved keys of this engine have the inputs' dtype, and float32 where there are none."""
    case = replace(SMALL, tokens=70, key_dim=8, value_dim=8, normalize=normalize, with_state=False)
    inputs = {name: x if x is None else x.detach() for name, x in case.inputs(torch.float16).items()}
    report = torch.library.opcheck(
        chunked_power,
        (*arguments(inputs), inputs["log_g"], None, None, 2, 0.5, 64, normalize, save_states, True, "triton"),
        test_utils="test_faketensor",
    )
    assert report == {"test_faketensor": "SUCCESS"}


def test_zeros() -> None:
    """No query, key, value or gradient has a length that a scale could follow from."""
    shape = (1, 130, 1, 16)
    q, k, v = (torch.zeros(shape, dtype=torch.float16, requires_grad=True) for _ in range(3))
    out, end = power_attention(q, k, v, chunk_size=64, return_state=True, impl="triton")
    results = (out, end.kv, *torch.autograd.grad(out, (q, k, v), torch.zeros_like(out)))
    assert all((x == 0).all() for x in results)


@pytest.mark.parametrize("powers", [Powers(k=8, v=-3), Powers(k=-9, v=6, grad=-6)], ids=str)
def test_a_state_alone(powers: Powers) -> None:
    """power_state, whose backward pass has no queries."""

    def made(powers: Powers) -> list[Gained]:
        inputs = {name: x if x is None else x.detach() for name, x in SMALL.inputs(torch.float16).items()}
        _, k, v = arguments(inputs)
        log_g = inputs["log_g"]
        assert log_g is not None
        given = [coarse(k) * 2.0**powers.k, coarse(v) * 2.0**powers.v, log_g]
        given = [x.requires_grad_() for x in given]
        state, _ = power_state(*given, p=2, chunk_size=64, impl="triton")
        gains = [2 * powers.k + powers.v, 2 * powers.k]
        make = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(part.shape, generator=make, device="cpu").to(part) * 2.0 ** (powers.grad - gain)
            for part, gain in zip(state, gains, strict=True)
        ]
        grads = torch.autograd.grad(list(state), given, weights)
        of_grads = [powers.grad - powers.k, powers.grad - powers.v, powers.grad]
        return [gained(x, gain) for x, gain in zip((*state, *grads), (*gains, *of_grads), strict=True)]

    check_equal(dict(enumerate(made(powers))), dict(enumerate(made(Powers()))))


def test_sums_of_a_long_sequence_stay_in_range() -> None:
    """Keys that all point one way: Z' and S' reach what the scales are made for."""
    from powerplan.kernels.triton.hopper.float16 import SUM, Scales, Sequences

    for tokens in (1, 1000, 2**14, 2**16 + 1, 2**20):
        k, v = torch.full((1, tokens, 1, 2), 3.0).half(), torch.full((1, tokens, 1, 2), 1e-3).half()
        inputs = Inputs(k, k, v)
        scales = Scales.of(inputs, None, True, Sequences(inputs))
        keys, values = (x.double() * 2.0 ** -scale.item() for x, scale in ((k, scales.keys), (v, scales.values)))
        assert values.norm(dim=-1).max() <= 1
        assert keys.square().sum() * max(1, 2 ** (SUM - 2) / tokens) >= 2 ** (SUM - 4)
        assert keys.square().sum() <= 2**SUM


def test_repeated_calls_run_by_a_tape() -> None:
    """Some operators give a value to Python, and then nothing is written down: a call would be laid out every time."""
    case = replace(SMALL, tokens=140)  # which no other test here has
    inputs = case.inputs(torch.float16)
    q, k, v = arguments(inputs)
    shape = launch_shape(CallShape.of(q.shape, k.shape, v.shape, 2, case.scale, 64, True), Inputs(q, k, v))
    for _ in range(3):
        out, end = power_attention(
            q,
            k,
            v,
            inputs["log_g"],
            p=2,
            chunk_size=64,
            initial_state=state_of(inputs),
            return_state=True,
            impl="triton",
        )
        torch.autograd.grad(out.float().sum() + end.kv.sum(), (q, k, v))
    tapes = list(shape.tapes.values())
    assert [type(tape) for tape in tapes] == [Tape, Tape]
    assert sum(isinstance(step, Operate) for tape in tapes for step in tape.steps) < 300
