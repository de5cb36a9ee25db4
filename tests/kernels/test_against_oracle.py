"""Every implementation against the definition in float64: outputs, states and all gradients, in every dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from powerplan.kernels import power_attention
from powerplan.kernels.testing import Case, arguments, beyond_budget, results, state_of, variants

DEGREES = [(1, False), (2, True), (2, False), (3, False), (4, True), (4, False)]
SHAPES = variants(
    Case(),
    tokens=[1, 2, 16, 63, 130],
    key_dim=[1, 5, 16],
    value_dim=[1, 16],
    groups=[1, 3],
    repeats=[1, 3],
    batch=[1],
)
IMPLS = ["recurrent", "torch"]


def check(case: Case, impl: str, dtype: torch.dtype, chunk: int = 16) -> None:
    inputs = case.inputs(dtype)
    returned = power_attention(
        *arguments(inputs),
        inputs["log_g"],
        p=case.p,
        normalize=case.normalize,
        chunk_size=chunk,
        initial_state=state_of(inputs),
        return_state=True,
        impl=impl,
    )
    assert beyond_budget(case, dtype, results(*returned, inputs), inputs) == {}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("p", "normalize"), DEGREES)
def test_degrees_gates_and_states(p: int, normalize: bool, gated: bool, with_state: bool, impl: str) -> None:
    case = Case(p=p, normalize=normalize, gated=gated, with_state=with_state, tokens=40, key_dim=6)
    check(case, impl, torch.float64)
    check(case, impl, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case, impl: str) -> None:
    check(case, impl, torch.float64)
    check(replace(case, with_state=True), impl, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("p", "normalize"), DEGREES)
def test_low_precision(p: int, normalize: bool, dtype: torch.dtype) -> None:
    for seed in range(3):
        check(Case(p=p, normalize=normalize, tokens=40, key_dim=6, seed=seed), "torch", dtype)


@pytest.mark.parametrize("chunk", [1, 7, 40, 41, 1000])
def test_chunk_sizes(chunk: int) -> None:
    check(Case(tokens=40, with_state=True), "torch", torch.float64, chunk)


def test_many_chunks_restart_from_kept_states() -> None:
    check(Case(tokens=130, batch=1, groups=1), "torch", torch.float64, chunk=4)


def test_degrees_in_several_blocks() -> None:
    """phi of p = 3 at K = 24 has 5,120 rows: more than one block of the expansion."""
    from powerplan.kernels.plan import BLOCK_ROWS
    from powerplan.kernels.tiles import tiling

    assert len(tiling(24, 3, 8, BLOCK_ROWS).blocks) > 1
    check(Case(p=3, normalize=False, key_dim=24, tokens=33, batch=1, groups=1), "torch", torch.float64)
