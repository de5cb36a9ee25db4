"""Blocks: the same every time, unless tuning is asked for; then the fastest of those that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from powerplan.kernels import power_attention
from powerplan.kernels.call import CallShape
from powerplan.kernels.testing import Case, arguments
from powerplan.kernels.triton import config, shapes, states, tuning
from powerplan.kernels.triton.config import Blocks
from powerplan.kernels.triton.shapes import LaunchShape


@pytest.mark.parametrize(("asked", "version"), [("", "3.9.0"), ("1", "3.6.0"), ("1", "3.8.0")])
def test_the_default_is_not_timed(asked: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are other blocks, asked or not, where a Triton may miscompile them."""
    monkeypatch.setenv("POWERPLAN_AUTOTUNE", asked)
    monkeypatch.setattr(shapes, "triton_version", lambda: version)
    shapes._launch_shape.cache_clear()
    monkeypatch.setattr(tuning, "_time", lambda *_: pytest.fail("timed"))
    q, k, v = arguments(Case(tokens=22, batch=1, groups=1).inputs(torch.float32))  # Tapes are kept by shape.
    first, second = (power_attention(q, k, v, chunk_size=16, impl="triton") for _ in range(2))
    assert isinstance(first, torch.Tensor)
    assert torch.equal(first, second)


def test_tuning_takes_the_fastest_and_times_a_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Blocks] = []

    def time(blocks: Blocks, start_with: Callable[[Blocks], None]) -> float:
        start_with(blocks)
        timed.append(blocks)
        return {8: 2.0, 4: 1.0}[blocks.warps]

    monkeypatch.setattr(tuning, "_time", time)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setenv("POWERPLAN_AUTOTUNE", "1")
    q, k, v = arguments(Case(tokens=20, batch=1, groups=1).inputs(torch.float32))
    plain = power_attention(q, k, v, chunk_size=16)
    out = power_attention(q, k, v, chunk_size=16, impl="triton")
    torch.testing.assert_close(out, plain)
    assert len(timed) == len(set(timed)) > 2
    chosen = {kernel: blocks for (kernel, _), blocks in tuning._chosen.items()}
    assert chosen.keys() == {"scan", "output"}
    assert chosen["output"].warps == 4
    count = len(timed)
    power_attention(q[:, :18], k[:, :18], v[:, :18], chunk_size=16, impl="triton")
    assert len(timed) == count


@pytest.mark.parametrize(("version", "arch", "stages"), [("3.8.0", 90, 1), ("3.9.0", 90, 2), ("3.8.0", 80, 2)])
def test_loops_are_not_pipelined_where_operands_may_be_overwritten(
    version: str, arch: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output kernel in fp16, and the scan of keys without gates."""
    monkeypatch.setattr(shapes, "triton_version", lambda: version)
    monkeypatch.setattr(shapes, "family", lambda _: arch)
    monkeypatch.delenv("POWERPLAN_AUTOTUNE", raising=False)
    shapes._launch_shape.cache_clear()
    call = CallShape.of((1, 64, 1, 64), (1, 64, 1, 64), (1, 64, 1, 64), 2, 0.125, 64, True)
    for dtype in (torch.float16, torch.bfloat16):
        blocks = LaunchShape(call, 1, dtype, arch).blocks("output")
        shipped = config.blocks("output", arch, 2, 64, 64, dtype)
        assert blocks.stages == (stages if dtype == torch.float16 else shipped.stages)
    started: list[tuple[bool, int]] = []

    def listen(kernel: object, programs: int, arguments: dict[str, Any], warps: int = 4, stages: int = 2) -> None:
        started.append((arguments["BACKWARD"], stages))

    monkeypatch.setattr(states, "launch", listen)
    for gated in (False, True):
        inputs = Case(tokens=40, batch=1, groups=1, gated=gated).inputs(torch.float32)
        out = power_attention(*arguments(inputs), inputs["log_g"], chunk_size=16, impl="triton")
        assert isinstance(out, torch.Tensor)
        torch.autograd.grad(out, arguments(inputs), torch.ones_like(out))
    usual = config.blocks("scan", arch, 2, 8, 5, torch.float32).stages
    first = 1 if stages == 1 else usual
    assert started == [(False, first), (True, usual), (False, usual), (True, usual)]
    shapes._launch_shape.cache_clear()
