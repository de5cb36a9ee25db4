"""What is checked before anything is timed stays small, whatever the model."""

from __future__ import annotations

import pytest

from powerplan.dims import spow_dim
from powerplan.load import catalogue_spec
from powerplan.mixers import Power
from powerplan.profile.checks import MAX_STATE_ROWS, check_layer, reduced
from powerplan.profile.options import workload_of
from powerplan.swap import with_mixer


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("power:p=3,normalize=false,head_dim=256,v_head_dim=256", (32, 32)),
        ("power:p=4,head_dim=70,v_head_dim=8", (16, 8)),
        ("power:p=2,head_dim=128,v_head_dim=300", (128, 300)),
    ],
)
def test_layers_are_checked_at_head_dims_that_fit(text: str, dims: tuple[int, int]) -> None:
    """At d = 256, p = 3 has 2.8 million rows of phi: 14 GiB and a minute for one check."""
    spec, _ = with_mixer(catalogue_spec("gemma-2-2b"), text)
    workload = workload_of(spec, against="none")
    small, timed = reduced(workload, workload.subjects[0])
    mixer = timed.mixer
    assert isinstance(mixer, Power)
    assert (mixer.head_dim, mixer.v_head_dim) == dims
    assert spow_dim(mixer.head_dim, mixer.p) <= MAX_STATE_ROWS
    assert small.layer.mixer == mixer


def test_a_layer_with_halved_head_dims_is_right() -> None:
    spec, _ = with_mixer(catalogue_spec("llama-3.2-1b"), "power:p=4,head_dim=70,v_head_dim=8,heads=2,kv_heads=1")
    workload = workload_of(spec, against="none")
    result = check_layer(workload, workload.subjects[0])
    assert result.share_of_budget <= 1
    assert result.against == "float64, output and gradient, 300 tokens"
