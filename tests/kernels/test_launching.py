"""Launches without the JIT, and passes that are repeated from a tape."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from powerplan.kernels import power_attention
from powerplan.kernels.testing import Case, arguments, state_of
from powerplan.kernels.triton import launching, shapes
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.replay import MOST_ATTEMPTS, repeat
from powerplan.kernels.triton.tape import Tape


def copy_kernel(p_from, p_to, scale, count, block: tl.constexpr, flag: tl.constexpr):  # type: ignore[no-untyped-def]
    """Never compiled: what matters is how it starts."""


class Compiled:
    """Stands for a compiled kernel, and keeps what it is started with."""

    function, packed_metadata, launch_metadata = 7, (4, 1, 0), staticmethod(lambda *_: None)

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []

    def run(self, *given: Any) -> None:
        self.started.append(given)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """Return the list of what the JIT compiles, for a GPU of compute capability 9.0 that is not there."""
    made: list[Compiled] = []

    def do_compile(self: Any, key: Any, signature: Any, device: int, *_: Any, **__: Any) -> Compiled:
        made.append(Compiled())
        self.device_caches[device][0][key] = made[-1]
        return made[-1]

    target = GPUTarget("cuda", 90, 32)
    functions = {
        "get_current_device": lambda: 0,
        "get_current_stream": lambda _: 5,
        "get_current_target": lambda: target,
    }
    monkeypatch.setattr(driver, "_active", SimpleNamespace(**functions))
    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    monkeypatch.setattr(launching, "_launchers", {})
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    return made


@pytest.fixture
def kernel() -> Any:
    return JITFunction(copy_kernel)


def given(**changes: Any) -> dict[str, Any]:
    made = {"p_from": torch.zeros(64), "p_to": torch.zeros(64), "scale": 0.5, "count": 64, "block": 32, "flag": True}
    return made | changes


def test_the_jit_sees_a_launch_once(compiled: list[Compiled], kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = given(), given(scale=0.25)
    launch(kernel, 3, first)
    monkeypatch.setattr(kernel, "run", lambda *_, **__: pytest.fail("bound again"))
    launch(kernel, 4, second)
    (one,) = compiled
    by_the_jit, direct = one.started
    assert by_the_jit[:6] == (3, 1, 1, 5, 7, (4, 1, 0))
    assert by_the_jit[9] is first["p_from"]
    assert direct[:9] == (4, 1, 1, 5, 7, (4, 1, 0), None, None, None)
    assert direct[9:] == (second["p_from"].data_ptr(), second["p_to"].data_ptr(), 0.25, 64, 32, True)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"p_from": torch.zeros(65)[1:]}, {}),
        ({"p_to": torch.zeros(64, dtype=torch.bfloat16)}, {}),
        ({"p_to": None}, {}),
        ({"count": 65}, {}),
        ({"count": 1}, {}),
        ({"block": 64}, {}),
        ({"flag": False}, {}),
        ({}, {"warps": 8}),
        ({}, {"stages": 3}),
        ({}, {"options": {"maxnreg": 128}}),
    ],
    ids=range(10),
)
def test_another_specialisation_is_another_kernel(
    changes: dict[str, Any], settings: dict[str, Any], compiled: list[Compiled], kernel: Any
) -> None:
    for _ in range(2):
        launch(kernel, 1, given())
        launch(kernel, 1, given(**changes), **settings)
    assert [len(each.started) for each in compiled] == [2, 2]


def test_tensor_descriptors_are_told_apart_by_what_is_compiled(compiled: list[Compiled], kernel: Any) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(rows: int, block: int, dtype: torch.dtype = torch.float32) -> Any:
        return TensorDescriptor.from_tensor(torch.zeros(rows, 32, dtype=dtype), [block, 32])

    described = [describe(64, 16), describe(128, 16), describe(64, 8), describe(64, 16, torch.bfloat16)]
    for descriptor in described:
        launch(kernel, 1, given(p_from=descriptor))
    assert [[started[9] for started in each.started] for each in compiled] == [
        described[:2],
        described[2:3],
        described[3:],
    ]


@pytest.mark.parametrize("case", ["hook", "own hook", "version"])
def test_the_jit_sees_every_launch_where_somebody_listens(
    case: str, compiled: list[Compiled], kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    if case == "hook":
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [heard.append])
    elif case == "own hook":
        kernel.add_pre_run_hook(lambda *_, **__: heard.append(1))
    else:
        monkeypatch.setattr(launching, "DIRECT_VERSIONS", ((2, 0), (2, 1)))
    for _ in range(3):
        launch(kernel, 1, given())
    assert all(isinstance(started[9], Tensor) for started in compiled[0].started)
    assert len(heard) in (0, 3)


def test_what_is_remembered_has_an_end(compiled: list[Compiled], kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST_BOUND", 4)
    for count in range(2, 40):
        launch(kernel, 1, given(count=count))
    (launcher,) = launching._launchers.values()
    assert sum(len(bound.starts) for bound in launcher.bound.values()) <= 4


@pytest.fixture
def tapes() -> Iterator[Callable[[], list[Any]]]:
    """Return what lists the tapes of all shapes; there is none at first."""
    made: list[shapes.LaunchShape] = []
    shapes._launch_shape.cache_clear()
    launch_shape = shapes.launch_shape

    def listen(*given: Any) -> shapes.LaunchShape:
        shape = launch_shape(*given)
        made.append(shape)
        return shape

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "launch_shape", listen)
        yield lambda: [tape for tapes in {id(x): x.tapes for x in made}.values() for tape in tapes.values()]
    shapes._launch_shape.cache_clear()


TABLE = torch.arange(4.0)


def a_pass(kernel: Any, x: Tensor, zeros: bool) -> tuple[Tensor | None, ...]:
    """Launch on an input, on a new tensor that is returned in another shape, and on one that outlives the call."""
    new = (torch.zeros if zeros else torch.empty)(8, 8)
    launch(kernel, 2, given(p_from=x.view(4, 16), p_to=new, count=16))
    launch(kernel, 3, given(p_from=TABLE, p_to=new.flatten(), scale=2.0))
    return new.view(4, 16), None


@pytest.mark.parametrize("zeros", [False, True])
def test_a_tape_launches_what_the_pass_launched(zeros: bool, compiled: list[Compiled], kernel: Any) -> None:
    kept: dict[Any, Any] = {}
    passes = []
    for _ in range(4):
        x = torch.zeros(64)
        passes.append((x, repeat(kept, "pass", (x, None), lambda x=x: a_pass(kernel, x, zeros))))  # type: ignore[misc]
    (tape,) = kept.values()
    assert isinstance(tape, Tape)
    assert tape.direct
    (one,) = compiled  # To the compiler 16 and 64 are both multiples of 16.
    first, second = one.started[::2], one.started[1::2]
    for index in (1, 2, 3):  # but for the first, which the JIT starts
        x, (new, nothing) = passes[index]
        assert nothing is None
        assert new is not None
        assert new.shape == (4, 16)
        assert bool((new == 0).all()) == zeros  # Memory that nobody has written to reads as NaN.
        assert first[index][9:] == (x.data_ptr(), new.data_ptr(), 0.5, 16, 32, True)
        assert second[index][9:] == (TABLE.data_ptr(), new.data_ptr(), 2.0, 64, 32, True)
        assert (first[index][0], second[index][0]) == (2, 3)


def test_a_tape_repeats_operators_and_their_order(compiled: list[Compiled], kernel: Any) -> None:
    """Views, lists of tensors, several results, writing in place, parts, and what outlives the call."""

    def lay_out(x: Tensor) -> tuple[Tensor | None, ...]:
        rows = x.view(8, 8)
        new = torch.zeros(8, 8)
        new[1:3].add_(rows[4:6], alpha=2)
        launch(kernel, 1, given(p_from=new[2:], p_to=rows[4]))
        new.mul_(2)
        largest, index = torch.cat([rows, new, TABLE[:, None].expand(4, 8)]).max(1)
        launch(kernel, 1, given(p_from=largest, p_to=new))
        return new.view(-1), largest, (index.float() + TABLE[2:3])[4:]

    kept: dict[Any, Any] = {}
    for _ in range(4):
        x = torch.randn(64)
        made = repeat(kept, "pass", (x,), lambda x=x: lay_out(x))  # type: ignore[misc]
        for one, other in zip(made, lay_out(x), strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)
    assert [type(tape) for tape in kept.values()] == [Tape]
    first, second = compiled[0].started[-8:][4:6]  # of the last repeated pass
    new, largest, _ = made
    assert new is not None
    assert largest is not None
    assert first[9:11] == (new.data_ptr() + 4 * 16, x.data_ptr() + 4 * 32)
    assert second[9:11] == (largest.data_ptr(), new.data_ptr())


def test_a_tape_describes_the_tensors_of_each_call(compiled: list[Compiled], kernel: Any) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    def described(x: Tensor) -> tuple[Tensor | None, ...]:
        new = torch.empty(16, 32)
        between = TensorDescriptor.from_tensor(new, [8, 32])
        launch(kernel, 1, given(p_from=TensorDescriptor.from_tensor(x.view(64, 32), [16, 32]), p_to=between))
        return (new,)

    kept: dict[Any, Any] = {}
    inputs = [torch.zeros(2048) for _ in range(4)]
    results = [repeat(kept, "pass", (x,), lambda x=x: described(x)) for x in inputs]  # type: ignore[misc]
    assert [type(tape) for tape in kept.values()] == [Tape]
    for x, (new,), started in zip(inputs, results, compiled[0].started, strict=True):
        one, other = started[9:11]
        assert new is not None
        assert one.base.data_ptr() == x.data_ptr()
        assert other.base.data_ptr() == new.data_ptr()
        assert (one.shape, one.block_shape, other.block_shape) == ((64, 32), [16, 32], [8, 32])


def test_a_tape_with_a_launch_for_the_jit_leaves_all_to_it(compiled: list[Compiled], kernel: Any) -> None:
    """Who starts kernels without the JIT must say on which stream, and who asks for that has a GPU."""
    other = JITFunction(copy_kernel)
    other.add_pre_run_hook(lambda *_, **__: None)

    def lay_out(x: Tensor) -> tuple[Tensor | None, ...]:
        launch(kernel, 1, given(p_from=x))
        launch(other, 1, given(p_from=x))
        return (None,)

    kept: dict[Any, Any] = {}
    inputs = [torch.zeros(64) for _ in range(3)]
    for x in inputs:
        repeat(kept, "pass", (x,), lambda x=x: lay_out(x))  # type: ignore[misc]
    (tape,) = kept.values()
    assert isinstance(tape, Tape)
    assert not tape.direct
    for one in compiled:
        assert one.started[-1][3] == 5
        assert one.started[-1][9] is inputs[-1]


def test_a_tape_holds_its_workspace_until_all_kernels_have_started(
    compiled: list[Compiled], kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps know its address alone, and an operator among them takes memory that is free."""

    def lay_out(x: Tensor) -> tuple[Tensor | None, ...]:
        between, new = torch.empty(4096), torch.empty(64)
        launch(kernel, 1, given(p_from=x, p_to=between))
        doubled = x * 2
        launch(kernel, 1, given(p_from=between, p_to=new))
        return new, doubled

    made: list[weakref.ref[Tensor]] = []
    empty = torch.empty

    def listen(**layout: Any) -> Tensor:
        workspace = empty(**layout)
        made.append(weakref.ref(workspace))
        return workspace

    kept: dict[Any, Any] = {}
    for _ in range(2):
        x = torch.zeros(64)
        repeat(kept, "pass", (x,), lambda x=x: lay_out(x))  # type: ignore[misc]
    (tape,) = kept.values()
    assert isinstance(tape, Tape)
    alive: list[bool] = []
    (one,) = compiled
    monkeypatch.setattr(one, "started", SimpleNamespace(append=lambda _: alive.append(made[-1]() is not None)))
    monkeypatch.setattr(torch, "empty", listen)
    repeat(kept, "pass", (torch.zeros(64),), lambda: pytest.fail("laid out again"))
    assert alive == [True, True]


