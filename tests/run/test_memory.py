"""Memory per device: the parts that ZeRO and Korthikanti et al. publish, and what must hold for every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerplan.accounting import Accounting
from powerplan.ffn import MLP
from powerplan.hardware import find_device, peak_of
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention
from powerplan.run.degrees import Degrees
from powerplan.run.efficiency import DEFAULT
from powerplan.run.layouts import Batch, Layouts, Setting
from powerplan.run.links import cluster_of
from powerplan.run.loads import ModelLoad, model_load
from powerplan.run.memory import Memory, in_flight, memory_of
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads, stage_spans
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.swap import with_mixer

H100 = find_device("h100-sxm")
MODELS = ("gpt2-small", "llama-3-8b", "mixtral-8x7b", "deepseek-v3", "qwen3-next-80b-a3b", "gemma-3-12b")


def load_of(name: str, context: int, recipe: Recipe) -> ModelLoad:
    return model_load(Accounting(catalogue_spec(name)), context, recipe)


def memory(model: ModelLoad, degrees: Degrees, micro_batches: int = 8) -> Memory:
    return memory_of(model, list(enumerate(stage_loads(model, degrees.pp))), degrees, micro_batches)


def seven_and_a_half_billion() -> ModelLoad:
    """Return a model of 7.5e9 parameters to within 1e-4, the size of ZeRO's figure 1."""
    mixer, ffn = Attention(heads=32, head_dim=128), MLP(intermediate_size=16384, gated=False)
    spec = ModelSpec(
        name="zero", vocab_size=14_700, hidden_size=4096, layers=(LayerGroup(repeat=36, mixer=mixer, ffn=ffn),)
    )
    recipe = Recipe(dtype="fp16", gradients_dtype="fp16")
    model = model_load(Accounting(spec), 1024, recipe)
    assert model.parameters == pytest.approx(7.5e9, rel=0.02)
    return model


@pytest.mark.parametrize(("zero", "published_gb"), [(0, 120), (1, 31.4), (2, 16.6)])
def test_zero_stages_are_those_of_the_paper(zero: int, published_gb: float) -> None:
    """Rajbhandari et al. 2020, arXiv 1910.02054, figure 1: 7.5B parameters, Adam, fp16, 64 devices.

    Stage 3 is not compared: the paper keeps shards of fp16 weights beside the fp32 ones, and FSDP2 gathers from those.
    """
    model = seven_and_a_half_billion()
    held = memory(model, Degrees(fsdp=64, zero=zero))
    scale = 7.5e9 / model.parameters
    assert (held.weights + held.gradients + held.optimizer) * scale / 1e9 == pytest.approx(published_gb, abs=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_loads_are_what_accounting_counts(name: str) -> None:
    accounting = Accounting(catalogue_spec(name))
    model = load_of(name, 8192, Recipe())
    assert model.parameters == accounting.total_parameters.with_embeddings
    assert model.layer_flops_per_token + model.head_flops == accounting.row(8192).flops_per_token
    (stage,) = stage_loads(model, 1)
    assert stage.all_parameters == model.parameters
    flops = stage.weight_flops + stage.attention_flops + stage.recurrent_flops + stage.head_flops
    assert flops == pytest.approx(float(accounting.row(8192).flops_per_token), rel=1e-12)


def test_fsdp_keeps_sixteen_bytes_a_parameter_in_shards() -> None:
    model = load_of("llama-3-8b", 8192, Recipe())
    held = memory(model, Degrees(fsdp=64))
    assert held.weights + held.gradients + held.optimizer == pytest.approx(16 * model.parameters / 64)


def test_one_device_keeps_eighteen_bytes_a_parameter() -> None:
    model = load_of("llama-3-8b", 8192, Recipe())
    held = memory(model, Degrees())
    assert held.weights + held.gradients + held.optimizer == 18 * model.parameters
    assert held.gathered == 0


@pytest.mark.parametrize(
    ("recipe", "bytes_a_parameter"),
    [
        (Recipe(), 8.0),
        (Recipe(optimizer="adamw-8bit"), 2.03125),
        (Recipe(moments_dtype="bf16"), 4.0),
        (Recipe(master="none"), 4.0),
        (Recipe(master="none", dtype="fp32"), 8.0),
    ],
)
def test_optimizer_states_by_recipe(recipe: Recipe, bytes_a_parameter: float) -> None:
    model = load_of("gpt2-small", 1024, recipe)
    assert memory(model, Degrees(fsdp=8)).optimizer == pytest.approx(bytes_a_parameter * model.parameters / 8)


def test_muon_keeps_one_moment_of_matrices_within_layers() -> None:
    model = load_of("gpt2-small", 1024, Recipe(optimizer="muon"))
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    expected = 4 * matrices + 8 * (model.parameters - matrices)
    assert memory(model, Degrees(fsdp=8)).optimizer == pytest.approx(expected / 8)


def test_stages_share_the_layers_and_the_first_has_the_embedding() -> None:
    assert [len(span) for span in stage_spans(126, 16)] == [7] + [8] * 14 + [7]
    assert stage_spans(5, 1) == [range(5)]
    model = load_of("llama-3.1-405b", 8192, Recipe())
    first, *_, last = stage_loads(model, 16)
    assert first.outer_parameters == 128_256 * 16_384
    assert last.outer_parameters == 128_256 * 16_384 + 16_384
    assert sum(stage.layers for stage in stage_loads(model, 16)) == 126


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages() -> None:
    model = load_of("llama-3-8b", 8192, Recipe(loss="chunked"))
    one, four = memory(model, Degrees(), 8), memory(model, Degrees(pp=4), 8)
    assert four.stage == 0
    # A quarter of the layers, for 4 micro-batches; the last stage alone has the inputs of final norm and LM head.
    ends = 2 * 4096 * 2 * 8192
    assert four.activations == pytest.approx(one.activations - ends)
    assert memory(model, Degrees(pp=4), 2).activations == pytest.approx((one.activations - ends) / 2)
    more = memory(model, Degrees(pp=4, interleave=2), 8).activations / four.activations
    assert more == pytest.approx(1 + 3 / (4 * 2))


def test_interleaved_stages_keep_what_their_schedule_runs_ahead() -> None:
    """4 stages in 4 parts run 18, 16, 14 and 12 parts ahead: a part is a quarter of a stage's micro-batch."""
    kept = [in_flight(Degrees(pp=4, interleave=4), stage, 16) for stage in range(4)]
    assert kept == [19 / 4, 17 / 4, 15 / 4, 13 / 4]
    assert [in_flight(Degrees(pp=4, interleave=4), stage, 4) for stage in range(2)] == [4, 4]
    assert [in_flight(Degrees(pp=4), stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    model = load_of("llama-3-8b", 8192, Recipe())
    stages = list(enumerate(stage_loads(model, 4)))
    one, four = (memory_of(model, stages[3:], Degrees(pp=4, interleave=parts), 16) for parts in (1, 4))
    ends = 2 * 4096 * 2 * 8192 + 4 * 8192
    assert (four.activations - ends) / (one.activations - ends) == pytest.approx(13 / 4)


def test_a_tied_embedding_is_copied_to_the_last_stage() -> None:
    model = load_of("gpt2-small", 1024, Recipe())
    assert sum(stage.stored_parameters(1) for stage in stage_loads(model, 2)) == model.parameters + 50_257 * 768


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(MODELS),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 3]),
    cp=st.sampled_from([1, 4]),
    fsdp=st.sampled_from([1, 8]),
    zero=st.integers(0, 3),
    recompute=st.sampled_from(["none", "selective", "full"]),
)
def test_more_splitting_never_takes_more_of_what_it_splits(
    name: str, tp: int, pp: int, cp: int, fsdp: int, zero: int, recompute: str
) -> None:
    model = load_of(name, 4096, Recipe(recompute=recompute))  # type: ignore[arg-type]
    degrees = Degrees(fsdp=fsdp, tp=tp, pp=pp, cp=cp, zero=zero)
    held, wider = memory(model, degrees), memory(model, replace(degrees, tp=2 * tp))
    assert wider.tensors < held.tensors
    longer = memory(model, replace(degrees, cp=2 * cp))
    assert longer.tensors < held.tensors
    sharded = memory(model, replace(degrees, zero=min(3, zero + 1)))
    kept = [one.weights + one.gradients + one.optimizer for one in (sharded, held)]
    assert kept[0] <= kept[1] * (1 + 1e-12)
    assert held.peak > held.tensors > 0


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_more_keeps_less(name: str) -> None:
    kept = [
        memory(load_of(name, 8192, Recipe(recompute=recompute)), Degrees()).activations  # type: ignore[arg-type]
        for recompute in ("none", "selective", "full")
    ]
    assert kept[0] >= kept[1] > kept[2]


