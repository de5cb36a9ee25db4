"""Blocks: the same every time, unless tuning is asked for; then the fastest of those that fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from powerplan.kernels import power_attention
from powerplan.kernels.testing import Case, arguments
from powerplan.kernels.triton import shapes, tuning
from powerplan.kernels.triton.config import Blocks


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
