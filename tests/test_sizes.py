"""Which model a budget supports: sizes of shapes, against a search of all sizes; what balances them, where they do."""

from __future__ import annotations

import json
from fractions import Fraction
from math import gcd, log
from typing import Any

import msgspec
import pytest

import powerplan
from powerplan.accounting import Accounting
from powerplan.balance import verdict_of
from powerplan.cli import main
from powerplan.documents import parse_yaml
from powerplan.errors import InfeasibleError
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import Convention
from powerplan.search.resize import GOAL_REACH, MEASURE_TOLERANCE, MOST_ASPECT_CHANGE, resized_to
from powerplan.search.sizing import SHAPES, Sized, sizes_for
from powerplan.spec import ModelSpec
from powerplan.swap import with_mixer
from powerplan.validation import validate

CONTEXTS = (8192, 32_768, 131_072)


def flops_of(spec: ModelSpec, context: int = 32_768) -> Fraction:
    """Return the FLOPs of training on 20 tokens per parameter."""
    accounting = Accounting(spec)
    return 60 * accounting.active_parameters.with_embeddings * accounting.row(context).flops_per_token


def every_size(base: ModelSpec) -> list[tuple[int, int, ModelSpec]]:
    """Return a model of one kind of layers with up to twice its width, in every depth up to four times its own."""
    (group,) = base.layers
    mixer, ffn = group.mixer, group.ffn
    assert mixer is not None
    assert ffn is not None
    parts = gcd(base.hidden_size, mixer.heads, mixer.kv_heads, ffn.intermediate_size)  # type: ignore[union-attr]
    sizes = []
    for width in range(1, 2 * parts + 1):
        wider = msgspec.structs.replace(
            group,
            mixer=msgspec.structs.replace(
                mixer,
                heads=mixer.heads * width // parts,  # type: ignore[union-attr]
                kv_heads=mixer.kv_heads * width // parts,  # type: ignore[union-attr]
            ),
            ffn=msgspec.structs.replace(ffn, intermediate_size=ffn.intermediate_size * width // parts),  # type: ignore[union-attr]
        )
        for depth in range(1, 4 * group.repeat + 1):
            layers = (msgspec.structs.replace(wider, repeat=depth),)
            hidden = base.hidden_size * width // parts
            sizes.append((width, depth, msgspec.structs.replace(base, hidden_size=hidden, layers=layers)))
    return sizes


@pytest.mark.parametrize("name", ["gpt2-small", "qwen2.5-1.5b", "power-paper-1-12"])
def test_no_size_is_nearer_in_shape_and_flops(name: str) -> None:
    """Every width and depth, and the least of them by the same order: within the tolerance by shape, else by FLOPs."""
    base = catalogue_spec(name)
    sizes = [(spec, float(flops_of(spec))) for _, _, spec in every_size(base)]
    for factor in (Fraction(1, 5), Fraction(1, 2), Fraction(1), Fraction(7, 3), Fraction(6)):
        goal = flops_of(base) * factor

        def order(size: tuple[ModelSpec, float], goal: float = float(goal)) -> tuple[bool, float, float]:
            spec, flops = size
            aspect = abs(log(spec.hidden_size / base.hidden_size / (spec.layer_count / base.layer_count)))
            miss = abs(log(flops / goal))
            far = miss > log(1 + MEASURE_TOLERANCE)
            allowed = aspect <= log(MOST_ASPECT_CHANGE) and miss <= log(GOAL_REACH)
            return (far, miss if far else aspect, miss) if allowed else (True, 10, 10)

        best, _ = min(sizes, key=order)
        found = resized_to(base, flops_of, goal)
        assert found == (best if order((best, float(flops_of(best)))) < (True, 9) else None)
        assert factor != 1 or found == base


@pytest.mark.parametrize("name", [name for name in catalogue_names() if not catalogue_spec(name).mixtures()])
def test_a_size_keeps_shape_and_goal_or_there_is_none(name: str) -> None:
    base = catalogue_spec(name)
    for factor in (Fraction(1, 100), Fraction(1, 3), Fraction(20)):
        found = resized_to(base, flops_of, flops_of(base) * factor)
        if found is not None:
            reached = flops_of(found) / (flops_of(base) * factor)
            aspect = Fraction(found.hidden_size, base.hidden_size) / Fraction(found.layer_count, base.layer_count)
            assert 1 / GOAL_REACH <= reached <= GOAL_REACH
            assert Fraction(1, MOST_ASPECT_CHANGE) <= aspect <= MOST_ASPECT_CHANGE


def test_heads_that_cannot_be_divided_have_one_size() -> None:
    base = with_mixer(catalogue_spec("gpt2-small"), "attention:heads=7,kv_heads=7")[0]  # And 768 wide.
    assert resized_to(base, flops_of, flops_of(base)) is None


def test_no_size_comes_near_a_budget_that_is_too_small_or_too_large() -> None:
    base = catalogue_spec("gpt2-small")
    assert resized_to(base, flops_of, Fraction(10**12)) is None
    assert resized_to(base, flops_of, Fraction(10**80)) is None


@pytest.mark.parametrize("name", ["qwen3-1.7b", "llama-3-8b"])
def test_a_budget_of_a_model_has_that_model_first(name: str) -> None:
    sizing = sizes_for(flops_of(catalogue_spec(name)), [32_768])
    first, spec = sizing.rows[0], catalogue_spec(name)
    assert (first.shape, first.label) == (name, "as it is")
    assert first.spec.layers == spec.layers
    assert first.spec.hidden_size == spec.hidden_size
    assert first.budget.tokens == 20 * first.budget.parameters


def shapes_of(rows: tuple[Sized, ...], context: int) -> list[list[Sized]]:
    """Return the rows at one context, those of one shape together."""
    found: dict[str, list[Sized]] = {}
    for row in rows:
        if row.context == context:
            found.setdefault(row.shape, []).append(row)
    return list(found.values())


@pytest.mark.parametrize("flops", [10**19, 142 * 10**19, 10**24])
def test_the_budget_is_used_up_along_the_rule(flops: int) -> None:
    sizing = sizes_for(Fraction(flops), CONTEXTS)
    for context in CONTEXTS:
        shapes = shapes_of(sizing.rows, context)
        assert len(shapes) == SHAPES
        for rows in shapes:
            as_is = rows[0]
            for row in rows:
                assert 16 <= row.budget.tokens_per_parameter <= 25
                assert row.budget.tokens == flops // row.budget.train_flops_per_token
            assert as_is.label == "as it is"
            assert [row.recommended for row in rows] == [False] * (len(rows) - 1) + [True]
            assert as_is.budget.row.wsfr is not None
            state_heavy = verdict_of(as_is.budget.row.wsfr).side == "state"
            if len(rows) == 1:
                assert not state_heavy or as_is.budget.row.wsfr >= Fraction(3, 5)  # As `recommend` leaves it.
                continue
            (_, balanced) = rows
            assert state_heavy
            assert balanced.budget.row.wsfr is not None
            assert verdict_of(balanced.budget.row.wsfr).side == "balanced"
            assert balanced.budget.parameters > as_is.budget.parameters
            assert balanced.budget.tokens > as_is.budget.tokens


def test_a_shape_is_balanced_at_the_last_context_with_no_more_state_than_weights() -> None:
    balanced = sizes_for(Fraction(10**21), [8192]).balanced
    assert len(balanced) == SHAPES
    for sized in balanced:
        accounting = sized.budget.accounting
        here, after = (accounting.row(context).wsfr for context in (sized.context, sized.context + 1))
        assert here is not None
        assert after is not None
        assert here >= 1 > after
        assert 18 <= sized.budget.tokens_per_parameter <= 22


def test_a_convention_and_a_mixer_are_followed() -> None:
    flops = Fraction(10**21)
    full = sizes_for(flops, [32_768], convention=Convention(causal="full")).rows[0]
    assert full.budget.accounting.convention.causal == "full"
    power = sizes_for(flops, [131_072], mixer="power:p=2")
    assert {mixer.kind for row in power.rows if row.label == "power:p=2" for mixer in row.spec.mixers()} == {"power"}
    assert power.rows[0].mixer == "power:p=2"
    assert power.notes == ()
    assert "Mamba-2" in sizes_for(flops, [8192], mixer="mamba2").notes[0]


def test_json_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["budget", "--gpu-hours", "1000", "--gpu", "h100-sxm", "--devices", "8", "--batch-tokens", "1M"]
    assert main([*command, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["schema"] == "powerplan.sizes/1"
    assert result["total_flops"] == pytest.approx(1000 * 3600 * 0.4 * 989e12, rel=1e-3)
    assert (result["gpu_hours"], result["days"]) == (pytest.approx(1000), pytest.approx(1000 / 24 / 8))
    assert (result["device"], result["devices"], result["mfu"]) == ("h100-sxm", 8, 0.4)
    assert {row["context"] for row in result["rows"]} == set(CONTEXTS)
    for row in [*result["rows"], *result["balanced"]]:
        assert row["tokens"] == pytest.approx(row["tokens_per_active_parameter"] * row["params_active"])
        assert row["steps"] == -(-row["tokens"] // 2**20)
    assert main(command) == 0
    assert "Optimizer steps are of 1,048,576 tokens" in capsys.readouterr().out
    assert main(command[:-2]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1.424e+21 FLOPs, spent on 20 tokens per active parameter: ")
    assert "1,000 device hours on h100-sxm at 40% of the bf16 peak, 395.6 TFLOP/s: 5.21 days on 8 devices" in out
    for context in CONTEXTS:
        assert f"At {context:,} tokens:" in out
    for row in result["rows"]:
        assert all(part in out for part in row["label"].split(" + "))  # A long one has two lines.
        assert f"{row['layers']} x {row['hidden_size']:,}" in out
    assert max(map(len, out.splitlines())) <= 100


def test_an_answer_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    answer = powerplan.budget(None, "8k,128k", flops=1e19)
    formats = {"table": str(answer), "json": answer.to_json(), "csv": answer.to_csv(), "markdown": answer.to_markdown()}
    for form, text in formats.items():
        assert main(["budget", "--ctx", "8k,128k", "--flops", "1e19", "--format", form]) == 0
        assert capsys.readouterr() == (f"{text}\n", "")
    assert answer.gpu_hours is None
    for place, row in enumerate(answer.rows):
        assert validate(parse_yaml(answer.to_yaml(place, "x"), "x.yaml")) == msgspec.structs.replace(row.spec, name="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--flops 1e10 --ctx 8k",
            "no size of the catalogue's shapes takes 1e+10 FLOPs at 8,192 tokens and 20 tokens per parameter; "
            "power-paper-1-12 itself takes 4.332e+17",
        ),
        ("--flops 1e21 --ctx 8k --mixer attention:heads=7", "no size of the catalogue's shapes takes 1e+21 FLOPs at"),
    ],
)
def test_a_budget_that_no_size_takes(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert main(["budget", *arguments.split()]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    with pytest.raises(InfeasibleError, match=r"^no size of the catalogue's shapes takes 1e\+10 FLOPs at 8,192 tokens"):
        powerplan.budget(flops=1e10)
