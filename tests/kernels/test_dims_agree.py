"""What `powerplan dims` says of kernels is what the kernels themselves take."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from powerplan.dims import kernels_for
from powerplan.kernels import checks
from powerplan.kernels.call import CallShape
from powerplan.kernels.triton import shapes, support

DIMS = (1, 8, 31, 32, 33, 64, 65, 128, 129, 256, 400, 1024)
DEVICE = torch.device("meta")


def takes(p: int, normalize: bool, head_dim: int, v_head_dim: int) -> list[str]:
    """Return the engines whose own checks take a call in bf16."""
    q, v = torch.empty(1, 4, 2, head_dim, device=DEVICE), torch.empty(1, 4, 2, v_head_dim, device=DEVICE)
    q, v = q.bfloat16(), v.bfloat16()
    try:
        checks.check_settings(p, None, None)
        checks.check_sizes(q.shape, q.shape, v.shape, (q.dtype,) * 3, (DEVICE,) * 3, p, normalize)
    except ValueError:
        return []
    engines = ["torch"]
    if support.lacking(q, v, p) is None:
        engines.append("triton")
    call = CallShape.of(q.shape, q.shape, v.shape, p, 1.0, 128, normalize)
    if shapes.uses_hopper(call, q.dtype, DEVICE):
        engines.append("hopper")
    return engines


@pytest.mark.parametrize("p", range(1, 7))
def test_dims_names_the_kernels_that_take_a_call(p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(support, "INSTALLED", True)
    monkeypatch.setattr(shapes, "hopper_lacking", lambda device: None)
    monkeypatch.setattr(shapes, "takes_untried", lambda: False)
    for head_dim, v_head_dim in product(DIMS, DIMS):
        assert kernels_for(p, head_dim, v_head_dim) == takes(p, p % 2 == 0, head_dim, v_head_dim)


def test_odd_degrees_have_no_normaliser() -> None:
    assert takes(3, False, 64, 64)
    assert not takes(3, True, 64, 64)
