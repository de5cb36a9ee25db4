"""Apriel-H1: attention or Mamba in each layer; its Mamba as its code builds it, and the files that are not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.load import LoadedModel
from powerplan.mixers import Attention, Mamba1
from powerplan.mixers.formulas import total

Read = Callable[[dict[str, Any]], LoadedModel]

FILE: dict[str, Any] = {
    "model_type": "apriel_hybrid_ssm",
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
    "tie_word_embeddings": False,
    "hybrid_block_layout": ["t", "m2", "m2", "t"],
    "ssm_cfg": {"d_state": 4, "d_xb": 16, "d_inner": 48, "d_conv": 3, "activation": "silu", "expand": 1},
}


def mamba_weights(hidden: int, inner: int, shared: int, state: int, rank: int, conv: int) -> int:
    """Return the weights of Apriel's Mamba2 (modeling_apriel_hybrid_ssm.py), module by module."""
    modules = [
        nn.Linear(hidden, 2 * shared + 2 * inner, bias=False),
        nn.Linear(hidden, rank, bias=False),
        nn.Linear(rank, inner),
        nn.Conv1d(inner, inner, conv, groups=inner),
        nn.Linear(inner, hidden, bias=False),
    ]
    return sum(weights.numel() for module in modules for weights in module.parameters()) + inner * state + inner


def test_layers_and_weights(read: Read) -> None:
    loaded = read(FILE)
    kinds = [type(loaded.spec.mixers_by_layer()[layer]) for layer in range(4)]
    assert kinds == [Attention, Mamba1, Mamba1, Attention]
    mamba = loaded.spec.mixers()[1]
    assert mamba == Mamba1(inner_size=48, dt_rank=3, state_dim=4, conv_size=3, shared_size=16)
    own = total((*mamba.matmul_terms(48), *mamba.other_terms(48)))
    assert own == mamba_weights(48, 48, 16, 4, 3, 3)
    attention, mlp = 2 * 48 * 48 + 2 * 48 * 16, 3 * 48 * 80
    whole = 2 * attention + 2 * own + 4 * (mlp + 2 * 48) + 48 + 2 * 97 * 48
    assert Accounting(loaded.spec).total_parameters.with_embeddings == whole
    assert mamba.state_size(100).recurrent == 48 * 4
    assert read(FILE | {"model_type": "apriel_ssm_thinker_hybrid"}).spec.layers == loaded.spec.layers


def test_defaults_of_its_code(read: Read) -> None:
    loaded = read(FILE | {"hybrid_block_layout": ["m2"], "hidden_size": 64, "ssm_cfg": {"bias": True}})
    assert loaded.spec.mixers() == [Mamba1(inner_size=4096, dt_rank=4, state_dim=64, shared_size=64, bias=True)]


LAYOUT = r"must say t or m2 \(no other block is read\) for each of 4 layers"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hybrid_block_layout": ["t", "m2"]}, LAYOUT),
    (
        {"hybrid_block_layout": ["t", "gdn", "t", "t"]},
        r"must say t or m2 \(no other block is read\) for each of 4 layers",
    ),
    ({"ssm_cfg": None}, "ssm_cfg is missing, and m2 layers need it"),
    ({"ssm_cfg": FILE["ssm_cfg"] | {"dt_proj_bias": False}}, "dt_proj_bias false is not supported: no published"),
    ({"ssm_cfg": FILE["ssm_cfg"] | {"d_xb": 6}}, "6 is no multiple of state_dim 4, the channels of a head"),
    ({"ssm_cfg": FILE["ssm_cfg"] | {"d_xb": 20}}, "20 does not divide inner_size 48"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_files_that_are_not_read(read: Read, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(FILE | change)
