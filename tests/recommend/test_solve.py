"""Reverse questions: exact, and honest where there is no answer."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import specs

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.errors import InfeasibleError, InputError
from powerplan.load import catalogue_spec
from powerplan.mixers import Convention
from powerplan.search import solve
from powerplan.spec import ModelSpec


@pytest.mark.parametrize(
    ("arguments", "value", "mixer"),
    [
        (["--solve", "context"], 13_403, None),
        (["--solve", "context", "--target", "1:2"], 26_807, None),
        (["--solve", "context", "--exclude", "lm-head"], 9_215, None),
        (["--solve", "window", "--ctx", "64k"], 7_084, "window:7084"),
        (["--solve", "p", "--ctx", "64k"], 2, "power:p=2"),
        (["--solve", "p", "--target", "1:10"], 3, "power:p=3"),
    ],
)
def test_answers(capsys: pytest.CaptureFixture[str], arguments: list[str], value: int, mixer: str | None) -> None:
    assert main(["recommend", "gpt2-small", *arguments, "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "powerplan.solve/1"
    assert (result["value"], result["mixer"]) == (value, mixer)
    assert result["at"]["wsfr"] >= result["target"] > result["beyond"]["wsfr"]


@settings(max_examples=80)
@given(
    specs,
    st.sampled_from(["context", "window", "p"]),
    st.integers(2, 700),
    st.fractions(Fraction(1, 1000), Fraction(1000)),
)
def test_one_more_is_too_much(spec: ModelSpec, unknown: str, context: int, target: Fraction) -> None:
    try:
        solution = solve(spec, unknown, context, target, Convention())  # type: ignore[arg-type]
    except (InfeasibleError, InputError):
        return
    assert solution.at.wsfr is not None
    assert solution.beyond.wsfr is not None
    assert solution.at.wsfr >= target > solution.beyond.wsfr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--solve", "window", "--ctx", "1k"],
            "no window gives 1:1: a window of the whole 1,024 tokens leaves the state 13.1 times too light, 13.1:1",
        ),
        (
            ["--solve", "window", "--target", "1000000:1"],
            "no window gives 1,000,000:1: a window of one token leaves the state 149 times too heavy, 6,702:1",
        ),
        (
            ["--solve", "p", "--target", "100000:1"],
            "no degree gives 100,000:1: p = 1 leaves the state 970 times too heavy, 103:1",
        ),
        (
            ["--solve", "context", "--mixer", "power:p=2"],
            "no context gives 1:1: a context of 2^50 tokens leaves the state 3.17 times too light, 3.17:1",
        ),
        (
            ["--solve", "context", "--mixer", "power:p=3"],
            "no context gives 1:1: a context of one token leaves the state 6.93 times too heavy, 1:6.93",
        ),
    ],
)
def test_no_answer_says_how_far_off(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    ctx = [] if "--ctx" in arguments else ["--ctx", "64k"]
    assert main(["recommend", "gpt2-small", *ctx, *arguments]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_solving_agrees_with_the_accounting() -> None:
    spec = catalogue_spec("llama-3-8b")
    solution = solve(spec, "context", 1, Fraction(1), Convention())
    assert solution.value == Accounting(spec).balanced_context() == 57_255
    with pytest.raises(InfeasibleError):
        solve(spec, "window", 1, Fraction(1), Convention())


def test_the_state_is_in_the_dtype_of_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    for unknown in ("context", "window"):
        sizes = []
        for dtype in ("bf16", "fp8"):
            assert main(["recommend", "gpt2-small", "--solve", unknown, "--dtype", dtype, "--format", "json"]) == 0
            result = json.loads(capsys.readouterr().out)
            sizes.append((result["at"]["state_bytes"], result["beyond"]["state_bytes"]))
        assert sizes[0] == tuple(2 * size for size in sizes[1])
