"""Which calls do without the operators, and that these give the same bits; forward-mode and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

from powerplan.kernels import eager, empty_state, engines, power_attention, power_attention_step
from powerplan.kernels.eager import has_tangent, is_eager
from powerplan.kernels.state import PowerState
from powerplan.kernels.testing import Case, arguments, results, state_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at its first jvp


class Own(Tensor):
    """A subclass with nothing of its own: others see to operators, as distributed tensors do."""


def run_in_a_mode(answer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with FlopCounterMode(display=False):
        answer(x)


@pytest.mark.parametrize(
    "surround",
    [
        run_in_a_mode,
        lambda answer, x: torch.func.vmap(answer)(x),
        lambda answer, x: torch.func.grad(lambda y: answer(y).sum())(x),
        lambda answer, x: torch.func.jvp(answer, (x,), (x,)),
        lambda answer, x: make_fx(answer)(x),
        lambda answer, x: make_fx(answer, tracing_mode="fake")(x),
        lambda answer, x: torch.compile(answer, backend="eager", fullgraph=True)(x),
        lambda answer, x: answer(x.as_subclass(Own)),
        lambda answer, x: answer(x.to("meta")),
    ],
    ids=["mode", "vmap", "grad", "jvp", "make_fx", "fake", "compile", "subclass", "meta"],
)
def test_what_needs_an_operator_gets_one(surround: Callable[[Callable[[Tensor], Tensor], Tensor], object]) -> None:
    answers = []

    def answer(x: Tensor) -> Tensor:
        answers.append(is_eager(x))
        return x * 2

    surround(answer, torch.randn(3))
    assert answers
    assert not any(answers)


@pytest.mark.parametrize("surround", [nullcontext, torch.no_grad, torch.inference_mode])
def test_plain_calls_need_none(surround: Callable[[], Any]) -> None:
    with surround():
        assert is_eager(torch.randn(3), None, Parameter(torch.randn(3)))


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_both_ways_give_the_same_bits(
    engine: str, with_state: bool, return_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Case(tokens=20, batch=1, groups=1, with_state=with_state).inputs(torch.float32)
    given = [x for x in inputs.values() if x is not None]

    def call() -> list[Tensor]:
        returned = power_attention(
            *arguments(inputs),
            inputs["log_g"],
            initial_state=state_of(inputs),
            return_state=return_state,
            chunk_size=8,
            impl=engine,
        )
        out, *state = (returned[0], *returned[1]) if isinstance(returned, tuple) else (returned,)
        parts = [out, *(x for x in state if x is not None)]
        grads = torch.autograd.grad(sum(x.square().sum() for x in parts), given)
        return [*(x.detach() for x in parts), *grads]

    without = call()
    used = []
    monkeypatch.setattr(eager, "is_eager", lambda *_: used.append(1))
    with_operators = call()
    assert used
    for one, other in zip(without, with_operators, strict=True):
        assert torch.equal(one, other)


def test_gradients_of_a_state_that_is_not_used_and_of_an_output_that_is_not() -> None:
    inputs = Case(tokens=20, batch=1, groups=1).inputs()
    tensors = [*arguments(inputs), inputs["log_g"]]
    out, state = power_attention(*tensors, return_state=True, chunk_size=8)
    expected, wanted = power_attention(*tensors, return_state=True, impl="reference")
    for one, other in ((out, expected), (state.kv, wanted.kv)):
        grads, right = (torch.autograd.grad(x.sum(), tensors[1:], retain_graph=True) for x in (one, other))
        torch.testing.assert_close(grads, right)


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_a_mode_that_begins_after_the_forward_pass_sees_the_backward_pass(engine: str) -> None:
    inputs = Case(tokens=20, batch=1, groups=1).inputs(torch.float32)

    def loss() -> Tensor:
        out = power_attention(*arguments(inputs), inputs["log_g"], chunk_size=8, impl=engine)
        assert isinstance(out, Tensor)
        return out.sum()

    with FlopCounterMode(display=False) as whole:
        loss().backward()
    with FlopCounterMode(display=False) as forward:
        loss()
    outside = loss()
    with FlopCounterMode(display=False) as backward:
        outside.backward()
    assert backward.get_total_flops() == whole.get_total_flops() - forward.get_total_flops() > 0


def attend(impl: str) -> Callable[[Tensor], Tensor]:
    def call(q: Tensor) -> Tensor:
        out = power_attention(q, q, q, chunk_size=4, impl=impl)
        assert isinstance(out, Tensor)
        return out

    return call


FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda call, q: torch.func.jvp(call, (q,), (q,)),
    "jacfwd": lambda call, q: torch.func.jacfwd(call)(q),
    "jvp of vmap": lambda call, q: torch.func.jvp(torch.func.vmap(call), (q[None],), (q[None],)),
    "hessian": lambda call, q: torch.func.hessian(lambda x: call(x).sum())(q),
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused(name: str, impl: str) -> None:
    """The operators have no forward derivative, and torch takes a missing one for 0."""
    q = torch.randn(1, 6, 1, 4)
    with pytest.raises(ValueError, match=f"impl='{impl}' has no forward-mode derivatives.*use impl='reference'"):
        FORWARD_MODE[name](attend(impl), q)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_are_refused_and_others_beside_them_are_not(requires_grad: bool) -> None:
    q = torch.randn(1, 6, 1, 4, requires_grad=requires_grad)
    call = attend("torch")
    expected = call(q)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(ValueError, match="no forward-mode derivatives"):
            call(dual)
        assert not has_tangent(q, None)
        assert torch.equal(call(q), expected)


@pytest.mark.parametrize("impl", ["reference", "recurrent"])
def test_forward_mode_of_the_others_is_the_derivative(impl: str) -> None:
    q, t = torch.randn(2, 1, 6, 1, 4, dtype=torch.float64)
    _, tangent = torch.func.jvp(attend(impl), (q,), (t,))
    step = 1e-6
    torch.testing.assert_close(tangent, (attend(impl)(q + step * t) - attend(impl)(q - step * t)) / (2 * step))


def test_forward_mode_of_a_step() -> None:
    q = torch.randn(1, 1, 4)
    state = empty_state(q[:, None], q[:, None], 2)

    def call(x: Tensor, impl: str = "auto") -> Tensor:
        return power_attention_step(x, q, q, None, PowerState(state.kv + 1, state.key), impl=impl)[0]

    with pytest.raises(ValueError, match="impl='triton' has no forward-mode derivatives"):
        torch.func.jvp(lambda x: call(x, "triton"), (q,), (q,))
    _, tangent = torch.func.jvp(call, (q,), (torch.ones_like(q),))
    assert bool((tangent != 0).any())


def test_gradients_with_a_graph_are_the_same_and_have_no_gradient() -> None:
    inputs = Case(tokens=12, batch=1, groups=1).inputs()
    given = [*arguments(inputs), inputs["log_g"]]
    loss = power_attention(*given, chunk_size=4).square().sum()
    plain = torch.autograd.grad(loss, given, retain_graph=True)
    graphed = torch.autograd.grad(loss, given, create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, graphed, strict=True))
    with pytest.raises(RuntimeError, match=r"power_attention have no second derivatives .*: use impl='reference'"):
        torch.autograd.grad(graphed[3].sum(), given)


def test_nothing_is_saved_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    forward = engines.forward

    def listen(*given: Any) -> Any:
        asked.append(given[4])
        return forward(*given)

    monkeypatch.setattr(engines, "forward", listen)
    inputs = Case(tokens=6, batch=1).inputs()
    power_attention(*arguments(inputs))
    with torch.no_grad():
        power_attention(*arguments(inputs))
    power_attention(*(x.detach() for x in arguments(inputs)))
    assert asked == [True, False, False]


def test_saved_tensors_go_through_hooks() -> None:
    """Offloading and checkpoints of activations see them all."""
    inputs = Case(tokens=12, batch=1).inputs()
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, state = power_attention(*arguments(inputs), inputs["log_g"], chunk_size=4, return_state=True)
    assert len(packed) >= 6  # q, k, v, log_g, the output and the sums of weights
    again = power_attention(*arguments(inputs), inputs["log_g"], chunk_size=4, return_state=True)
    hooked, plain = results(out, state, inputs), results(*again, inputs)
    assert all(torch.equal(hooked[name], plain[name]) for name in plain)
