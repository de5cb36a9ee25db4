"""DualPipe, matmuls in fp8, and what hides behind compute: by hand, as laws, and every message."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import powerplan
from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.hardware import find_device, peak_of
from powerplan.load import catalogue_spec
from powerplan.report.train_remarks import planned_crossover
from powerplan.run.degrees import Degrees, problems
from powerplan.run.documents import seconds_waited
from powerplan.run.efficiency import DEFAULT, parse_overlap
from powerplan.run.layouts import Batch, Layout, Layouts, Setting
from powerplan.run.links import cluster_of
from powerplan.run.memory import in_flight
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads, stage_pairs
from powerplan.run.step import DEFAULT_OVERLAP, Efficiency, Overlap
from powerplan.swap import with_mixer

H800 = find_device("h800-sxm")
EVEN = Efficiency(0.5, 0.5, 0.5, 0.5)
DUAL = Degrees(fsdp=8, pp=4, ep=8, zero=1, schedule="dualpipe")


def layout_of(
    degrees: Degrees,
    name: str = "deepseek-v3",
    *,
    micro_batches: int = 16,
    recipe: Recipe | None = None,
    efficiency: Efficiency = EVEN,
    overlap: Overlap = DEFAULT_OVERLAP,
) -> Layout:
    sequences = micro_batches * degrees.sequences_at_once
    setting = Setting.of(cluster_of(H800, degrees.devices), peak_of(H800), efficiency, Batch(sequences * 4096))
    layouts = Layouts(Accounting(catalogue_spec(name)), 4096, replace(setting, overlap=overlap))
    return layouts.layout(degrees, recipe or Recipe(), sequences)


def test_a_device_has_the_first_and_the_last_stage_and_half_of_the_micro_batches_in_each() -> None:
    model = layouts_model()
    loads = stage_loads(model, 4)
    first, second = stage_pairs(loads)
    assert first.all_parameters == loads[0].all_parameters + loads[3].all_parameters
    assert second.all_parameters == loads[1].all_parameters + loads[2].all_parameters
    for name in ("weight_flops", "attention_flops", "head_flops", "kept_bytes", "dispatched_bytes", "expert_flops"):
        whole = sum(getattr(load, name) for load in loads)
        assert 2 * (getattr(first, name) + getattr(second, name)) == pytest.approx(whole)
    assert (first.first, first.last, first.losses) == (True, True, 0.5)
    assert not second.first
    assert not second.last


def layouts_model() -> Any:
    from powerplan.run.loads import model_load

    return model_load(Accounting(catalogue_spec("deepseek-v3")), 4096, Recipe())


def test_the_bubble_of_dualpipe_is_that_of_the_paper() -> None:
    """arXiv 2412.19437, table 2: (PP/2 - 1)(F&B + B - 3W). A backward pass of attention has no gradients of weights."""
    degrees = replace(DUAL, ep=1)
    step = layout_of(degrees, "llama-3-8b", efficiency=replace(EVEN, attention=1.0)).step
    weights = (step.weights_s + step.head_s) / 3 / 16
    attention = step.attention_s / 3 / 16
    loss = 36 * 128_256 * 4096 / 2 / 3350e9  # Half of the micro-batches end on the device of the last stage.
    weights -= loss / 3
    forward, backward = weights + attention, 2 * (weights + attention)
    assert step.bubble_s == pytest.approx((4 / 2 - 1) * (forward + backward + loss + backward - 3 * weights), rel=1e-3)


def test_two_stages_keep_those_of_one_micro_batch_more_than_there_are_stages() -> None:
    assert in_flight(DUAL, 0, 64) == 5
    assert in_flight(DUAL, 1, 64) == 5
    assert in_flight(DUAL, 0, 4) == 4
    dual, plain = layout_of(DUAL).memory, layout_of(replace(DUAL, schedule="1f1b")).memory
    assert dual.weights > 1.5 * plain.weights


def test_dualpipe_hides_experts_and_stages_and_leaves_20_multiprocessors_to_them() -> None:
    dual, plain = layout_of(DUAL).step, layout_of(replace(DUAL, schedule="1f1b")).step
    assert dict(plain.traffic)["experts"] > 0
    assert dict(plain.traffic)["stages"] > 0
    assert dict(dual.traffic)["experts"] == dict(dual.traffic)["stages"] == 0
    sending, alone = (layout_of(replace(DUAL, ep=ep), "mixtral-8x7b").step for ep in (8, 1))
    assert sending.weights_s / alone.weights_s == pytest.approx(132 / 112)


def test_no_more_hides_than_there_is_compute() -> None:
    slow = cluster_of(H800, 32, network_gbs=0.1, node_devices=4)
    setting = replace(Setting.of(slow, peak_of(H800), EVEN, Batch(128 * 4096)), overlap=Overlap(experts=1.0))
    layouts = Layouts(Accounting(catalogue_spec("deepseek-v3")), 4096, setting)
    step = layouts.layout(Degrees(fsdp=32, ep=32, zero=1), Recipe(), 128).step
    bare = replace(setting, overlap=Overlap(experts=0.0))
    whole = Layouts(Accounting(catalogue_spec("deepseek-v3")), 4096, bare).layout(
        Degrees(fsdp=32, ep=32, zero=1), Recipe(), 128
    )
    loss = 4 * 36 * 129_280 * 4096 / 3350e9
    hidden = dict(whole.step.traffic)["experts"] - dict(step.traffic)["experts"]
    assert hidden == pytest.approx(step.compute_s - loss, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), tp=st.sampled_from([1, 2]), zero=st.integers(0, 3))
def test_a_share_of_traffic_hides(share: float, tp: int, zero: int) -> None:
    degrees = Degrees(fsdp=16, ep=16, tp=tp, zero=zero)
    bare, some = (layout_of(degrees, overlap=Overlap(0.5, hidden)).step for hidden in (0.0, share))
    assert dict(some.traffic)["experts"] >= (1 - share) * dict(bare.traffic)["experts"] * (1 - 1e-12)
    assert some.seconds <= bare.seconds * (1 + 1e-12)
    none, half = (layout_of(degrees, overlap=Overlap(hidden, share)).step for hidden in (0.0, 0.5))
    assert dict(half.traffic)["tensor parallel"] == pytest.approx(dict(none.traffic)["tensor parallel"] / 2)


def test_matmuls_in_fp8_run_at_the_fp8_rate_and_routers_do_not() -> None:
    spec = catalogue_spec("mixtral-8x7b")
    fast, plain = (
        layout_of(Degrees(), "mixtral-8x7b", recipe=Recipe(matmuls_dtype=dtype)).step for dtype in ("fp8", None)
    )
    router = 2 * 32 * spec.hidden_size * 8 * 3 * 16 * 4096 / (989e12 * 0.5)
    assert fast.weights_s == pytest.approx(router + (plain.weights_s - router) * 989 / 1979)
    assert (fast.attention_s, fast.head_s) == (plain.attention_s, plain.head_s)


def test_routed_experts_have_a_share_of_their_own() -> None:
    spec = catalogue_spec("mixtral-8x7b")
    slow, even = (
        layout_of(Degrees(), "mixtral-8x7b", efficiency=replace(EVEN, experts=share)).step for share in (0.25, None)
    )
    experts = 2 * 32 * 2 * 3 * spec.hidden_size * 14_336 * 3 * 16 * 4096 / (989e12 * 0.5)
    assert slow.weights_s - even.weights_s == pytest.approx(experts)
    assert (
        layout_of(Degrees(), "llama-3-8b", efficiency=replace(EVEN, experts=0.1)).step
        == layout_of(Degrees(), "llama-3-8b").step
    )


@pytest.mark.parametrize(
    ("degrees", "problem"),
    [
        (Degrees(pp=3, zero=1, schedule="dualpipe"), "dualpipe needs an even number of pipeline stages, and pp is 3"),
        (Degrees(zero=1, schedule="dualpipe"), "dualpipe needs an even number of pipeline stages, and pp is 1"),
        (
            Degrees(pp=4, interleave=2, zero=1, schedule="dualpipe"),
            "dualpipe has no parts of stages, and interleave is 2",
        ),
        (Degrees(pp=4, cp=2, zero=0, schedule="dualpipe"), "dualpipe is planned with whole sequences, and cp is 2"),
        (
            Degrees(pp=4, schedule="dualpipe"),
            "dualpipe keeps weights and gradients whole within a step, and zero is 3; give 0 or 1",
        ),
    ],
)
def test_what_dualpipe_does_not_go_with(degrees: Degrees, problem: str) -> None:
    assert list(problems(degrees, catalogue_spec("llama-3-8b"), 4096)) == [problem]
    assert not list(problems(DUAL, catalogue_spec("deepseek-v3"), 4096))


COMMON: dict[str, Any] = {"context": "4k", "gpu": "h100-sxm", "devices": 64}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "dualpipe"}, "schedule: dualpipe keeps weights and gradients whole within a step; give zero='1'"),
        ({"schedule": "dualpip", "zero": 1}, "schedule: 'dualpip' is not known; did you mean dualpipe"),
        (
            {"schedule": "dualpipe", "zero": 1, "devices": 1},
            "schedule: dualpipe needs an even number of pipeline stages, and no layout of 1 devices has one",
        ),
        (
            {"schedule": "dualpipe", "zero": 1, "parallel": "fsdp=16,pp=4", "batch_tokens": 4096 * 64},
            "dualpipe takes micro-batches in pairs, at least 128 sequences with pp 4",
        ),
        ({"matmuls_dtype": "fp8", "dtype": "fp32"}, "matmuls_dtype: fp8 goes with activations in bf16, and dtype is"),
        ({"matmuls_dtype": "fp4"}, "matmuls_dtype: 'fp4' is not known"),
        ({"matmuls_dtype": "fp8", "gpu": "a100-80gb"}, "matmuls_dtype: a100-80gb-sxm has no fp8 matrix rate"),
        ({"overlap": "experts=1.5"}, "overlap: '1.5' is out of range; a share is from 0 to 1"),
        ({"overlap": "expert=1"}, "overlap: 'expert' is not a share; did you mean experts"),
        ({"overlap": "0.5"}, "overlap: '0.5' is not a share; write tensor=0.5"),
        ({"overlap": "experts=1,experts=0"}, "overlap: experts is given twice"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        powerplan.train("llama-3-8b", **COMMON | arguments)


def test_overlap_is_read() -> None:
    assert parse_overlap("experts=0,tensor=40%") == Overlap(0.4, 0.0)
    assert parse_overlap("experts=1") == Overlap(0.5, 1.0)
    assert Overlap().of_experts("1f1b") == 0
    assert Overlap().of_experts("dualpipe") == 1
    assert Overlap(experts=0.3).of_experts("dualpipe") == 0.3


def test_a_search_finds_layouts_of_dualpipe_alone() -> None:
    answer = powerplan.train(
        "deepseek-v3", "4k", gpu="h800-sxm", devices=512, batch_tokens="16M", zero=1, schedule="dualpipe"
    )
    layout = answer.plan.layout
    assert (layout.degrees.schedule, layout.degrees.zero) == ("dualpipe", 1)
    assert layout.degrees.pp % 2 == 0
    assert layout.step.micro_batches >= 2 * layout.degrees.pp


def test_from_where_on_a_mixer_is_planned_faster() -> None:
    """Attention takes 2 H (k + v) (t + 1)/2 FLOPs a token, and power attention what it takes at any t."""
    spec = catalogue_spec("llama-3-8b")
    power, _ = with_mixer(spec, "power:p=2")
    state = Accounting(power).row(8192).state_flops_per_token
    needed = float(state) * 0.35 / 0.3 / (32 * 32 * 2 * 256 / 2)
    assert planned_crossover(spec, power, DEFAULT) == pytest.approx(needed, abs=2)
    assert planned_crossover(power, power, DEFAULT) is None
    assert planned_crossover(with_mixer(spec, "linear")[0], power, DEFAULT) is None


DEEPSEEK = ("train", "deepseek-v3", "--ctx", "4k", "--gpu", "h800-sxm", "--devices", "512", "--zero", "1")


def test_the_report_says_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("--parallel", "fsdp=64,pp=8,ep=64", "--schedule", "dualpipe", "--matmuls-dtype", "fp8")
    assert main([*DEEPSEEK, *layout, "--batch-tokens", "16M"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "layout: fsdp 64, pp 8, ep 64, dualpipe, zero 1; " in text
    assert "adamw in bf16, matmuls in fp8, with an fp32 copy of the weights" in text
    assert ", and 50% of the fp8 peak in layers' matmuls (--efficiency); DeepSeek-V3's own run implies 25%" in text
    assert "what experts get and give behind other micro-batches (--overlap)" in text
    assert "A token goes to experts on at most 4 of 8 nodes, and once to each." in text


def test_shares_of_the_users_own_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("--parallel", "fsdp=64,pp=8,ep=64", "--batch-tokens", "16M", "--recompute", "full")
    shares = ("--efficiency", "experts=0.25", "--overlap", "experts=0.6,tensor=0.7")
    assert main([*DEEPSEEK, *layout, *shares]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "58% in matmuls with weights, 25% in those of routed experts, 35% in attention" in text
    assert "implies 25%" not in text
    assert "70% of tensor parallelism behind matmuls, 60% of what experts get and give behind other" in text
    assert main([*DEEPSEEK, *layout, *shares, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["overlap"] == {"tensor": 0.7, "experts": 0.6}
    assert (result["efficiency"]["experts"], result["efficiency"]["fp8"]) == (0.25, 0.5)
    assert (result["parallel"]["schedule"], result["recipe"]["matmuls_dtype"]) == ("1f1b", None)


def test_wrong_settings_end_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--schedule", "dualpip"], ["--overlap", "1"], ["--matmuls-dtype", "fp4"], ["--zero", "3"]):
        assert main([*DEEPSEEK, "--schedule", "dualpipe", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_documents_make_the_bubble_of_dualpipe_longer() -> None:
    layout = layout_of(DUAL)
    assert seconds_waited(layout, 1.0, 1.0) == pytest.approx(0)
    assert seconds_waited(layout, 1.0, 1.5) == pytest.approx(layout.step.bubble_s / 2)
    assert seconds_waited(layout, 1.25, 1.0) == pytest.approx(layout.step.compute_s / 4)
