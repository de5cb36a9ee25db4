"""Mamba layers with the weights of transformers' give the outputs of transformers' own, which nobody here wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import JambaConfig, Mamba2Config, MambaConfig, NemotronHConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMamba2
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from powerplan.mixers import Mamba1, Mamba2
from powerplan.models import Slot
from powerplan.models.mixers.mamba import Mamba1Mixer, Mamba2Mixer

SAME = {
    "in_proj": "in_proj",
    "out_proj": "o_proj",
    "x_proj": "x_proj",
    "conv1d": "convolution",
    "A_log": "a_log",
    "D": "skip",
    "dt_bias": "dt_bias",
    "norm": "output_norm",
    "dt_layernorm": "norms.0",
    "b_layernorm": "norms.1",
    "c_layernorm": "norms.2",
}
"""Names of weights and modules there and here."""

SMALL: dict[str, Any] = {"hidden_size": 16, "layer_norm_epsilon": 1e-6, "num_hidden_layers": 1}


def mamba(bias: bool) -> tuple[nn.Module, nn.Module]:
    config = MambaConfig(**SMALL, intermediate_size=24, state_size=5, time_step_rank=3, conv_kernel=4, use_bias=bias)
    config.intermediate_size = 24
    return MambaMixer(config, 0), Mamba1Mixer(Mamba1(inner_size=24, dt_rank=3, state_dim=5, bias=bias), 16)


def jamba() -> tuple[nn.Module, nn.Module]:
    config = JambaConfig(
        hidden_size=16, mamba_expand=2, mamba_d_state=5, mamba_dt_rank=3, mamba_d_conv=4, rms_norm_eps=1e-6,
        use_mamba_kernels=False,
    )  # fmt: skip
    return JambaMambaMixer(config, 0), Mamba1Mixer(Mamba1(inner_size=32, dt_rank=3, state_dim=5, inner_norms=True), 16)


def mamba2(groups: int, bias: bool) -> tuple[nn.Module, nn.Module]:
    config = Mamba2Config(
        **SMALL, num_heads=4, head_dim=8, expand=2, state_size=6, n_groups=groups, conv_kernel=4, chunk_size=8,
        use_bias=bias,
    )  # fmt: skip
    own = Mamba2(heads=4, head_dim=8, state_dim=6, groups=groups, bias=bias, chunk_size=16)
    return TheirMamba2(config, 0), Mamba2Mixer(own, 16)


def nemotron() -> tuple[nn.Module, nn.Module]:
    config = NemotronHConfig(
        hidden_size=16, mamba_num_heads=6, mamba_head_dim=4, ssm_state_size=5, n_groups=3, conv_kernel=4, chunk_size=8,
        layer_norm_epsilon=1e-6, use_mamba_kernels=False,
    )  # fmt: skip
    own = Mamba2(heads=6, head_dim=4, state_dim=5, groups=3, chunk_size=16)
    return NemotronHMamba2Mixer(config, 0), Mamba2Mixer(own, 16)


CASES = {
    "mamba": lambda: mamba(False),
    "mamba, biases": lambda: mamba(True),
    "jamba": jamba,
    "mamba2": lambda: mamba2(1, False),
    "mamba2, groups, biases": lambda: mamba2(2, True),
    "nemotron-h": nemotron,
}


def copied(theirs: nn.Module, own: nn.Module) -> None:
    """Draw weights, and put the same ones into both: all of theirs have a place here."""
    weights = {}
    for name, weight in theirs.named_parameters():
        with torch.no_grad():
            if weight.ndim > 1 or "bias" in name or "norm" in name:
                weight.normal_(std=0.4)
        first, _, rest = name.partition(".")
        if name == "dt_proj.bias":
            weights["dt_bias"] = weight
        else:
            weights[".".join(filter(None, (SAME.get(first, first), rest)))] = weight
    shapes = {name: weight.shape for name, weight in own.named_parameters()}
    own.load_state_dict({name: weight.detach().reshape(shapes[name]) for name, weight in weights.items()})


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    theirs, own = (module.double().eval() for module in CASES[name]())  # type: ignore[no-untyped-call]
    copied(theirs, own)
    x, slot = torch.randn(2, 21, 16, dtype=torch.float64), Slot()
    with torch.no_grad():
        expected = theirs(x)
        pieces = [own(part, slot) for part in x.split([9, 1, 1, 10], 1)]
        for out in (own(x), torch.cat(pieces, 1)):
            # transformers scans in float32, whatever its inputs are.
            assert (out - expected).abs().max() <= 2**-18 * expected.abs().max()