@pytest.mark.parametrize(
    "other_work",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: launch(JITFunction(copy_kernel), 1, given(p_from=x.view(torch.int32))),
    ],
    ids=["a value", "a size that depends on values", "a mask", "another dtype"],
)
def test_what_depends_on_values_is_not_repeated(
    other_work: Callable[[Tensor], object], compiled: list[Compiled], kernel: Any
) -> None:
    kept: dict[Any, Any] = {}
    worked = []

    def lay_out(x: Tensor) -> tuple[Tensor | None, ...]:
        worked.append(other_work(x[:64]))
        return a_pass(kernel, x, False)

    for _ in range(MOST_ATTEMPTS + 3):
        x = torch.zeros(64)
        repeat(kept, "pass", (x,), lambda x=x: lay_out(x))  # type: ignore[misc]
    assert len(worked) == MOST_ATTEMPTS + 3
    assert list(kept.values()) == [MOST_ATTEMPTS + 1]  # Nobody watches any more.


def training_step(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, weight: Tensor | None = None, **settings: Any
) -> list[Tensor]:
    """Return the output, the final state, and the gradients of one call."""
    inputs = [x for x in (q, k, v, log_g, *settings.get("initial_state", ())) if x is not None]
    returned = power_attention(q, k, v, log_g, chunk_size=8, impl="triton", **settings)
    outs = [returned] if isinstance(returned, Tensor) else [returned[0], *(x for x in returned[1] if x is not None)]
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in outs]
    weights[0] = weights[0] if weight is None else weight
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, inputs, weights)]


