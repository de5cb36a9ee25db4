"""RWKV-7: its recurrence and its layer token by token, and the values of the first layer in the others."""

from __future__ import annotations

from functools import partial
from typing import Any

import plain_mixers as plain
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import MIXERS, spec_of
from msgspec.structs import replace
from recurrences import check_float32, check_gradients, check_pieces
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from powerplan.errors import InputError
from powerplan.ffn import MLP
from powerplan.mixers import RWKV7, Attention
from powerplan.models import build_layer, build_model
from powerplan.models.mixers.rwkv import STRONGEST_LOG_G, RWKV7Mixer, rank_one_rule, rank_one_state, rank_one_step
from powerplan.spec import LayerGroup, ModelSpec

NAMES = ("q", "k", "v", "a", "b", "log_g")


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """q, k, a, b, log_g [2, T, 3, 6], v [2, T, 3, 5]: a and b as RWKV-7 makes them, so that the state stays small."""
    torch.manual_seed(tokens)
    size = (2, tokens, 3)
    q, k = (torch.randn(*size, 6, dtype=dtype) for _ in range(2))
    removed = F.normalize(torch.randn(*size, 6, dtype=dtype), dim=-1)
    rate = torch.rand(*size, 6, dtype=dtype)
    log_g = STRONGEST_LOG_G * torch.rand(*size, 6, dtype=dtype)
    v = torch.randn(*size, 5, dtype=dtype)
    return dict(zip(NAMES, (q, k, v, -removed, removed * rate, log_g), strict=True))


def by_steps(given: dict[str, Tensor]) -> Tensor:
    outs = []
    for row in range(2):
        q, k, v, a, b, log_g = (given[name][row].transpose(0, 1) for name in NAMES)
        outs.append(plain.rwkv7_steps(q, k, v, a, b, log_g.exp(), plain.Tally()).transpose(0, 1))
    return torch.stack(outs)


@settings(max_examples=10)
@given(tokens=st.integers(1, 70), chunk_size=st.sampled_from([1, 5, 8, 20, 64, 200]))
def test_chunks_equal_the_recurrence(tokens: int, chunk_size: int) -> None:
    given = inputs(tokens)
    torch.testing.assert_close(rank_one_rule(**given, state=None, chunk_size=chunk_size)[0], by_steps(given))


@settings(max_examples=8)
@given(first=st.integers(1, 40), second=st.integers(1, 40), chunk_size=st.sampled_from([1, 8, 20, 64]))
def test_a_state_is_its_own_and_the_transition_times_the_one_before(first: int, second: int, chunk_size: int) -> None:
    given = inputs(first + second)
    _, before = rank_one_rule(**{name: x[:, :first] for name, x in given.items()}, state=None, chunk_size=chunk_size)
    after = {name: x[:, first:] for name, x in given.items() if name != "q"}
    own, transition = rank_one_state(**after, chunk_size=chunk_size, with_transition=True)
    assert transition is not None
    expected = rank_one_rule(**given, state=None, chunk_size=chunk_size)[1]
    torch.testing.assert_close(own + transition @ before, expected)
    alone, none = rank_one_state(**after, chunk_size=chunk_size, with_transition=False)
    assert none is None
    torch.testing.assert_close(alone, own)


def test_gradients_equal_those_of_the_recurrence() -> None:
    check_gradients(inputs(45), lambda given: rank_one_rule(**given, state=None, chunk_size=20)[0], by_steps)


def test_states_go_on_in_pieces_and_steps() -> None:
    check_pieces(inputs(60), lambda given, state: rank_one_rule(**given, state=state, chunk_size=16), rank_one_step)


@pytest.mark.parametrize("chunk_size", [16, 64, 200])
def test_float32_follows_float64(chunk_size: int) -> None:
    """At the strongest decays of RWKV-7, in chunks that would overflow without anchors: exp(200 x 0.61)."""
    narrow = inputs(200, torch.float32)
    narrow["log_g"] = torch.full_like(narrow["log_g"], STRONGEST_LOG_G)
    run = partial(rank_one_rule, state=None, chunk_size=chunk_size)
    check_float32(narrow, lambda given: run(**given)[0], 4 * chunk_size * 2**-24)


