"""Published training runs: their models, FLOPs under each convention, what they reached, how they are planned."""

from __future__ import annotations

from fractions import Fraction

import pytest

from powerplan.hardware import find_device
from powerplan.reproduce import Comparison, figure_sets, reproduce
from powerplan.reproduce.training import flops_per_token, planned
from powerplan.reproduce.training_runs import TrainingRun, training_runs

RUNS = training_runs()


def compared(name: str) -> dict[str, Comparison]:
    (result,) = reproduce(name)
    return {comparison.figure.key: comparison for comparison in result.comparisons}


def gap(comparison: Comparison, convention: str) -> float:
    return float(comparison.computed[convention] / comparison.figure.number - 1)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mpt-7b-2k", 6_658_859_008),
        ("mpt-7b-8k", 6_684_024_832),
        ("mpt-7b-64k", 6_918_905_856),
        ("mpt-13b-64", 12_853_954_560),
        ("mpt-30b-32", 29_975_214_080),
        ("mpt-70b-64", 64_862_437_376),
    ],
)
def test_parameters_of_mpt_are_those_that_its_makers_print(name: str, parameters: int) -> None:
    """The column NumParams of llm-foundry's table."""
    assert RUNS[name].accounting().total_parameters.with_embeddings == parameters


@pytest.mark.parametrize(("name", "billions"), [("megatron-175b", 174.6), ("megatron-1t", 1008.0)])
def test_parameters_of_megatron_are_those_of_the_paper(name: str, billions: float) -> None:
    count = RUNS[name].accounting().total_parameters.with_embeddings
    assert round(count / 10**9, 1) == billions


def test_flops_of_llama_3_8b_by_hand() -> None:
    """NVIDIA's recipe writes them out: 12 L m^2 (1 + G/H + t/m) + 18 L f m + 6 V m, with every key."""
    layers, width, ffn, vocabulary, context = 32, 4096, 14336, 128_256, 8192
    weights = layers * (12 * width**2 * 5 // 4 + 18 * ffn * width) + 6 * vocabulary * width
    keys = 12 * layers * width * context
    flops = flops_per_token(RUNS["dgxc-8b-8"])
    assert flops["full"] == weights + keys
    assert flops["exact"] == weights + Fraction(keys * (context + 1), 2 * context)
    assert flops["again"] == Fraction(4, 3) * flops["full"]
    assert flops["palm"] == 6 * 8_030_261_248 + keys


@pytest.mark.parametrize(
    ("key", "convention"),
    [
        ("titan-8b", "full"),
        ("bridge-8b", "exact"),
        ("bridge-70b", "exact"),
        ("bridge-405b", "exact"),
        ("bridge-qwen3-235b", "exact"),
        ("auto-deepseek-v3", "exact"),
        ("auto-kimi-k2", "exact"),
        ("dgxc-8b", "full"),
        ("dgxc-70b", "full"),
        ("dgxc-nemotron-h", "full"),
        ("mpt-7b-2k", "palm"),
        ("mpt-7b-64k", "palm"),
        ("mpt-7b-a100", "palm"),
        ("mpt-30b", "full"),
        ("mpt-30b-hfu", "again"),
    ],
)
def test_each_publisher_has_a_convention(key: str, convention: str) -> None:
    assert abs(gap(compared("training")[key], convention)) < 0.005


def test_the_recipe_of_405b_counts_16_kv_heads() -> None:
    """12 L m^2 G/H with G = 16 in place of 8 is what its 21.7 PFLOP has more."""
    comparison = compared("training")["dgxc-405b"]
    assert not comparison.figure.agrees(comparison.computed["full"])
    more = Fraction(12 * 126 * 16384**2 * 8, 128) * 8192 / 10**15
    assert comparison.figure.agrees(comparison.computed["full"] + more)


def test_gpt_oss_agrees_with_no_convention() -> None:
    comparison = compared("training")["auto-gpt-oss-20b"]
    assert comparison.agrees == []
    assert comparison.nearest[1] == pytest.approx(0.073, abs=1e-3)


def test_the_efficiency_closes_the_gap_of_the_hours() -> None:
    comparison = compared("training")["llama-405b-hours"]
    assert comparison.efficiency is not None
    assert float(comparison.efficiency) == pytest.approx(0.3586, abs=1e-4)
    at_40 = comparison.computed["exact"]
    assert at_40 * Fraction(2, 5) / comparison.efficiency == comparison.figure.number
    assert compared("training")["megatron-1t"].efficiency == Fraction(163, 312)


def test_other_figures_have_no_efficiency() -> None:
    assert all(comparison.efficiency is None for comparison in compared("table2").values())


def test_every_figure_names_a_run_and_every_run_has_a_figure() -> None:
    figures = [figure for name in ("training", "training-time") for figure in figure_sets()[name].figures]
    assert {figure.run for figure in figures} == RUNS.keys()
    assert all(run.source for run in RUNS.values())


@pytest.mark.parametrize("run", [run for run in RUNS.values() if run.parallel], ids=lambda run: run.name)
def test_every_layout_makes_up_its_devices(run: TrainingRun) -> None:
    layout = planned(run)
    assert layout.degrees.devices == run.devices
    assert layout.sequences == run.sequences
    assert layout.setting.cluster.device == find_device(run.device)


def test_runs_without_a_pipeline_are_planned_closely() -> None:
    """NVIDIA's recipes of Llama 3.1 8B, bf16, on 8 and 128 devices."""
    for key in ("dgxc-8b-8", "dgxc-8b-128"):
        assert abs(gap(compared("training-time")[key], "planned")) < 0.05