def laid_out(*tensors: Tensor | None, **settings: Any) -> list[Tensor]:
    """Return the same without a tape."""
    shapes._launch_shape.cache_clear()
    results = training_step(*tensors, **settings)  # type: ignore[arg-type]
    shapes._launch_shape.cache_clear()
    return results


@pytest.mark.parametrize(
    "case",
    [Case(), Case(gated=False), Case(p=1, normalize=False), Case(p=2, normalize=False, gated=False), Case(repeats=3)],
    ids=str,
)
def test_a_tape_gives_the_same_bits(case: Case, tapes: Callable[[], list[Any]]) -> None:
    made = []
    for seed in range(4):
        inputs = Case(**{**vars(case), "tokens": 18, "batch": 1, "groups": 1, "seed": seed}).inputs(torch.float32)
        tensors = (*arguments(inputs), inputs["log_g"])
        made.append((tensors, training_step(*tensors)))
    assert [type(tape) for tape in tapes()] == [Tape, Tape]
    for tensors, results in made:
        for one, other in zip(results, laid_out(*tensors), strict=True):
            assert torch.equal(one, other)


def test_inputs_that_are_one_tensor_and_views_of_one(tapes: Callable[[], list[Any]]) -> None:
    """A tape of three equal inputs would not tell their uses apart; views of one projection lie at three addresses."""
    for _ in range(4):
        same = torch.randn(1, 18, 1, 8, requires_grad=True)
        training_step(same, same, same, None)
    q, k, v = (torch.randn(1, 18, 1, 8, requires_grad=True) for _ in range(3))
    for one, other in zip(training_step(q, k, v, None), laid_out(q, k, v, None), strict=True):
        assert torch.equal(one, other)
    for _ in range(4):
        tensors = torch.randn(1, 18, 3, 1, 8, requires_grad=True).unbind(2)
        results = training_step(*tensors, None)
    assert [type(tape) for tape in tapes()[-2:]] == [Tape, Tape]
    for one, other in zip(results, laid_out(*tensors, None), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["packed", "states", "strided", "expanded gradient", "odd address"])
