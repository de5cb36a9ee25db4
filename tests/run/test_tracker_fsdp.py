"""What a device holds under FSDP2 against torch's own tracker, with a fake process group and no GPU."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
from tracked import Tracked, tracked_fsdp_steps

from powerplan.accounting import Accounting
from powerplan.ffn import MLP
from powerplan.mixers import GLA, KDA, MLA, Attention, DeltaNet, GatedDeltaNet, Linear, Mixer, Power, RetNet
from powerplan.run.degrees import Degrees
from powerplan.run.loads import model_load
from powerplan.run.memory import Memory, memory_of
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads
from powerplan.spec import LayerGroup, ModelSpec

TOKENS = 512
HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16}
STATES: dict[str, Any] = {"heads": 4, "head_dim": 16}
MIXERS: dict[str, Mixer] = {
    "attention": Attention(**HEADS),
    "window": Attention(**HEADS, window=128),
    "mla": MLA(heads=4, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24),
    "power": Power(**HEADS, p=2, gated=True, chunk_size=16),
    "linear": Linear(**HEADS, gated=True, chunk_size=32),
    "retnet": RetNet(**STATES, chunk_size=32),
    "gla": GLA(**STATES, gate_rank=8),
    "deltanet": DeltaNet(**STATES, chunk_size=64),
    "gated_deltanet": GatedDeltaNet(**STATES, chunk_size=64),
    "kda": KDA(**STATES, chunk_size=64),
}
BOTH_WAYS = {"attention", "power", "gla"}
RUNS = [
    (kind, (2, 4, 8)[place % 3], ("bf16", "fp32")[place % 2], again)
    for place, (kind, again) in enumerate(product(MIXERS, ("none", "full")))
    if kind in BOTH_WAYS or place // 2 % 2 == (again == "full")
]
"""Kinds on 2, 4 and 8 devices, some with and without recomputation and the others in turns: test_tracker.py has every
kind in both ways on one device, and a case takes a second or more."""

RUN = pytest.mark.parametrize(("kind", "ranks", "dtype", "recompute"), RUNS)


def spec_of(kind: str) -> ModelSpec:
    group = LayerGroup(repeat=2, mixer=MIXERS[kind], ffn=MLP(intermediate_size=160))  # type: ignore[arg-type]
    return ModelSpec(name="x", vocab_size=256, hidden_size=64, layers=(group,))


@cache
def tracked(kind: str, ranks: int, dtype: str, recompute: str) -> Tracked:
    return tracked_fsdp_steps(spec_of(kind), TOKENS, ranks, dtype=dtype, checkpoint=recompute == "full")


def planned(kind: str, ranks: int, dtype: Any, recompute: Any) -> Memory:
    recipe = Recipe(dtype=dtype, kernels="torch", recompute=recompute)
    model = model_load(Accounting(spec_of(kind)), TOKENS, recipe)
    return memory_of(model, list(enumerate(stage_loads(model, 1))), Degrees(fsdp=ranks), 1)


@RUN
def test_weights_gradients_and_optimizer(kind: str, ranks: int, dtype: str, recompute: str) -> None:
    found, held = tracked(kind, ranks, dtype, recompute), planned(kind, ranks, dtype, recompute)
    assert held.weights == pytest.approx(found.at_peak["Sharded Param"], rel=0.01)
    assert held.gradients == pytest.approx(found.after_backward["Sharded Grad"], rel=0.01)
    assert held.optimizer == pytest.approx(found.at_peak["OptState"], rel=0.01)


@RUN
def test_activations(kind: str, ranks: int, dtype: str, recompute: str) -> None:
    found, held = tracked(kind, ranks, dtype, recompute), planned(kind, ranks, dtype, recompute)
    assert held.activations + held.working == pytest.approx(found.activations, rel=0.05)


@RUN
def test_all_tensors_together(kind: str, ranks: int, dtype: str, recompute: str) -> None:
    """The peak as a whole, but for gradients in shards: earlier micro-batches have some, and here is one."""
    found, held = tracked(kind, ranks, dtype, recompute), planned(kind, ranks, dtype, recompute)
    total = found.at_peak["Total"] - found.at_peak.get("Sharded Grad", 0)
    assert held.tensors - held.gradients == pytest.approx(total, rel=0.12)
