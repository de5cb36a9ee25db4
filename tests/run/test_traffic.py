"""What devices send each other: bytes by hand, and which way of sharing a sequence sends less."""

from __future__ import annotations

import pytest

from powerplan.accounting import Accounting
from powerplan.hardware import find_device
from powerplan.load import catalogue_spec
from powerplan.run.degrees import Degrees
from powerplan.run.links import all_gather_s, all_reduce_s, all_to_all_s, cluster_of, reduce_scatter_s
from powerplan.run.loads import ModelLoad, model_load
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads
from powerplan.run.traffic import Traffic, links_of, traffic_of
from powerplan.swap import with_mixer


def load_of(mixer: str | None = None, name: str = "llama-3-8b", context: int = 131_072) -> ModelLoad:
    spec = catalogue_spec(name)
    return model_load(Accounting(with_mixer(spec, mixer)[0] if mixer else spec), context, Recipe())


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


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_tokens_go_to_the_experts_of_each_layer_and_back(tp: int, cp: int) -> None:
    """Each device sends its part of the tokens: tensor parallelism and context parallelism share a sequence."""
    model, degrees = load_of(name="qwen3-235b-a22b", context=4096), Degrees(fsdp=8, ep=8, tp=tp, cp=cp)
    links = links_of(cluster_of(find_device("h100-sxm"), degrees.devices), degrees)
    assert links.experts is not None
    each = all_to_all_s(links.experts, 8, 4096 // (tp * cp) * 8 * 4096 * 2)
    assert of_stage(model, degrees).experts_s == pytest.approx(94 * 2 * each)
