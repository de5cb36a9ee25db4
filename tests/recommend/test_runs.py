"""Training runs as constraints: hours, days and money of candidates, and what binds where nothing is within them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

import powerplan
from powerplan.accounting import Accounting
from powerplan.answers.recommend import RecommendAnswer
from powerplan.cli import main
from powerplan.dtypes import Dtypes
from powerplan.errors import InfeasibleError, InputError
from powerplan.hardware import find_device
from powerplan.load import catalogue_spec
from powerplan.mixers import Convention
from powerplan.report.tables import TABLE, Column, table_of
from powerplan.run.plan import Choices, plan_training
from powerplan.run.recipe import Recipe
from powerplan.search.costs import CostBasis
from powerplan.search.limits import Limits
from powerplan.search.runs import LAST_TRIES, MOST_PLANS, Runs
from powerplan.search.trials import Search
from powerplan.training import TOKENS_PER_PARAMETER

ON_64: dict[str, Any] = {"gpu": "h100-sxm", "devices": 64}


def asked(**options: Any) -> RecommendAnswer:
    return powerplan.recommend("llama-3-8b", "128k", **(ON_64 | options))


@pytest.fixture(scope="module")
def unlimited() -> RecommendAnswer:
    return asked(price="2.50")


def test_the_run_is_what_train_plans(unlimited: RecommendAnswer) -> None:
    """The model as it is and the first candidate exactly; others, of layouts that those two found, within 6 %."""
    runs = unlimited.recommendation.runs
    assert runs is not None
    as_is = next(candidate for candidate in unlimited.candidates if candidate.plan.unchanged)
    assert as_is.run is runs.as_is
    assert as_is.run.gpu_hours == powerplan.train("llama-3-8b", "128k", **ON_64).plan.gpu_hours
    for place, candidate in enumerate(unlimited.candidates):
        assert candidate.run is not None
        phases = [phase.phase for phase in candidate.run.phases]
        best = plan_training(Accounting(candidate.spec), phases, runs.setting, Choices(Recipe()))
        assert candidate.run.fits
        slower = candidate.run.gpu_hours / best.gpu_hours
        assert slower == 1 if place == 0 else 1 <= slower < 1.06


def test_hours_days_and_cost(unlimited: RecommendAnswer) -> None:
    said = unlimited.to_dict()
    tokens = TOKENS_PER_PARAMETER * Accounting(catalogue_spec("llama-3-8b")).active_parameters.with_embeddings
    for entry in said["candidates"]:
        assert entry["training_tokens"] == tokens
        assert entry["days"] == pytest.approx(entry["gpu_hours"] / 24 / 64)
        assert entry["cost"] == pytest.approx(2.5 * entry["gpu_hours"])
        assert entry["fits"] is True
        assert entry["memory_peak_bytes"] <= 81_080 * 2**20
        flops = 3 * entry["flops_per_token"] * tokens
        assert entry["mfu"] == pytest.approx(flops / (entry["gpu_hours"] * 3600 * 989e12), rel=1e-6)
    assert said["training"] | {"efficiency": None} == {
        "device": "h100-sxm",
        "devices": 64,
        "batch_tokens": 2**22,
        "efficiency": None,
        "price": 2.5,
        "planned": said["training"]["planned"],
    }
    assert said["training"]["planned"] >= len(said["candidates"])


def test_the_table_says_whose_hours_they_are(unlimited: RecommendAnswer) -> None:
    text = str(unlimited)
    assert "training: 160.6B tokens on 64 h100-sxm: fits, " in text
    assert "hours: of one device, over all 64, to train on 20 tokens per active parameter" in text
    assert "train\n" not in text
    heading = next(line for line in text.splitlines() if line.startswith("  #"))
    assert heading.split()[-2:] == ["hours", "cost"]
    assert "roofline" not in text
    assert "decode\n1 device" in [column.heading for column in unlimited.report.columns]
    assert unlimited.to_csv().splitlines()[0].endswith("train_s_per_token,decode_s_per_token,gpu_hours,cost")
    one = powerplan.recommend("gpt2-small", "64k", gpu="h100-sxm")
    assert "hours: of one device, to train" in str(one)
    assert "\ndecode: time per token on one device, a roofline" in str(one)


def hours_of(answer: RecommendAnswer, label: str) -> float:
    (run,) = (candidate.run for candidate in answer.candidates if candidate.label == label)
    assert run is not None
    return run.gpu_hours


def test_a_limit_on_hours(unlimited: RecommendAnswer) -> None:
    """1.3 times what power p=2 takes, which has 5.5 times more weight FLOPs than state FLOPs: too little for 1:1."""
    limit = round(1.3 * hours_of(unlimited, "power p=2"))
    answer = asked(gpu_hours=limit)
    feasible = [candidate.feasible for candidate in answer.candidates]
    assert feasible == sorted(feasible, reverse=True)
    for place, candidate in enumerate(answer.candidates):
        assert candidate.run is not None
        assert candidate.feasible == (candidate.run.gpu_hours <= limit)
        assert ("over --gpu-hours: " in answer.why(place)) == (not candidate.feasible)
    runs, off = answer.recommendation.runs, answer.recommendation.off_target
    assert runs is not None
    assert runs.planned <= MOST_PLANS + LAST_TRIES + len(answer.candidates)
    assert off is not None
    assert off.within == f"--gpu-hours {limit:,}"
    assert off.meets is not None
    assert off.meets.balanced
    assert not off.meets.feasible
    text = " ".join(str(answer).split())
    assert f"target: no plan of the same weights within --gpu-hours {limit:,} meets it; " in text
    assert f" times the {limit:,} allowed by --gpu-hours: " in text
    assert f"Training was planned for {runs.planned} of 7,323 candidates" in text


def test_a_limit_that_leaves_plans_on_target(unlimited: RecommendAnswer) -> None:
    """Softmax and window layers run at a better rate than a recurrent state, so they are on target in less time."""
    first = unlimited.recommended
    assert "power" in first.label
    assert first.run is not None
    limit = 0.97 * first.run.days
    answer = asked(max_days=f"{limit:.6f}")
    assert answer.target_met
    assert answer.recommended.run is not None
    assert answer.recommended.run.days <= limit
    assert answer.to_dict()["recommended"]["feasible"] is True


def test_price_alone_asks_for_a_run_that_fits() -> None:
    with pytest.raises(
        InfeasibleError,
        match=r"^gpu in training: even the least of \d+ candidates that were planned .*; more devices share it$",
    ):
        asked(devices=1, price=3)
    answer = asked(devices=1)
    said = answer.to_dict()["recommended"]
    assert said["feasible"] is True
    assert (said["fits"], said["gpu_hours"], said["days"], said["cost"], said["mfu"]) == (False, *[None] * 4)
    assert answer.why().startswith("its training does not fit the devices; ")
    assert "no fit" in str(answer)
    assert "does NOT fit, " in str(answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gpu_hours": 1000},
            r"^gpu_hours: even the least of 8 candidates that were planned needs [3-5],\d{3} hours, ",
        ),
        ({"max_days": 0.5}, r"^max_days: even the least of 8 candidates that were planned needs [2-3]\.\d+ days, "),
        ({"max_days": 5, "gpu_hours": 1000}, r"^gpu_hours: even the least of 8 "),
        ({"max_days": 3, "keep": "flops"}, r"^max_days: even the least of 9 candidates needs \d+\.?\d* days, "),
        ({"max_days": 9, "max_state": 1}, r"^max_state: even the least of 7,323 candidates needs "),
    ],
)
def test_what_binds_and_by_how_much(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InfeasibleError, match=message):
        asked(**options)


def test_limits_hold_resized_models_too() -> None:
    free = powerplan.recommend("gpt2-small", "64k", gpu="h100-sxm", devices=8, keep="flops")
    limit = round(1.01 * hours_of(free, free.recommended.label), 3)
    answer = powerplan.recommend("gpt2-small", "64k", gpu="h100-sxm", devices=8, keep="flops", gpu_hours=limit)
    hours = [candidate.run.gpu_hours for candidate in answer.candidates if candidate.run]
    assert len(hours) == len(answer.candidates)
    assert [candidate.feasible for candidate in answer.candidates] == [hour <= limit for hour in hours]
    assert answer.recommended.label == free.recommended.label


def test_tokens_of_the_run() -> None:
    given = powerplan.recommend("gpt2-small", "64k", gpu="h100-sxm", tokens="10B")
    assert {entry["training_tokens"] for entry in given.to_dict()["candidates"]} == {10**10}
    assert "to train on the tokens in batches" in str(given)
    bought = powerplan.recommend("gpt2-small", "64k", gpu="h100-sxm", flops="1e20").to_dict()["candidates"]
    assert all(entry["training_tokens"] == entry["tokens"] for entry in bought)
    assert len({entry["tokens"] for entry in bought}) > 1


@pytest.mark.parametrize("convention", [Convention(), Convention(causal="full"), Convention(form="chunked")])
def test_a_run_takes_longer_than_its_flops(convention: Convention) -> None:
    """What is passed over unplanned, by its FLOPs, would not have been within the limits."""
    limits = Limits(device=find_device("h100-sxm"), devices=64, gpu_hours=Fraction(7000))
    base = Accounting(catalogue_spec("gemma-2-9b"), convention)
    basis = CostBasis((65_536,), convention, Dtypes())
    search = Search(base, basis, Fraction(1), lambda plan: True)
    runs = Runs(base, basis, limits)
    for trial in search.trials()[::700]:
        over = runs.unmet(trial)
        hours = runs.plan(trial, trial.plan.build(base.spec)).gpu_hours
        assert all(demand.needed <= hours for demand in over)
        assert bool(runs.unmet(trial)) == (hours > 7000)


def test_without_rates_of_links_there_are_no_hours(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["recommend", "gpt2-small", "--ctx", "64k", "--gpu", "rtx-4090", "--devices", "64"]
    assert main(options) == 0
    captured = capsys.readouterr()
    problem = "the catalogue has no rates of links that join 64 rtx-4090"
    assert captured.err == f"note: no hours of training: {problem}\n"
    assert "1 device" in captured.out
    assert "hours" not in captured.out
    assert main([*options, "--max-days", "3"]) == 2
    assert capsys.readouterr().err == f"error: --devices: {problem}\n"


@pytest.mark.parametrize("name", ["max_days", "gpu_hours", "price"])
def test_limits_on_training_need_a_device(name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}: needs the device; such as gpu='h100-sxm'$"):
        powerplan.recommend("gpt2-small", "64k", **{name: 1})
    with pytest.raises(InputError, match=rf"^{name}: '-1' is not a"):
        powerplan.recommend("gpt2-small", "64k", gpu="h100-sxm", **{name: -1})


def test_a_wide_table_is_folded() -> None:
    columns = [Column("a", "a", left=True, fold=" + "), Column("b", "b"), Column("c", "c", raw=True)]
    rows = [{"a": f"{'x' * 40} + {'y' * 30} + z", "b": "b" * 40, "c": 1}, {"a": "short + 1", "b": "b", "c": 2}]
    lines = table_of(columns, rows).splitlines()
    assert max(map(len, lines)) <= TABLE
    assert [line.split()[:2] for line in lines[2:]] == [["x" * 40, "b" * 40], ["+", "y" * 30], ["short", "+"]]
    assert f"{'x' * 40} + {'y' * 30} + z" in table_of(columns, rows, markdown=True)
