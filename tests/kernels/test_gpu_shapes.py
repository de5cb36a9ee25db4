"""Head dims, chunks and calls as models have them, in the blocks that are shipped: only a GPU gets through these."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from device import ON_GPU
from torch import Tensor

from powerplan.kernels import power_attention, power_attention_step
from powerplan.kernels.state import PowerState
from powerplan.kernels.testing import Case, arguments, beyond_budget, results, state_of

pytestmark = pytest.mark.skipif(not ON_GPU, reason="takes minutes in the interpreter: make gpu runs it on a GPU")

LOW = [torch.bfloat16, torch.float16]
TRAINED = Case(tokens=1100, batch=1, groups=2, repeats=1, key_dim=64, value_dim=64)
"""Two heads of 64 over five chunks of 256, the last of them short."""

DEGREES = [(1, False, 128), (2, False, 64), (3, False, 32), (3, False, 64), (4, True, 16), (4, True, 32)]


def call(case: Case, inputs: dict[str, Tensor | None], **settings: Any) -> tuple[Tensor, PowerState]:
    """Return output and state by Triton, in chunks of 256 unless said otherwise, from the inputs' state."""
    settings = {
        "p": case.p,
        "normalize": case.normalize,
        "chunk_size": 256,
        "initial_state": state_of(inputs),
    } | settings
    out, state = power_attention(*arguments(inputs), inputs["log_g"], impl="triton", return_state=True, **settings)
    return out, state


def check(case: Case, dtype: torch.dtype, **settings: Any) -> None:
    inputs = case.inputs(dtype)
    returned = results(*call(case, inputs, **settings), inputs)
    assert beyond_budget(case, dtype, returned, inputs, low_products=dtype in LOW) == {}


def check_close(actual: Tensor, expected: Tensor, roundings: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """The same sums in another order: they differ by some roundings of the largest value."""
    atol = roundings * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_second_degree(head_dim: int, gated: bool, with_state: bool, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and head_dim > 64:
        pytest.skip("float32 stops at head dim 64")
    case = replace(TRAINED, gated=gated, with_state=with_state, key_dim=head_dim, value_dim=head_dim)
    check(case, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("p", "normalize", "head_dim"), DEGREES)
def test_other_degrees(p: int, normalize: bool, head_dim: int, dtype: torch.dtype) -> None:
    if p == 1 and dtype == torch.float16:
        head_dim = 64
    check(replace(TRAINED, p=p, normalize=normalize, key_dim=head_dim, value_dim=64, tokens=600), dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"repeats": 4, "with_state": True},
        {"gated": False, "with_state": True},
        {"batch": 3, "tokens": 700},
        {"key_dim": 20, "value_dim": 24},
        {"value_dim": 128},
        {"tokens": 257},
    ],
    ids=str,
)
@pytest.mark.parametrize(("p", "head_dim"), [(1, 64), (3, 64), (4, 32)])
def test_other_degrees_in_shapes_of_models(p: int, head_dim: int, changes: dict[str, int]) -> None:
    case = replace(TRAINED, p=p, normalize=p == 4, key_dim=head_dim, value_dim=64, tokens=600)
    check(replace(case, **changes), torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"repeats": 4},
        {"groups": 1, "repeats": 8},
        {"batch": 3, "tokens": 700},
        {"value_dim": 128},
        {"key_dim": 128, "value_dim": 64},
        {"key_dim": 96, "value_dim": 80},
        {"tokens": 1, "gated": False},
        {"tokens": 256},
        {"tokens": 257},
    ],
    ids=str,
)
def test_shapes_of_models(changes: dict[str, int]) -> None:
    """The gate of one token has the gradient q.dq - k.dk, which cancels: test_hopper.py holds it to its terms."""
    check(replace(TRAINED, with_state=True, **changes), torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_chunks(head_dim: int) -> None:
    """Chunks of 1,024: two whole ones and a short one."""
    case = replace(TRAINED, tokens=2300, groups=1, key_dim=head_dim, value_dim=head_dim)
    check(case, torch.bfloat16, chunk_size=None)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_equal_calls_are_equal_bit_for_bit(head_dim: int) -> None:
    case = replace(TRAINED, key_dim=head_dim, value_dim=head_dim, repeats=2)
    inputs = case.inputs(torch.bfloat16)
    first, second = (results(*call(case, inputs), inputs) for _ in range(2))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_sequences_are_those_apart(head_dim: int) -> None:
    bounds = [0, 1, 300, 556, 1100]
    case = replace(TRAINED, key_dim=head_dim, value_dim=head_dim)
    inputs = case.inputs(torch.bfloat16)
    packed, ends = call(case, inputs, cu_seqlens=torch.tensor(bounds))
    for index, (start, stop) in enumerate(pairwise(bounds)):
        piece = {name: None if x is None else x[:, start:stop] for name, x in inputs.items()}
        out, end = call(case, piece)
        check_close(packed[:, start:stop], out, 2)
        check_close(ends.kv[index : index + 1], end.kv, 2)


def test_tensors_as_projections_leave_them() -> None:
    """Heads split from one product of queries, keys and values: rows lie further apart than the heads' dims say."""
    case = replace(TRAINED, groups=2)
    inputs = case.inputs(torch.bfloat16)
    joined = torch.cat([x.detach() for x in arguments(inputs)], -1)
    split = [x.requires_grad_() for x in joined.split(64, -1)]
    apart = inputs | dict(zip("qkv", split, strict=True))
    plain, strided = results(*call(case, inputs), inputs), results(*call(case, apart), apart)
    assert [name for name in plain if not torch.equal(plain[name], strided[name])] == []


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_training_call_replays_as_a_graph(head_dim: int) -> None:
    case = replace(TRAINED, key_dim=head_dim, value_dim=head_dim)
    inputs = case.inputs(torch.bfloat16)
    given = [x for x in inputs.values() if x is not None]
    weights: list[Tensor] = []  # Made before the capture, in which nothing may come from the host.

    def train() -> list[Tensor]:
        out, state = call(case, inputs)
        assert state.key is not None
        found = [out, state.kv, state.key]
        if not weights:
            weights.extend(torch.randn_like(x) for x in found)
        return [x.detach() for x in found] + list(torch.autograd.grad(found, given, weights))

    eager = train()
    torch.use_deterministic_algorithms(False)  # Fills of unwritten memory are not part of a graph.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # From the third call on a tape is repeated.
            train()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = train()
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert [index for index, x in enumerate(eager) if not torch.equal(captured[index], x)] == []


@pytest.mark.parametrize("value_dim", [32, 64])
def test_steps_go_on_where_the_whole_stopped(value_dim: int) -> None:
    """In float32, which Triton takes up to head dim 64."""
    case = replace(TRAINED, tokens=280, repeats=2, value_dim=value_dim)
    inputs = {name: None if x is None else x.detach() for name, x in case.inputs(torch.float32).items()}
    q, k, v = arguments(inputs)
    log_g = inputs["log_g"]
    assert log_g is not None
    whole = power_attention(q, k, v, log_g, impl="reference")
    assert isinstance(whole, Tensor)
    _, state = power_attention(q[:, :270], k[:, :270], v[:, :270], log_g[:, :270], impl="torch", return_state=True)
    for token in range(270, 280):
        now = (q[:, token], k[:, token], v[:, token], log_g[:, token])
        out, state = power_attention_step(*now, state, impl="triton")
        check_close(out, whole[:, token], 100, torch.float32)
