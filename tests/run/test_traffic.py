"""What devices send each other: bytes by hand, and which way of sharing a sequence sends less."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from powerplan.accounting import Accounting
from powerplan.dims import spow_dim
from powerplan.hardware import find_device
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention, Linear, Power
from powerplan.run.degrees import Degrees
from powerplan.run.links import all_gather_s, all_reduce_s, all_to_all_s, cluster_of, reduce_scatter_s
from powerplan.run.loads import ModelLoad, model_load
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads
from powerplan.run.traffic import Passing, Traffic, links_of, passing_of, state_break_even, traffic_of
from powerplan.spec import Layer, LayerGroup, ModelSpec
from powerplan.swap import with_mixer


def load_of(mixer: str | None = None, name: str = "llama-3-8b", context: int = 131_072) -> ModelLoad:
    spec = catalogue_spec(name)
    return model_load(Accounting(with_mixer(spec, mixer)[0] if mixer else spec), context, Recipe())


def passings(model: ModelLoad, degrees: Degrees) -> list[Passing]:
    links = links_of(cluster_of(find_device("h100-sxm"), degrees.devices), degrees)
    (stage,) = stage_loads(model, 1)
    return [passing_of(exchange, model, degrees, links, 5e14) for exchange in stage.exchanges]


def test_a_state_is_as_many_bytes_as_keys_and_values_of_8320_tokens() -> None:
    """d = 128, G = 8, p = 2: D = 128 * 129 / 2 = 8,256 and a normaliser, in fp32; keys and values in bf16."""
    state, entry = 8 * 8256 * 129 * 4, 8 * (128 + 128) * 2
    assert state_break_even(Fraction(state), Fraction(entry)) == state // entry == 8320


@pytest.mark.parametrize("mixer", ["power:p=2", "power:p=2,normalize=false", "linear"])
def test_recurrent_layers_pass_one_state_whatever_the_context(mixer: str) -> None:
    degrees = Degrees(cp=8)
    short, long = (passings(load_of(mixer, context=context), degrees) for context in (65_536, 1_048_576))
    assert [way.way for way in short] == ["state"]
    assert short[0].bytes_sent == long[0].bytes_sent
    columns = {"power:p=2": 129, "power:p=2,normalize=false": 128, "linear": 128}[mixer]
    width = 128 if mixer == "linear" else Power(heads=1, head_dim=128, p=2).feature_dim
    assert short[0].bytes_sent == 8 * width * columns * 4
    assert short[0].break_even == 8 * width * columns * 4 // (8 * 256 * 2)


@pytest.mark.parametrize("gated", ["true", "false"])
@pytest.mark.parametrize(
    "mixer", ["power:p=2", "power:p=4,head_dim=16", "power:p=3,normalize=false,head_dim=32", "linear"]
)
def test_what_is_planned_is_what_the_kernels_hand_over(mixer: str, gated: str) -> None:
    """A gather of contiguous parts; its bytes are counted on the wire in tests/kernels/test_context_parallel.py."""
    torch = pytest.importorskip("torch")
    from powerplan.kernels.distributed.exchange import Wire
    from powerplan.kernels.distributed.layout import make_layout, named_ranges

    ranks, context = 8, 65_536
    model = load_of(f"{mixer}{',' if ':' in mixer else ':'}gated={gated}", context=context)
    (passing,) = passings(model, Degrees(cp=ranks))
    kind = model.spec.mixers()[0]
    assert isinstance(kind, (Power, Linear))
    layout = make_layout((0, context), named_ranges("contiguous", context, ranks))
    nobody: Any = None
    for rank in range(ranks):
        wire = Wire(nobody, rank, layout, "gather", None)
        columns = kind.v_head_dim + int(kind.has_normaliser)
        size = (model.recipe.micro_batch, kind.kv_heads, spow_dim(kind.head_dim, kind.degree), columns)
        message = wire.message_bytes(size, kind.gated, torch.float32)
        assert passing.bytes_sent == wire.messages(False) * message == wire.messages(True) * message


def test_delta_rules_pass_a_transition_beside_their_state() -> None:
    """flash-linear-attention, ops/cp/README.md: d_k x d_v and d_k x d_k for each head, in fp32."""
    ways = {way.way: way for way in passings(load_of(name="qwen3-next-80b-a3b"), Degrees(cp=2))}
    convolutions = 3 * (2 * 16 * 128 + 32 * 128)
    assert ways["state"].bytes_sent == 32 * 128 * (128 + 128) * 4 + convolutions * 2


def test_attention_passes_keys_and_values_in_a_ring() -> None:
    (ring,) = passings(load_of(), Degrees(cp=16))
    assert ring.way == "ring"
    assert ring.bytes_sent == 15 * (131_072 // 16) * 8 * 256 * 2


def test_heads_are_exchanged_where_that_is_exposed_for_less_time() -> None:
    (ways,) = passings(load_of(name="llama-2-7b", context=2048), Degrees(cp=8))
    assert ways.way == "all-to-all"
    tokens, heads = 2048 // 8, 2 * (32 + 32) * 128
    assert ways.bytes_sent == tokens * heads * 2 * 7 / 8


def test_windows_pass_the_keys_of_one_window() -> None:
    near, far = (passings(load_of("window:4096", context=context), Degrees(cp=8)) for context in (65_536, 1_048_576))
    assert [way.way for way in near] == ["halo"]
    assert near[0].bytes_sent == far[0].bytes_sent == 4096 * 8 * 256 * 2


def test_a_hybrid_passes_each_kind_in_its_own_way() -> None:
    model = load_of(name="qwen3-next-80b-a3b")
    ways = passings(model, Degrees(cp=2))
    assert {way.way: way.layers for way in ways} == {"state": 36, "ring": 12}


def test_weights_are_gathered_and_gradients_reduced_layer_by_layer() -> None:
    model, degrees = load_of(context=8192), Degrees(fsdp=16)
    links = links_of(cluster_of(find_device("h100-sxm"), 16), degrees)
    (stage,) = stage_loads(model, 1)
    traffic = traffic_of(model, stage, degrees, links)
    assert links.shards is not None
    layer = model.parameters / 32
    assert traffic.gather_s == pytest.approx(32 * all_gather_s(links.shards, 16, 2 * layer))
    assert traffic.reduce_s == pytest.approx(32 * reduce_scatter_s(links.shards, 16, 4 * layer))
    assert traffic.tensor_s == traffic.experts_s == traffic.stage_s == 0


def test_tensor_parallel_layers_gather_and_scatter_the_stream_twice() -> None:
    model, degrees = load_of(context=8192), Degrees(tp=8)
    links = links_of(cluster_of(find_device("h100-sxm"), 8), degrees)
    (stage,) = stage_loads(model, 1)
    assert links.tp is not None
    stream = 8192 * 4096 * 2
    both = all_gather_s(links.tp, 8, stream) + reduce_scatter_s(links.tp, 8, stream)
    assert traffic_of(model, stage, degrees, links).tensor_s == pytest.approx(64 * both)


def of_stage(model: ModelLoad, degrees: Degrees) -> Traffic:
    links = links_of(cluster_of(find_device("h100-sxm"), degrees.devices), degrees)
    (stage,) = stage_loads(model, 1)
    return traffic_of(model, stage, degrees, links)


def test_sharded_optimizer_states_send_no_more_than_all_reduces() -> None:
    """ZeRO, arXiv 1910.02054, section 7: gradients are reduced to their shards, and weights gathered, 2 P in all."""
    spec = catalogue_spec("llama-3-8b")
    model = model_load(Accounting(spec), 8192, Recipe(gradients_dtype="bf16"))
    plain, sharded, fully = (of_stage(model, Degrees(fsdp=16, zero=zero)) for zero in (0, 1, 3))
    assert sharded.reduce_s + sharded.update_s == pytest.approx(plain.reduce_s)
    assert plain.update_s == fully.update_s == 0
    assert fully.gather_s == pytest.approx(sharded.update_s)


def test_experts_that_one_device_holds_alone_are_not_gathered() -> None:
    model = load_of(name="mixtral-8x7b", context=4096)
    degrees = Degrees(fsdp=8, ep=8)
    links = links_of(cluster_of(find_device("h100-sxm"), 8), degrees)
    (stage,) = stage_loads(model, 1)
    assert links.shards is not None
    dense = (stage.parameters + stage.outer_parameters) / 32
    traffic = traffic_of(model, stage, degrees, links)
    assert traffic.gather_s == pytest.approx(32 * all_gather_s(links.shards, 8, 2 * dense))
    half = of_stage(model, Degrees(fsdp=8, ep=4))
    wait = 32 * all_gather_s(links.shards, 2, 2 * stage.expert_parameters / 4 / 32)
    assert half.gather_s == pytest.approx(traffic.gather_s + wait)


def test_replicas_add_up_the_shards_that_a_device_has() -> None:
    model = load_of(name="mixtral-8x7b", context=4096)
    whole, split = (of_stage(model, Degrees(fsdp=8, ep=ep, replicas=2)) for ep in (1, 8))
    assert whole.replicas_s == pytest.approx(split.replicas_s)
    links = links_of(cluster_of(find_device("h100-sxm"), 16), Degrees(fsdp=8, replicas=2))
    assert links.replicas is not None
    assert whole.replicas_s == pytest.approx(all_reduce_s(links.replicas, 2, 4 * model.parameters / 8))


def test_tokens_go_to_the_experts_of_each_layer_and_back() -> None:
    model, degrees = load_of(name="deepseek-v3", context=4096), Degrees(fsdp=8, ep=8)
    links = links_of(cluster_of(find_device("h100-sxm"), 8), degrees)
    assert links.experts is not None
    each = all_to_all_s(links.experts, 8, 4096 * 8 * 7168 * 2)
    assert of_stage(model, degrees).experts_s == pytest.approx(58 * 2 * each)


def test_devices_that_split_heads_pass_the_keys_of_their_own() -> None:
    model = load_of()  # 8 key/value heads, of which 16 devices need one each, and two of them the same.
    one, eight, sixteen = (passings(model, Degrees(cp=4, tp=tp))[0].bytes_sent for tp in (1, 8, 16))
    assert one == 8 * eight == 8 * sixteen
    latents = load_of(name="deepseek-v3", context=8192)
    alone, split = (passings(latents, Degrees(cp=4, tp=tp))[0].bytes_sent for tp in (1, 8))
    assert alone == split == 3 * 2048 * (512 + 64) * 2


def test_layers_with_the_keys_of_others_pass_them_too() -> None:
    own, shared = (Attention(heads=8, kv_heads=2, head_dim=64, shared_kv=share) for share in (False, True))
    group = LayerGroup(pattern=(Layer(mixer=own), Layer(mixer=shared)))
    spec = ModelSpec(name="x", vocab_size=100, hidden_size=512, layers=(group,))
    model = model_load(Accounting(spec), 4096, Recipe())
    (stage,) = stage_loads(model, 1)
    assert stage.recurrent_flops == 0
    assert stage.attention_flops == 2 * 2 * 8 * 128 * 4097 / 2
    (ring,) = passings(model, Degrees(cp=4))
    assert ring.layers == 2


def test_a_window_as_long_as_the_context_is_none() -> None:
    (ring,) = passings(load_of("window:8192", context=8192), Degrees(cp=16))
    assert ring.way == "ring"
    assert ring.bytes_sent == passings(load_of(context=8192), Degrees(cp=16))[0].bytes_sent