def layer_by_tokens(mixer: RWKV7Mixer, x: Tensor, first_values: Tensor | None) -> Tensor:
    """The time mix of arXiv 2503.14456, section 4, equations 3 to 19, one token and one head at a time."""
    weights = {name: weight.detach() for name, weight in mixer.named_parameters()}
    heads, size = mixer.heads, mixer.head_dim
    outs = []
    for row, sequence in enumerate(x):
        states = [torch.zeros(weights["v_proj.weight"].shape[0] // heads, size, dtype=x.dtype) for _ in range(heads)]
        before = torch.zeros_like(sequence[0])
        for at, token in enumerate(sequence):
            mixed = [token + (before - token) * share for share in weights["shift"]]
            before = token
            r, k, v = (weights[f"{name}_proj.weight"] @ mixed[index] for name, index in (("q", 0), ("k", 2), ("v", 3)))
            d = weights["decay.2.weight"] @ torch.tanh(weights["decay.0.weight"] @ mixed[1]) + weights["decay.2.bias"]
            w = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=x.dtype)) * torch.sigmoid(d))
            a = torch.sigmoid(weights["rate.1.weight"] @ (weights["rate.0.weight"] @ mixed[4]) + weights["rate.1.bias"])
            g = weights["output_gate.2.weight"] @ torch.sigmoid(weights["output_gate.0.weight"] @ mixed[5])
            if first_values is not None:
                down, up = weights["value_gate.0.weight"], weights["value_gate.1.weight"]
                share = torch.sigmoid(up @ (down @ mixed[3]) + weights["value_gate.1.bias"])
                v = (1 - share) * v + share * first_values[row, at]
            parts = []
            for head in range(heads):
                own, values = slice(head * size, (head + 1) * size), v.chunk(heads)[head]
                removal = k[own] * weights["removal"][head]
                removal = removal / removal.norm()
                key = k[own] * (1 + (a[own] - 1) * weights["kept_key"][head])
                transition = torch.diag(w[own]) - torch.outer(removal, a[own] * removal)
                states[head] = states[head] @ transition + torch.outer(values, key)
                out = states[head] @ r[own]
                out = (out - out.mean()) / torch.sqrt(out.var(correction=0) + size * 1e-5)
                norm = [weights[f"output_norm.{name}"].chunk(heads)[head] for name in ("weight", "bias")]
                parts.append(out * norm[0] + norm[1] + (r[own] * key * weights["bonus"][head]).sum() * values)
            outs.append(weights["o_proj.weight"] @ (torch.cat(parts) * g))
    return torch.stack(outs).view(*x.shape[:2], -1)


@pytest.mark.parametrize("kind", ["rwkv7", "rwkv7, values"])
def test_the_layer_equals_its_equations(kind: str) -> None:
    torch.manual_seed(0)
    mixer = RWKV7Mixer(MIXERS[kind], 16, dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.normal_(std=0.5)
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    first_values = torch.randn(2, 19, 16, dtype=torch.float64) if "values" in kind else None
    out = mixer(x, first_values=first_values)
    torch.testing.assert_close(out, layer_by_tokens(mixer, x, first_values))


def mixed_model() -> ModelSpec:
    """RWKV-7, attention, and two layers of RWKV-7 that mix in the first one's values, as catalogue models have them."""
    later = RWKV7(heads=4, head_dim=4, decay_rank=3, rate_rank=2, gate_rank=4, value_rank=3, chunk_size=8)
    mixers: tuple[Any, ...] = (replace(later, value_rank=None), Attention(heads=2, head_dim=8), later, later)
    groups = tuple(LayerGroup(mixer=mixer, ffn=MLP(intermediate_size=24)) for mixer in mixers)
    return ModelSpec(name="x", vocab_size=9, hidden_size=16, layers=groups)


def test_later_layers_mix_in_the_values_of_the_first() -> None:
    torch.manual_seed(0)
    model = build_model(mixed_model(), dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    tokens = torch.randint(9, (2, 20))
    stream, values = model.layers[0](model.embedding(tokens))
    assert values.shape == (2, 20, 16)
    stream = model.layers[1](stream)
    alone = stream
    for layer in model.layers[2:]:
        stream, passed_on = layer(stream, None, None, values)
        assert passed_on is values
        alone, _ = layer(alone)
    expected = model.lm_head(model.final_norm(stream))
    torch.testing.assert_close(model(tokens), expected)
    assert (model.lm_head(model.final_norm(alone)) - expected).abs().max() > 0.1
    (gradient,) = torch.autograd.grad(model(tokens).square().sum(), [model.layers[2].mixer.value_gate[0].weight])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_values_go_through_checkpoints(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, tokens = build_model(mixed_model(), dtype=torch.float64), torch.randint(9, (2, 20))
    model.loss(tokens).mean().backward()
    exact = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)
    model.loss(tokens).mean().backward()
    torch.testing.assert_close({name: weight.grad for name, weight in model.named_parameters()}, exact)


def test_a_model_of_layers_with_a_value_rank_takes_the_first_ones_values() -> None:
    """As `--mixer rwkv7` makes it: the first of them mixes in its own."""
    model = build_model(spec_of(MIXERS["rwkv7, values"], repeat=3), dtype=torch.float64)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    stream, values = model.layers[0](x)
    torch.testing.assert_close(stream, build_layer_like(model.layers[0], 0)(x))
    _, passed_on = model.layers[1](stream, None, None, values)
    assert passed_on is values


def build_layer_like(layer: torch.nn.Module, position: int) -> torch.nn.Module:
    alone = build_layer(spec_of(MIXERS["rwkv7, values"], repeat=3), position, dtype=torch.float64)
    alone.load_state_dict(layer.state_dict())
    return alone


def test_what_rwkv7_refuses() -> None:
    mixer = MIXERS["rwkv7"]
    spec = ModelSpec(name="x", vocab_size=9, hidden_size=16, layers=(LayerGroup(mixer=mixer),))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rwkv7 layers with channel_mix and no ffn are not built"):
        build_layer(spec)
    groups = tuple(LayerGroup(mixer=replace(MIXERS["rwkv7, values"], v_head_dim=size)) for size in (4, 5))  # type: ignore[arg-type]
    spec = ModelSpec(name="x", vocab_size=9, hidden_size=16, layers=groups)
    with pytest.raises(
        InputError,
        match="value_rank: layer 1 has values of 20 features, and layer 0, whose values it takes, of 16",
    ):
        build_model(spec)