def test_a_tape_of_other_calls_gives_the_same_bits(name: str, tapes: Callable[[], list[Any]]) -> None:
    """The lengths of packed sequences are values, which differ from call to call."""
    calls = []
    for seed in range(5):
        case = Case(tokens=18, batch=1, groups=1, repeats=1, with_state=name == "states", seed=seed)
        inputs = case.inputs(torch.float32)
        q, k, v = arguments(inputs)
        settings: dict[str, Any] = {"weight": torch.linspace(-1, 1, 18 * 5).view(1, 18, 1, 5)}
        if name == "packed":
            settings["cu_seqlens"] = torch.tensor([0, 3 + seed, 18])
        elif name == "states":
            settings |= {"return_state": True, "initial_state": state_of(inputs)}
        elif name == "strided":
            q = torch.randn(1, 18, 1, 16)[..., ::2].requires_grad_()
        elif name == "expanded gradient":
            settings["weight"] = torch.ones(()).expand(1, 18, 1, 5)
        else:
            q = torch.randn(1 + 18 * 8)[1:].view(1, 18, 1, 8).requires_grad_()
        tensors = (q, k, v, inputs["log_g"])
        calls.append((tensors, settings, training_step(*tensors, **settings)))
    wanted = [] if name == "odd address" else [Tape, Tape]
    assert [type(tape) for tape in tapes()] == wanted
    for tensors, settings, results in calls:
        for one, other in zip(results, laid_out(*tensors, **settings), strict=True):
            assert torch.equal(one, other)
