"""What training keeps of activations, by hand for a few layers, and what must hold for all kinds and models."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, get_args

import pytest
from kinds import KINDS, variants

from powerplan.choices import Kernels
from powerplan.extras import Extra
from powerplan.ffn import FFNS, MLP, MoE
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import KDA, MIXERS, Attention, GatedDeltaNet, Mamba2, Power
from powerplan.run.recipe import Recipe
from powerplan.run.saved import SavedLayer, ends_bytes, loss_bytes, saved_layer
from powerplan.spec import Layer, LayerGroup, ModelSpec, Norm

ESTIMATES = {
    *("rwkv7", "rwkv4", "log_linear", "gsa", "sse", "mlstm", "rglru", "short_conv"),
    *("nsa", "moba", "dsa", "indexed_blocks", "compressed", "moe", "memory"),
    *("hyena", "exponential_sparse", "span_search", "memory_sparse", "wersa"),
}
"""Kinds of whose fused kernels no code was read."""


def spec_of(mixer: Any = None, ffn: Any = None, *, hidden: int = 64, **fields: Any) -> ModelSpec:
    group = LayerGroup(mixer=mixer, ffn=ffn)
    return ModelSpec(**{"name": "x", "vocab_size": 50, "hidden_size": hidden, "layers": (group,), **fields})


def saved(mixer: Any = None, ffn: Any = None, *, context: int = 8192, **recipe: Any) -> SavedLayer:
    """Return what the one layer keeps, without norms."""
    spec = spec_of(mixer, ffn, norm=Norm(kind="none"))
    return saved_layer(spec, spec.layers[0].period[0], context, Recipe(**recipe))


def components(layer: SavedLayer) -> dict[str, Fraction]:
    (part,) = layer.parts
    return dict(part.components)


def test_a_layer_of_llama_by_hand() -> None:
    spec = catalogue_spec("llama-3-8b")
    layer = saved_layer(spec, spec.layers[0].period[0], 8192, Recipe())
    norm = 2 * 4096 + 4
    # Input; 32 + 8 + 8 heads of 128; outputs; a log-sum-exp per head.
    attention = 2 * (4096 + 48 * 128 + 4096) + 4 * 32
    mlp = 2 * (4096 + 3 * 14336)
    assert [part.bytes for part in layer.parts] == [norm, attention, norm, mlp]
    assert layer.kept_bytes == 2 * norm + attention + mlp == 139_400
    # At the activation function: gradients of gate and up, and of the layer's output.
    assert layer.peak_bytes == 2 * (2 * 14336 + 4096)


def test_recomputation_of_a_layer_of_llama() -> None:
    spec = catalogue_spec("llama-3-8b")
    layer = spec.layers[0].period[0]
    selective = saved_layer(spec, layer, 8192, Recipe(recompute="selective"))
    full = saved_layer(spec, layer, 8192, Recipe(recompute="full"))
    # Selective: without the norms' inputs or outputs, and without the product of gate and up, which comes back.
    assert selective.kept_bytes == 139_400 - 2 * (2 * 4096 + 4) - 2 * 14336
    assert selective.peak_bytes == 2 * (3 * 14336 + 4096)
    assert full.kept_bytes == 2 * 4096
    assert full.peak_bytes == 139_400 - 2 * 4096 + 2 * (2 * 14336 + 4096)


def test_states_of_power_attention_are_those_of_its_kernels() -> None:
    """docs/kernels.md: 288 bytes per token and head in Triton (and 8 of the normaliser), 293 in torch; K = V = 64."""
    mixer, context = Power(heads=1, head_dim=64, p=2), 2**20
    fused = components(saved(mixer, context=context))["states"]
    assert fused == 2 * 2304 * 64 / Fraction(1024) + 2 * 64 * 64 / Fraction(1024) == 296
    torch = components(saved(mixer, context=context, kernels="torch"))["states"]
    assert float(torch) == pytest.approx(4 * 2304 * 65 / (8 * 256), rel=0.002)


@pytest.mark.parametrize(("kernels", "context"), [("fused", 1024), ("torch", 8 * 256)])
def test_no_states_where_there_is_one_chunk_or_one_saved_state(kernels: str, context: int) -> None:
    mixer = Power(heads=1, head_dim=64, p=2)
    assert components(saved(mixer, context=context, kernels=kernels))["states"] == 0
    assert components(saved(mixer, context=context + 1, kernels=kernels))["states"] > 0


def test_delta_rules_by_hand() -> None:
    """What kernels of flash-linear-attention save for backward, and projections, convolution, norm and gate keep."""
    gated = GatedDeltaNet(heads=4, head_dim=16, v_head_dim=32, key_heads=2)
    joined, values = 2 * 2 * 16 + 4 * 32, 4 * 32
    # Input; convolution; q, k, v; beta twice and the gate's input; the inverse; norm: outputs, gate, product.
    activations = 64 + joined + joined + 3 * 4 + 4 * 64 + 3 * values
    fp32 = 2 * 2 + 4 + 4  # norms of q and k, summed gates, norms of outputs
    assert saved(gated).kept_bytes == 2 * activations + 4 * fp32
    kda = KDA(heads=4, head_dim=16, v_head_dim=32, gate_rank=8)
    joined = 2 * 4 * 16 + 4 * 32
    activations = 64 + joined + joined + 2 * 4 + 4 * 16 + 2 * 8 + 2 * 4 * 64 + 3 * values
    assert saved(kda).kept_bytes == 2 * activations + 4 * (2 * 4 + 4)


def test_mamba2_by_hand() -> None:
    mixer = Mamba2(heads=4, head_dim=16, state_dim=8, groups=2)
    assert saved(mixer).kept_bytes == 2 * (64 + (2 * 64 + 2 * 2 * 8 + 4) + 64) + 4 * 2


def test_experts_by_hand() -> None:
    moe = MoE(experts=8, top_k=2, intermediate_size=40, shared_intermediate_size=48)
    # Rows of the hidden size three times; gate, up and product of routed and shared experts; weights and indices.
    activations = 64 + 3 * 2 * 64 + 3 * 2 * 40 + 3 * 48 + 2
    assert saved(None, moe).kept_bytes == 2 * activations + 4 * 2 + 8 * 3 * 2


def test_fused_windows_keep_what_attention_keeps() -> None:
    whole, window = Attention(heads=4, head_dim=16), Attention(heads=4, head_dim=16, window=100)
    assert saved(window).kept_bytes == saved(whole).kept_bytes
    assert saved(window, kernels="torch").kept_bytes > saved(whole, kernels="torch").kept_bytes


def test_a_window_as_long_as_the_context_is_none() -> None:
    whole, window = Attention(heads=4, head_dim=16), Attention(heads=4, head_dim=16, window=100)
    for mixer in (whole, window):
        assert saved(mixer, context=100, kernels="torch") == saved(whole, context=100, kernels="torch")


def test_one_norm_before_two_blocks_is_read_by_both() -> None:
    mixer, ffn = Attention(heads=4, head_dim=16), MLP(intermediate_size=160)

    def kept_with(norms: int) -> Fraction:
        spec = spec_of(mixer, ffn, norm=Norm(per_layer=norms))
        return saved_layer(spec, spec.layers[0].period[0], 100, Recipe()).kept_bytes

    norm, width = 2 * 64 + 4, 2 * 64
    assert kept_with(2) - kept_with(1) == norm + width
    assert kept_with(4) - kept_with(2) == 2 * norm
    assert kept_with(2) - kept_with(0) == 2 * norm


def test_extras_keep_what_they_multiply() -> None:
    mixer = Attention(heads=4, head_dim=16)
    plain = saved_layer(spec_of(mixer), Layer(mixer=mixer), 100, Recipe()).kept_bytes
    scale, matrix = Extra(name="scale", vectors=1), Extra(name="matrix", vectors=64, matmul=True)
    for extra, more in ((scale, 0), (matrix, 2 * 64)):
        layer = Layer(mixer=mixer, extras=(extra,))
        assert saved_layer(spec_of(mixer), layer, 100, Recipe()).kept_bytes == plain + more


def test_the_loss() -> None:
    spec = catalogue_spec("llama-3-8b")
    assert loss_bytes(spec, Recipe()) == (0, 12 * 128_256)
    assert loss_bytes(spec, Recipe(loss="chunked")) == (2 * 4096, 12 * 128_256)
    assert ends_bytes(spec, Recipe()) == (0, (2 * 4096 + 4) + 2 * 4096)


def test_a_small_vocabulary_takes_less_than_the_final_norm() -> None:
    spec = spec_of(Attention(heads=4, head_dim=16), hidden=4096)
    _, peak = loss_bytes(spec, Recipe())
    assert peak == 2 * 4096 > 12 * 50


def test_estimates_are_these() -> None:
    """Every other kind follows the code of a kernel; with torch's kernels, the memory tracker."""
    blocks = {**MIXERS, **FFNS}
    fused = {kind for kind, block in blocks.items() if next(variants(block)).saved_is_estimate("fused")}
    assert fused == ESTIMATES
    torch = {kind for kind, block in blocks.items() if next(variants(block)).saved_is_estimate("torch")}
    assert torch == ESTIMATES - {"moe"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_context(kind: str) -> None:
    for mixer in variants(MIXERS[kind]):
        for kernels in get_args(Kernels):
            for context in (1, 3, 100, 5000):
                layer = saved(mixer, context=context, kernels=kernels)
                (part,) = layer.parts
                assert isinstance(layer.kept_bytes, Fraction)
                assert layer.kept_bytes >= 2 * 64
                assert all(size >= 0 for _, size in part.components)
                assert 0 <= part.again < part.bytes
                assert part.working > 0


@pytest.mark.parametrize("name", sorted(catalogue_names()))
def test_recomputation_keeps_less_and_takes_more_while_a_layer_works(name: str) -> None:
    spec = catalogue_spec(name)
    for use in spec.layer_uses():
        none, selective, full = (
            saved_layer(spec, use.layer, 8192, Recipe(recompute=recompute))
            for recompute in ("none", "selective", "full")
        )
        assert full.kept_bytes == 2 * spec.hidden_size < selective.kept_bytes <= none.kept_bytes
        assert full.peak_bytes >= none.kept_bytes - full.kept_bytes
        assert none.peak_bytes <= selective.peak_bytes <= full.peak_bytes
        assert none.kept_bytes == sum(part.bytes for part in none.parts)
