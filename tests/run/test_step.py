"""The time of a step: by hand on one device, and what communication, bubbles and recomputation add."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerplan.accounting import Accounting
from powerplan.choices import Recompute
from powerplan.errors import InputError
from powerplan.hardware import find_device, peak_of
from powerplan.load import catalogue_spec
from powerplan.mixers.formulas import Convention
from powerplan.run.degrees import Degrees
from powerplan.run.efficiency import DEFAULT, parse_efficiency
from powerplan.run.layouts import Batch, Layout, Layouts, Setting
from powerplan.run.links import cluster_of
from powerplan.run.recipe import Recipe
from powerplan.run.step import UPDATE_BYTES, Efficiency
from powerplan.swap import with_mixer

EVEN = Efficiency(0.5, 0.5, 0.5)
H100 = find_device("h100-sxm")


def layout_of(
    degrees: Degrees,
    name: str = "llama-3-8b",
    context: int = 8192,
    *,
    mixer: str | None = None,
    sequences: int = 512,
    recipe: Recipe | None = None,
    efficiency: Efficiency = EVEN,
) -> Layout:
    spec = catalogue_spec(name)
    accounting = Accounting(with_mixer(spec, mixer)[0] if mixer else spec)
    setting = Setting.of(cluster_of(H100, degrees.devices), peak_of(H100), efficiency, Batch(sequences * context))
    return Layouts(accounting, context, setting).layout(degrees, recipe or Recipe(), sequences)


def test_one_device_takes_its_flops_at_the_share_of_the_peak() -> None:
    layout = layout_of(Degrees())
    row = Accounting(catalogue_spec("llama-3-8b")).row(8192)
    tokens = 512 * 8192
    compute = float(3 * row.flops_per_token * tokens / Fraction(989e12) / Fraction(1, 2))
    loss = 36 * 128_256 * tokens / 3350e9
    update = UPDATE_BYTES * 8_030_261_248 / 3350e9
    assert layout.step_s == pytest.approx(compute + loss + update)
    assert layout.step.traffic_s == layout.step.bubble_s == 0
    assert layout.mfu == pytest.approx(0.5 * compute / layout.step_s)
    assert layout.hfu == layout.mfu


def test_recomputing_everything_takes_one_more_forward_pass_of_the_layers() -> None:
    once, twice = (layout_of(Degrees(), recipe=Recipe(recompute=again)) for again in ("none", "full"))
    layers = once.step.weights_s + once.step.attention_s
    assert twice.step_s - once.step_s == pytest.approx(layers / 3)
    row, head = Accounting(catalogue_spec("llama-3-8b")).row(8192), 2 * 4096 * 128_256
    again = row.flops_per_token - head
    assert twice.hfu == pytest.approx(twice.mfu * float(1 + again / (3 * row.flops_per_token)))


@pytest.mark.parametrize(("micro_batches", "parts"), [(8, 1), (32, 1), (8, 4)])
def test_a_pipeline_waits_for_one_micro_batch_less_than_it_has_stages(micro_batches: int, parts: int) -> None:
    degrees = Degrees(pp=4, interleave=parts)
    step = layout_of(degrees, sequences=micro_batches).step
    busy = step.seconds - step.bubble_s - step.update_s
    assert step.bubble_s == pytest.approx(busy * 3 / micro_batches / parts, rel=1e-6)


def test_eight_devices_are_not_quite_eight_times_as_fast() -> None:
    one, eight = layout_of(Degrees()), layout_of(Degrees(fsdp=8))
    assert 7.5 < one.step_s / eight.step_s <= 8


def test_a_slow_network_exposes_the_weights() -> None:
    setting = Setting.of(cluster_of(H100, 64, network_gbs=1.0), peak_of(H100), EVEN, Batch(64 * 8192))
    layout = Layouts(Accounting(catalogue_spec("llama-3-8b")), 8192, setting).layout(Degrees(fsdp=64), Recipe(), 64)
    exposed = dict(layout.step.traffic)
    assert exposed["weights"] > layout.step.compute_s
    assert exposed["gradients"] > exposed["weights"]


def test_replicas_add_up_gradients_behind_the_last_backward_pass() -> None:
    alone, both = layout_of(Degrees(fsdp=8), sequences=64), layout_of(Degrees(fsdp=8, replicas=2), sequences=128)
    assert both.step_s == pytest.approx(alone.step_s)
    setting = Setting.of(cluster_of(H100, 16, network_gbs=1.0), peak_of(H100), EVEN, Batch(128 * 8192))
    accounting = Accounting(catalogue_spec("llama-3-8b"))
    slow = Layouts(accounting, 8192, setting).layout(Degrees(fsdp=8, replicas=2), Recipe(), 128)
    takes = 4 * 8_030_261_248 / 8 / 0.97e9
    assert takes - slow.step.compute_s / 8 < dict(slow.step.traffic)["gradients"] < takes


def test_optimizers_work_on_as_many_parameters_wherever_experts_are() -> None:
    spread, whole = (layout_of(Degrees(fsdp=8, ep=ep), "mixtral-8x7b").step.update_s for ep in (8, 1))
    assert spread == pytest.approx(whole)


def test_recurrent_layers_have_a_share_of_their_own() -> None:
    slow = replace(EVEN, recurrent=0.25)
    for mixer, factor in (("power:p=2", 2.0), ("attention", 1.0)):
        halved, even = (layout_of(Degrees(), mixer=mixer, efficiency=share).step for share in (slow, EVEN))
        state = halved.recurrent_s + halved.attention_s
        assert state == pytest.approx(factor * (even.recurrent_s + even.attention_s))


def test_measured_mixers_replace_their_share() -> None:
    layout = layout_of(Degrees(), efficiency=replace(EVEN, measured_s=1e-6), sequences=1)
    assert layout.step.recurrent_s == pytest.approx(8192 * 1e-6)
    assert layout.step.attention_s == 0


@pytest.mark.parametrize(
    "convention", [Convention(causal="full"), Convention(form="chunked"), Convention(lm_head=False)]
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_how_flops_are_counted_changes_mfu_and_no_time(convention: Convention, recompute: Recompute) -> None:
    spec, recipe = catalogue_spec("kimi-linear-48b-a3b"), Recipe(recompute=recompute)
    setting = Setting.of(cluster_of(H100, 1), peak_of(H100), EVEN, Batch(8 * 8192))
    one, other = (Layouts(Accounting(spec, counted), 8192, setting) for counted in (None, convention))
    usual, changed = (layouts.layout(Degrees(), recipe, 8) for layouts in (one, other))
    assert changed.step == usual.step
    flops = Accounting(spec, convention).row(8192).flops_per_token
    head = 2 * spec.hidden_size * spec.vocab_size if convention.lm_head else 0
    assert changed.mfu == pytest.approx(float(3 * flops * 8 * 8192) / changed.step_s / 989e12)
    forwards = 3 * flops + (flops - head if recompute == "full" else 0)
    assert changed.hfu == pytest.approx(float(forwards * 8 * 8192) / changed.step_s / 989e12)


@settings(max_examples=40, deadline=None)
@given(
    fsdp=st.sampled_from([1, 2, 8, 64]),
    tp=st.sampled_from([1, 8]),
    cp=st.sampled_from([1, 4]),
    zero=st.integers(0, 3),
    name=st.sampled_from(["llama-3-8b", "deepseek-v3", "kimi-linear-48b-a3b"]),
)
def test_no_layout_is_faster_than_its_compute(fsdp: int, tp: int, cp: int, zero: int, name: str) -> None:
    layout = layout_of(Degrees(fsdp=fsdp, tp=tp, cp=cp, zero=zero), name)
    ideal = layout.flops_per_token * layout.batch_tokens / (layout.degrees.devices * 989e12 * 0.5)
    assert layout.step_s >= ideal * (1 - 1e-9)
    assert 0 < layout.mfu <= 0.5
    assert all(seconds >= 0 for _, seconds in layout.step.traffic)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.4", Efficiency(0.4, 0.4, 0.4, 0.4)),
        ("40%", Efficiency(0.4, 0.4, 0.4, 0.4)),
        ("experts=0.25,fp8=0.6", replace(DEFAULT, experts=0.25, fp8=0.6)),
        ("weights=0.6, attention=0.7", replace(DEFAULT, weights=0.6, attention=0.7)),
    ],
)
def test_efficiency_is_read(text: str, expected: Efficiency) -> None:
    assert parse_efficiency(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", "efficiency: '2' is out of range"),
        ("", "efficiency: '' is not a share"),
        ("weigths=0.5", "efficiency: 'weigths' is not a share; did you mean weights"),
        ("weights=0.5,0.6", "efficiency: '0.6' is not a share; write weights=0.5"),
        ("weights=0.5,weights=0.6", "efficiency: weights is given twice"),
        ("weights=", "efficiency: '' is not a share"),
    ],
)
def test_wrong_efficiency_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_efficiency(text)
