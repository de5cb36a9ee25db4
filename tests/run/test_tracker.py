"""Activations of a training step against torch's own memory tracker, for every kind that powerplan.models builds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tracked import Tracked, saved_by_layer, tracked_step

from powerplan.dims import default_chunk_size
from powerplan.ffn import MLP, MoE
from powerplan.kernels.call import CallShape
from powerplan.kernels.triton.shapes import LaunchShape, saved_states
from powerplan.mixers import (
    DSA,
    GLA,
    GSA,
    KDA,
    MLA,
    NSA,
    RWKV7,
    Attention,
    DeltaNet,
    Forgetting,
    GatedDeltaNet,
    Lightning,
    Linear,
    LogLinear,
    Mamba1,
    Mamba2,
    Mixer,
    MoBA,
    Power,
    RetNet,
    SparseStateExpansion,
)
from powerplan.models.mixers import BUILT
from powerplan.run.recipe import Recipe
from powerplan.run.saved import ends_bytes, loss_bytes, saved_layer
from powerplan.spec import Layer, LayerGroup, ModelSpec, Norm

HIDDEN, TOKENS = 64, 128
HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16}
STATES: dict[str, Any] = {"heads": 4, "head_dim": 16, "v_head_dim": 24, "chunk_size": 32}
LATENT: dict[str, Any] = {"heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
SWIGLU, ONE_NORM = MLP(intermediate_size=160), Norm(per_layer=1)


@dataclass(frozen=True)
class Case:
    """A layer that two layers of a small model have, and its norms."""

    mixer: Mixer | None
    ffn: Any = None
    norm: Norm = ONE_NORM

    def spec(self, vocab_size: int = 16) -> ModelSpec:
        group = LayerGroup(repeat=2, mixer=self.mixer, ffn=self.ffn)
        return ModelSpec(name="x", vocab_size=vocab_size, hidden_size=HIDDEN, norm=self.norm, layers=(group,))


MIXER_CASES = {
    "attention": Case(Attention(heads=4, head_dim=16)),
    "grouped heads": Case(Attention(**HEADS)),
    "qk-norm, output gate": Case(Attention(**HEADS, qk_norm="head", output_gate=True)),
    "full qk-norm, gate per head": Case(Attention(**HEADS, qk_norm="full", output_gate="head")),
    "other values": Case(Attention(**HEADS, v_head_dim=8)),
    "window": Case(Attention(**HEADS, window=32)),
    "window that does not divide": Case(Attention(**HEADS, window=50)),
    "window, other values": Case(Attention(**HEADS, v_head_dim=8, window=32)),
    "sinks": Case(Attention(**HEADS, sinks=True)),
    "sinks, window": Case(Attention(**HEADS, sinks=True, window=32)),
    "mla": Case(MLA(**LATENT, v_head_dim=24)),
    "mla, all scores": Case(MLA(**LATENT, v_head_dim=16, q_lora_rank=40)),
    "power p=1": Case(Power(**HEADS, p=1, normalize=False, gated=True, chunk_size=4)),
    "power p=2": Case(Power(**HEADS, p=2, chunk_size=4)),
    "power p=2, gated": Case(Power(**HEADS, p=2, gated=True, chunk_size=4)),
    "power p=3": Case(Power(**HEADS, p=3, normalize=False, chunk_size=4)),
    "linear": Case(Linear(**HEADS, chunk_size=4)),
    "retnet": Case(RetNet(**STATES | {"chunk_size": 4})),
    "retnet, convolution": Case(RetNet(**STATES, conv_size=4, output_norm="head", output_gate=False)),
    "lightning": Case(Lightning(**STATES)),
    "gla": Case(GLA(**STATES, gate_rank=8)),
    "gla, convolution": Case(GLA(**STATES, gate_rank=8, conv_size=4)),
    "deltanet": Case(DeltaNet(**STATES)),
    "gated_deltanet": Case(GatedDeltaNet(**STATES)),
    "gated_deltanet, shared keys": Case(GatedDeltaNet(**STATES, key_heads=2, output_gate=False, conv_size=0)),
    "kda": Case(KDA(**STATES, gate_rank=8)),
}
FFN_CASES = {
    "mlp": Case(Attention(**HEADS), SWIGLU, Norm()),
    "plain mlp": Case(Attention(**HEADS), MLP(intermediate_size=160, gated=False), Norm()),
    "mlp alone": Case(None, SWIGLU),
    "layernorm": Case(Attention(**HEADS), SWIGLU, Norm(kind="layernorm")),
    "parallel": Case(Attention(**HEADS), SWIGLU, ONE_NORM),
    "norms around": Case(Attention(**HEADS), SWIGLU, Norm(per_layer=4)),
    "moe": Case(Attention(**HEADS), MoE(experts=4, top_k=2, intermediate_size=40), Norm()),
    "moe, small experts": Case(None, MoE(experts=4, top_k=3, intermediate_size=8)),
    "moe, shared": Case(
        None, MoE(experts=4, top_k=2, intermediate_size=40, shared_intermediate_size=48, shared_gate=True, gated=False)
    ),
    "moe, one expert": Case(None, MoE(experts=4, top_k=1, intermediate_size=40, shared_intermediate_size=48)),
}
CASES = MIXER_CASES | FFN_CASES
UNTRACKED: set[type[Mixer]] = {
    GSA, RWKV7, LogLinear, SparseStateExpansion, Mamba1, Mamba2, Forgetting, MoBA, NSA, DSA
}  # fmt: skip
DOCS = (Path(__file__).resolve().parent.parent.parent / "docs" / "training-activations.md").read_text(encoding="utf-8")


@cache
def tracked(case: Case, vocab_size: int, dtype: str, checkpoint: bool) -> Tracked:
    return tracked_step(case.spec(vocab_size), TOKENS, dtype, checkpoint=checkpoint)


def layers_of(spec: ModelSpec) -> list[Layer]:
    return [layer for group in spec.layers for layer in group.period * group.repeat]


def predicted_peak(spec: ModelSpec, recipe: Recipe) -> Fraction:
    """Return the most that exists at the loss, or while a layer works: those before it, and what works beside."""
    before, behind = ends_bytes(spec, recipe)
    held = [before]
    moments = []
    for layer in layers_of(spec):
        saved = saved_layer(spec, layer, TOKENS, recipe)
        held.append(held[-1] + saved.kept_bytes)
        moments.append(held[-1] + saved.peak_bytes)
    stays, at_loss = loss_bytes(spec, recipe)
    return TOKENS * max(*moments, held[-1] + behind + stays + at_loss)


def test_every_kind_that_is_built_is_tracked() -> None:
    """All but those that docs/training-activations.md names: for these the formulas of a GPU's kernels count."""
    tracked_kinds = {type(case.mixer) for case in MIXER_CASES.values()}
    assert tracked_kinds | UNTRACKED == set(BUILT)
    assert all(vars(kind)["tracked"] for kind in (*tracked_kinds, MLP, MoE))
    assert not any(vars(kind).get("tracked") for kind in UNTRACKED)
    named = re.search(r"^(.*) are built and not tracked", DOCS, re.MULTILINE)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == {str(kind.__struct_config__.tag) for kind in UNTRACKED}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_what_layers_keep(name: str, dtype: str) -> None:
    """Storages that autograd saves, but for masks and a few numbers for each head: within 2 %."""
    spec = CASES[name].spec()
    recipe = Recipe(dtype=dtype, kernels="torch")
    found = saved_by_layer(spec, TOKENS, dtype)
    for layer, size in zip(layers_of(spec), found, strict=True):
        kept_bytes = saved_layer(spec, layer, TOKENS, recipe).kept_bytes
        assert float(kept_bytes) * TOKENS == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", CASES)