def test_devices_that_split_matmuls_have_the_whole_input_of_the_one_at_work() -> None:
    model = load_of("llama-3-8b", 8192, Recipe())
    first = list(enumerate(stage_loads(model, 2)))[:1]
    one, eight = (memory_of(model, first, Degrees(tp=tp, pp=2), 8) for tp in (1, 8))
    stream = 8192 * 4096 * 2
    assert eight.working == pytest.approx(one.working / 8 + 2 * stream)
    one, eight = memory(model, Degrees()), memory(model, Degrees(tp=8))
    assert one.place == eight.place == "the loss"
    assert eight.working == pytest.approx(one.working / 8 + stream + 4 * 128_256 * 8192 / 8)


@pytest.mark.parametrize(
    ("mixer", "cp", "received"),
    [
        ("attention", 64, 2 * 512 * 8 * 256 * 2),  # two rounds of a ring
        ("attention", 16, 2048 * 2 * (32 + 16) * 128 * 2),  # heads, of which keys and values are repeated
        ("window:4096", 16, 4095 * 8 * 256 * 2),
        ("power:p=2", 4, 4 * 8 * 8256 * 129 * 4),  # gathered
        ("power:p=2", 8, 3 * 8 * 8256 * 129 * 4),  # in rounds
    ],
)
def test_devices_have_what_they_receive_of_other_parts_of_a_sequence(mixer: str, cp: int, received: int) -> None:
    accounting = Accounting(with_mixer(catalogue_spec("llama-3-8b"), mixer)[0])
    model = model_load(accounting, 32_768, Recipe())
    first = list(enumerate(stage_loads(model, 2)))[:1]
    setting = Setting.of(cluster_of(H100, cp), peak_of(H100), DEFAULT, Batch(2**22))
    passings = Layouts(accounting, 32_768, setting).layout(Degrees(cp=cp), Recipe(), 8).step.passings
    one = memory_of(model, first, Degrees(pp=2, zero=0), 8)
    shared = memory_of(model, first, Degrees(pp=2, cp=cp, zero=0), 8, [passings])
    assert shared.working == pytest.approx(one.working / cp + received)


def test_experts_are_gathered_by_the_groups_that_hold_them() -> None:
    model = load_of("mixtral-8x7b", 8192, Recipe())
    alone, split = memory(model, Degrees(fsdp=8)), memory(model, Degrees(fsdp=8, ep=8))
    assert split.weights == pytest.approx(alone.weights)
    assert split.gathered < alone.gathered / 3
