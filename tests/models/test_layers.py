"""Layers built from specs: parameters equal the accounting, outputs equal the definition, every weight is used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import specs
import torch
from hypothesis import given, settings
from torch import Tensor

from powerplan.errors import InputError
from powerplan.ffn import MLP, MoE
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import Attention, Linear, Power
from powerplan.mixers.base import total
from powerplan.models import build_layer
from powerplan.models.mixers.attention import softmax_attention
from powerplan.models.rope import angles, rotate
from powerplan.spec import Layer, LayerGroup, ModelSpec, Norm


def is_built(layer: Layer) -> bool:
    mixer, ffn = layer.mixer, layer.ffn
    known = mixer is None or (type(mixer) in (Attention, Power, Linear) and not getattr(mixer, "sinks", False))
    return known and not isinstance(ffn, MoE)


def check_parameters(spec: ModelSpec, layer: Layer) -> None:
    expected = total(spec.norm_terms())
    for block in (layer.mixer, layer.ffn):
        if block is not None:
            expected += total(block.matmul_terms(spec.hidden_size)) + total(block.other_terms(spec.hidden_size))
    module = build_layer(spec, layer, device="meta")
    assert sum(weight.numel() for weight in module.parameters()) == expected


CATALOGUE = [(name, use.layer) for name in catalogue_names() for use in catalogue_spec(name).layer_uses()]
BUILT = [(name, layer) for name, layer in CATALOGUE if is_built(layer)]


@pytest.mark.parametrize(("name", "layer"), BUILT, ids=lambda item: item if isinstance(item, str) else item.describe())
def test_catalogue_layers_have_the_parameters_of_the_accounting(name: str, layer: Layer) -> None:
    check_parameters(catalogue_spec(name), layer)


def test_most_of_the_catalogue_is_built() -> None:
    assert len({name for name, _ in BUILT}) >= 30


@given(specs.specs)
def test_layers_have_the_parameters_of_the_accounting(spec: ModelSpec) -> None:
    for use in spec.layer_uses():
        if is_built(use.layer) and spec.norm.per_layer in (0, 2, 4) and use.layer.mixer and use.layer.ffn:
            check_parameters(spec, use.layer)


def spec_of(mixer: Any, ffn: Any = None, **fields: Any) -> ModelSpec:
    group = LayerGroup(mixer=mixer, ffn=ffn or MLP(intermediate_size=24))
    return ModelSpec(**{"name": "x", "vocab_size": 9, "hidden_size": 16, "layers": (group,), **fields})


HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 6, "v_head_dim": 5}
MIXERS = {
    "attention": Attention(**HEADS, bias=True),
    "qk-norm": Attention(**HEADS, qk_norm="head", output_gate=True),
    "full qk-norm": Attention(**HEADS, qk_norm="full"),
    "window": Attention(**HEADS, window=7, bias="qkv"),
    "power": Power(**HEADS, p=2, gated=True, bias=True),
    "power p=3": Power(**HEADS, p=3, normalize=False, chunk_size=8),
    "linear": Linear(**HEADS, gated=True),
}


@pytest.mark.parametrize("kind", MIXERS)
def test_every_weight_has_a_gradient_and_nothing_sees_the_future(kind: str) -> None:
    torch.manual_seed(0)
    layer = build_layer(spec_of(MIXERS[kind]), dtype=torch.float64)
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    out = layer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(layer(x[:, :13]), out[:, :13])
    out.square().sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        # Softmax and normalised weights do not change when a constant is added to every key.
        assert weight.grad.abs().max() > 0 or name == "mixer.k_proj.bias", name


@pytest.mark.parametrize("impl", ["reference", "recurrent", "torch"])
def test_power_layers_take_an_implementation(impl: str) -> None:
    spec = spec_of(MIXERS["power"])
    found, exact = build_layer(spec, dtype=torch.float64, impl=impl), build_layer(spec, dtype=torch.float64)
    exact.load_state_dict(found.state_dict())
    x = torch.randn(1, 33, 16, dtype=torch.float64)
    torch.testing.assert_close(found(x), exact(x))


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Softmax attention with all T^2 weights. [B, T, H, K], [B, T, G, K], [B, T, G, V] -> [B, T, H, V]."""
    repeats, tokens = q.shape[2] // k.shape[2], q.shape[1]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen = seen if window is None else seen.triu(1 - window)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@settings(deadline=None, max_examples=40)
@given(specs.windows, specs.contexts.filter(lambda tokens: tokens < 200))
def test_windows_equal_the_definition(window: int | None, tokens: int) -> None:
    torch.manual_seed(tokens)
    q = torch.randn(2, tokens, 4, 6, dtype=torch.float64)
    k, v = torch.randn(2, tokens, 2, 6, dtype=torch.float64), torch.randn(2, tokens, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(softmax_attention(q, k, v, window), by_definition(q, k, v, window))


def test_a_window_costs_no_square() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        for tokens in (4096, 8192):
            x = torch.empty(1, tokens, 2, 8, device="meta")
            softmax_attention(x, x, x, 256)
    shorter, longer = 4096 / 256 - 1, 8192 / 256 - 1
    first = 2 * 2 * 256**2 * 16  # One block that sees itself alone.
    expected = sum(first + count * 2 * first for count in (shorter, longer))
    assert counter.get_total_flops() == expected


def test_rope_turns_by_the_distance() -> None:
    q, k = torch.randn(1, 1, 1, 10, dtype=torch.float64), torch.randn(1, 1, 1, 10, dtype=torch.float64)
    cos, sin = (x.double() for x in angles(0, 50, 10, torch.device("cpu")))

    def product(query: int, key: int) -> float:
        turned = (rotate(x, cos[at : at + 1], sin[at : at + 1]) for x, at in ((q, query), (k, key)))
        left, right = turned
        return float((left * right).sum())

    assert product(30, 10) == pytest.approx(product(45, 25), rel=1e-5)
    assert product(0, 0) == pytest.approx(float((q * k).sum()))
    assert product(30, 10) != pytest.approx(product(30, 11), rel=1e-3)


def test_learned_positions_leave_rope_out() -> None:
    assert build_layer(spec_of(MIXERS["attention"]), device="meta").mixer.rope is True  # type: ignore[union-attr]
    learned = build_layer(spec_of(MIXERS["attention"], position_embeddings=64), device="meta")
    assert learned.mixer.rope is False  # type: ignore[union-attr]


@pytest.mark.parametrize("per_layer", [0, 1, 2, 4])
def test_norms(per_layer: int) -> None:
    spec = spec_of(MIXERS["attention"], norm=Norm(per_layer=per_layer))
    check_parameters(spec, spec.layers[0].period[0])
    assert build_layer(spec)(torch.randn(1, 5, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "layer", "message"),
    [
        (spec_of(Attention(**HEADS, sinks=True)), 0, "attention with sinks is not built yet"),
        (spec_of(MIXERS["power"]), 1, "layer 1 is out of range; x has layers 0 to 0"),
        (spec_of(MIXERS["linear"], norm=Norm(per_layer=3)), 0, "3 norms in a layer are not built; allowed"),
        (spec_of(MIXERS["linear"], MoE(experts=2, top_k=1, intermediate_size=4)), 0, "mixture of experts is not built"),
        (catalogue_spec("deepseek-v2"), 0, "not built yet; attention, windows, power and linear are"),
    ],
)
def test_what_is_not_built_is_refused(spec: ModelSpec, layer: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_layer(spec, layer, device="meta")