def test_peak_of_activations(name: str, recompute: Any) -> None:
    """A vocabulary of 16: the peak is in a layer or at the final norm. Most cases are within 1 %.

    One format for each case and way of recomputing, in turns.

    What is more comes from gradients of weights, as large as the activations of a few of these 128 tokens, and from
    windows that are padded to whole ones.
    """
    dtype: Any = ("bf16", "fp32")[(list(CASES).index(name) + (recompute == "full")) % 2]
    case, recipe = CASES[name], Recipe(dtype=dtype, kernels="torch", recompute=recompute)
    found = tracked(case, 16, dtype, recompute == "full").activations
    assert float(predicted_peak(case.spec(), recipe)) == pytest.approx(found, rel=0.07)


@pytest.mark.parametrize(("p", "head_dim", "hopper"), [(2, 64, True), (2, 128, True), (3, 16, False), (4, 16, False)])
def test_states_of_fused_power_attention(p: int, head_dim: int, hopper: bool) -> None:
    """The tensors that the Triton engine saves for its backward pass, by its own function: no GPU is asked."""
    tokens, normalize = 2**14, p % 2 == 0
    mixer = Power(heads=4, kv_heads=2, head_dim=head_dim, p=p, normalize=normalize)
    chunk = default_chunk_size(head_dim, p, "triton")
    call = CallShape(p, 1.0, chunk, normalize, 1, tokens, 4, 2, head_dim, head_dim)
    launched = LaunchShape(call, 1, torch.bfloat16, 90 if hopper else 80, hopper)
    tensors = saved_states(launched, True, False, False, torch.empty(0, dtype=torch.bfloat16))
    found = sum(x.numel() * x.element_size() for x in tensors)
    spec = Case(mixer, norm=Norm(kind="none")).spec()
    (part,) = saved_layer(spec, spec.layers[0].period[0], tokens, Recipe()).parts
    assert dict(part.components)["states"] * tokens == found


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_peak_at_the_loss(dtype: str, recompute: Any) -> None:
    case, recipe = CASES["mlp"], Recipe(dtype=dtype, kernels="torch", recompute=recompute)
    found = tracked(case, 4096, dtype, recompute == "full").activations
    assert float(predicted_peak(case.spec(4096), recipe)) == pytest.approx(found, rel=0.002)
