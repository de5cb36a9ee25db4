"""What a device holds under FSDP2 against torch's own tracker, with a fake process group and no GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tracked import Tracked, tracked_fsdp_steps

from powerplan.accounting import Accounting
from powerplan.ffn import MLP
from powerplan.mixers import GLA, Attention, Power
from powerplan.run.degrees import Degrees
from powerplan.run.loads import model_load
from powerplan.run.memory import Memory, memory_of
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads
from powerplan.spec import LayerGroup, ModelSpec

TOKENS = 128
HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16}
MIXERS = {
    "attention": Attention(**HEADS),
    "power": Power(**HEADS, p=2, gated=True, chunk_size=4),
    "gla": GLA(heads=4, head_dim=16, gate_rank=8),
}
RUNS = [("attention", 2, "bf16"), ("attention", 8, "fp32"), ("power", 4, "bf16"), ("gla", 2, "fp32")]


def spec_of(kind: str) -> ModelSpec:
    group = LayerGroup(repeat=2, mixer=MIXERS[kind], ffn=MLP(intermediate_size=160))
    return ModelSpec(name="x", vocab_size=256, hidden_size=64, layers=(group,))


@cache
def tracked(kind: str, ranks: int, dtype: str) -> Tracked:
    return tracked_fsdp_steps(spec_of(kind), TOKENS, ranks, dtype=dtype)


def planned(kind: str, ranks: int, dtype: Any) -> Memory:
    model = model_load(Accounting(spec_of(kind)), TOKENS, Recipe(dtype=dtype, kernels="torch"))
    return memory_of(model, list(enumerate(stage_loads(model, 1))), Degrees(fsdp=ranks), 1)


@pytest.mark.parametrize(("kind", "ranks", "dtype"), RUNS)
def test_weights_gradients_and_optimizer(kind: str, ranks: int, dtype: str) -> None:
    found, held = tracked(kind, ranks, dtype), planned(kind, ranks, dtype)
    assert held.weights == pytest.approx(found.at_peak["Sharded Param"], rel=0.01)
    assert held.gradients == pytest.approx(found.after_backward["Sharded Grad"], rel=0.01)
    assert held.optimizer == pytest.approx(found.at_peak["OptState"], rel=0.01)


@pytest.mark.parametrize(("kind", "ranks", "dtype"), RUNS)
def test_activations(kind: str, ranks: int, dtype: str) -> None:
    found, held = tracked(kind, ranks, dtype), planned(kind, ranks, dtype)
    assert held.activations + held.working == pytest.approx(found.activations, rel=0.15)


@pytest.mark.parametrize(("kind", "ranks", "dtype"), RUNS)
def test_all_tensors_together(kind: str, ranks: int, dtype: str) -> None:
    """The peak as a whole. These models are so small that weights gathered ahead count as much as activations."""
    found, held = tracked(kind, ranks, dtype), planned(kind, ranks, dtype)
    assert held.tensors == pytest.approx(found.at_peak["Total"], rel=0.15)
