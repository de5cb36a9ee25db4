"""A step of decoding whose state lies in many blocks, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from powerplan.kernels import PowerState, power_attention_step
from powerplan.kernels.embedding import multisets
from powerplan.kernels.testing import largest_error
from powerplan.kernels.triton import decode
from powerplan.kernels.triton.launching import launch


@pytest.mark.parametrize(
    ("p", "normalize", "key_dim", "value_dim", "values", "blocks"),
    [
        (2, True, 32, 17, 4096, 5),
        (2, False, 32, 33, 128, 264),  # More than combine_kernel sums at a time.
        (4, True, 5, 5, 64, 18),
        (3, False, 9, 16, 32, 83),
        (1, False, 60, 3, 64, 15),
    ],
)
def test_a_state_of_many_blocks(
    p: int,
    normalize: bool,
    key_dim: int,
    value_dim: int,
    values: int,
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "VALUES", values)
    make = torch.Generator().manual_seed(0)
    rows = len(multisets(key_dim, p)[0])
    assert blocks == -(-rows // (values // decode.power_of_two(value_dim)))
    q, k, v = (torch.randn(2, *size, generator=make) for size in ((6, key_dim), (2, key_dim), (2, value_dim)))
    log_g = -torch.rand(2, 2, generator=make)
    key = torch.rand(2, 2, rows, generator=make) if normalize else None
    kv = torch.randn(2, 2, rows, value_dim, generator=make)

    def step(impl: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tokens, state = (
            (x.to(dtype) for x in (q, k, v)),
            PowerState(kv.to(dtype), key if key is None else key.to(dtype)),
        )
        out, new = power_attention_step(*tokens, log_g.to(dtype), state, p=p, normalize=normalize, impl=impl)
        return {"out": out, "kv": new.kv} | ({} if new.key is None else {"key": new.key})

    exact, plain = step("recurrent", torch.float64), step("recurrent", torch.float32)
    for name, found in step("triton", torch.float32).items():
        rounding = torch.finfo(torch.float32).eps * exact[name].abs().max().item()
        assert largest_error(found, exact[name]) <= 8 * (largest_error(plain[name], exact[name]) + rounding), name


@pytest.mark.parametrize(
    ("layout", "is_copied"),
    [("apart", False), ("of a prefill", False), ("one sequence of several", False), ("values first", True)],
)
def test_a_state_is_read_where_it_lies(layout: str, is_copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the state would take as long as the step that follows."""
    make = torch.Generator().manual_seed(0)
    count, key_dim, value_dim = 1 if layout == "one sequence of several" else 2, 16, 24
    rows = len(multisets(key_dim, 2)[0])
    q, k, v = (torch.randn(count, *size, generator=make) for size in ((4, key_dim), (2, key_dim), (2, value_dim)))
    joined = torch.rand(3, 2, rows, value_dim + 1, generator=make)
    if layout == "one sequence of several":
        joined = joined[1:2]
    joined = joined[:count]
    apart = PowerState(joined[..., :-1].contiguous(), joined[..., -1].contiguous())
    state = {
        "apart": apart,
        "values first": PowerState(apart.kv.mT.contiguous().mT, apart.key),
    }.get(layout, PowerState(joined[..., :-1], joined[..., -1]))
    read: list[dict[str, Any]] = []

    def listen(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        read.append(arguments)
        launch(kernel, programs, arguments)

    expected, after = power_attention_step(q, k, v, None, apart, impl="triton")
    monkeypatch.setattr(decode, "launch", listen)
    found, new = power_attention_step(q, k, v, None, state, impl="triton")
    assert new.key is not None
    assert after.key is not None
    assert state.key is not None
    assert torch.equal(found, expected)
    assert torch.equal(new.kv, after.kv)
    assert torch.equal(new.key, after.key)
    assert (read[0]["p_kv"].data_ptr() != state.kv.data_ptr()) == is_copied
    assert read[0]["p_key"].data_ptr() == state.key.data_ptr()
    assert new.kv.is_contiguous()
    assert new.key.is_contiguous()
