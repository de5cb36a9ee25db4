"""Gates of all sizes over chunks of all sizes, against the definition in float64: outputs, states and all gradients.

The sum of 1,000 gates of -100 is off by 0.004 in float32. What a weight is made of is the difference of two such sums,
and between neighbours without a gate that is small.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from powerplan.kernels import power_attention
from powerplan.kernels.testing import GATES, Case, arguments, beyond_budget, results, state_of

LONG = Case(tokens=1100, batch=1, groups=1, repeats=1, with_state=True)


def check(case: Case, impl: str, dtype: torch.dtype, chunk: int | None = None) -> None:
    inputs = case.inputs(dtype)
    settings: dict[str, Any] = {"chunk_size": chunk, "initial_state": state_of(inputs), "impl": impl}
    returned = power_attention(*arguments(inputs), inputs["log_g"], return_state=True, **settings)
    assert beyond_budget(case, dtype, results(*returned, inputs), inputs) == {}


@pytest.mark.parametrize("gates", sorted(GATES))
@pytest.mark.parametrize("chunk", [32, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_chains_of_gates(gates: str, chunk: int, dtype: torch.dtype) -> None:
    check(replace(LONG, gates=gates), "torch", dtype, chunk)


@pytest.mark.parametrize("gates", sorted(GATES))
def test_long_chains_of_gates_token_by_token(gates: str) -> None:
    check(replace(LONG, gates=gates, tokens=200), "recurrent", torch.float32)


@pytest.mark.parametrize(("gates", "chunk"), [("resets", 16), ("resets", 256), ("steep", 256), ("all -inf", 256)])
def test_long_chains_of_gates_in_triton(gates: str, chunk: int) -> None:
    check(replace(LONG, gates=gates, tokens=260), "triton", torch.float32, chunk)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_tokens_between_two_resets_do_not_feel_those_before(impl: str) -> None:
    """Three tokens between resets, 80 times over in one chunk, are as exact as the same three tokens alone."""
    torch.manual_seed(0)
    q, k, v = torch.rand(3, 1, 240, 1, 8) + 1
    log_g = torch.full((1, 240, 1), -0.3)
    log_g[:, ::3] = -torch.inf
    whole = power_attention(q, k, v, log_g, chunk_size=240, impl=impl)
    parts = [x.unflatten(1, (80, 3))[0] for x in (q, k, v, log_g)]
    each = power_attention(*parts, chunk_size=240, impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(whole[0], each.flatten(0, 1), rtol=3e-6, atol=0)  # type: ignore[union-attr]
