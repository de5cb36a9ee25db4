"""Reverse questions: exact, and honest where there is no answer."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import specs

import powerplan
from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.dtypes import Dtypes
from powerplan.errors import InfeasibleError, InputError
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention, Convention
from powerplan.search import equal_state, solve
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.swap import Swap, parse_swap, swap_text, swapped
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.windows import held_elements


@pytest.mark.parametrize(
    ("arguments", "value", "mixer"),
    [
        (["--solve", "context"], 13_403, None),
        (["--solve", "context", "--target", "1:2"], 26_807, None),
        (["--solve", "context", "--exclude", "lm-head"], 9_215, None),
        (["--solve", "window", "--ctx", "64k"], 7_084, "window:7084"),
        (["--solve", "p", "--ctx", "64k"], 2, "power:p=2"),
        (["--solve", "p", "--target", "1:10"], 3, "power:p=3,normalize=false"),
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
            "no degree gives 100,000:1: p = 1 leaves the state 955 times too heavy, 105:1",
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


def equal(capsys: pytest.CaptureFixture[str], model: str, *arguments: str) -> dict[str, Any]:
    assert main(["recommend", model, *arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(
    ("model", "unknown", "other", "value", "by_bytes"),
    [
        # 2,080 x 64 elements beside 128 a token; 2,080 x 65 in fp32 beside 128 in bf16.
        ("gpt2-small", "window", "power:p=2", 1040, 2 * 2080 * 65 // 128),
        ("gpt2-small", "context", "power:p=2", 1040, 2 * 2080 * 65 // 128),
        # 8,256 x 128 beside 256; the heads that take MLA's place are of 128 too.
        ("llama-3-8b", "window", "power:p=2", 4128, 2 * 8256 * 129 // 256),
        ("deepseek-v3", "window", "power:p=2", 4128, 2 * 8256 * 129 // 256),
        ("llama-3-8b", "window", "power:p=3", 178_880, 2 * 357_760 * 129 // 256),
        ("gpt2-small", "window", "window:777", 777, 777),
        # k x v of each of the 32 heads that KDA has, beside 8 key/value heads.
        ("llama-3-8b", "context", "kda", 32 * 128 * 128 // (8 * 256), 530),
        ("llama-3-8b", "p", "window:4127", 1, 1),
        ("llama-3-8b", "p", "window:4128", 2, 1),
        ("llama-3-8b", "p", "window:8k", 2, 1),
        ("llama-3-8b", "p", "window:8321", 2, 2),
        ("gpt2-small", "p", "power:p=3", 3, 3),
    ],
)
def test_equal_states(
    capsys: pytest.CaptureFixture[str], model: str, unknown: str, other: str, value: int, by_bytes: int
) -> None:
    result = equal(capsys, model, "--solve", unknown, "--equal-state", other, "--ctx", "64k")
    assert result["schema"] == "powerplan.solve/1"
    assert result["equal_state"].startswith(swap_text(parse_swap(other)))
    assert (result["value"], result["value_by_bytes"]) == (value, by_bytes)
    at, beyond, held = (result[key]["held_elements"] for key in ("at", "beyond", "other"))
    assert at <= held < beyond
    answer = powerplan.solve(model, unknown, "64k", equal_state=other)  # type: ignore[arg-type]
    assert answer.value == value
    assert answer.to_dict() == result


@settings(max_examples=60)
@given(specs, st.sampled_from(["context", "window", "p"]), st.integers(1, 3), st.integers(2, 700))
def test_equal_states_hold_no_more_and_one_more_does(spec: ModelSpec, unknown: str, p: int, context: int) -> None:
    """The sizes again, from models that are built: keys, values and features, the normaliser left out."""
    other, dtypes = Swap.of("power", replacement_heads(spec), p=p), Dtypes("bf16")
    try:
        found = equal_state(spec, unknown, context, other, Convention(), dtypes)  # type: ignore[arg-type]
    except (InfeasibleError, InputError):
        return

    def held(value: int) -> int:
        model, place = spec, value
        if unknown != "context":
            swap = found.at.swap
            assert swap is not None
            field = "window" if unknown == "window" else "p"
            changed = tuple((key, value if key == field else old) for key, old in swap.settings)
            model, place = swapped(spec, Swap(swap.kind, changed))[0], 10**12
        return sum(held_elements(mixer, place) * count for mixer, count in model.mixer_counts())

    limit = sum(held_elements(mixer, 1) * count for mixer, count in swapped(spec, other)[0].mixer_counts())
    assert found.other.elements == limit
    assert held(found.value) == found.at.elements <= limit < held(found.value + 1) == found.beyond.elements


def test_a_state_that_grows_is_taken_at_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--solve", "window", "--equal-state", "mla")
    values = [equal(capsys, "deepseek-v3", *arguments, "--ctx", ctx)["value"] for ctx in ("32k", "64k")]
    assert values == [9216, 18_432]  # 576 elements of 2,048 a token.


def test_an_equal_state_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "llama-3-8b", "--ctx", "64k", "--solve", "window", "--equal-state", "power:p=3"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the largest window in every layer that holds no more than power p=3 is 178,880 tokens" in text
    assert "At 65,536 tokens attention to every token holds less than this window." in text
    assert main(["recommend", "deepseek-v3", "--solve", "p", "--equal-state", "window:8k"]) == 0
    assert "Other mixers have 96 (8 kv) heads of 128 in place of MLA's." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "arguments", "code", "message"),
    [
        (
            "gpt2-small",
            "--solve p --equal-state window:3",
            3,
            "no degree holds as little as window:3, which holds 55,296 elements: p = 1 holds 589,824",
        ),
        (
            "mamba2-130m",
            "--solve context --equal-state power:p=2,heads=24,head_dim=64",
            3,
            "no context holds more than power:p=2,heads=24,head_dim=64, which holds 76,677,120 elements: the state of "
            "mamba2-130m does not grow past it",
        ),
        (
            "mamba2-130m",
            "--solve context --equal-state kda",
            3,
            "no context holds as little as kda, which holds 1,179,648 elements: a context of one token holds 4,718,592",
        ),
        (
            "mamba2-130m",
            "--solve window --equal-state kda",
            2,
            "--solve window: mamba2-130m has mixers that no other can take the place of",
        ),
        (
            "llama-3-8b",
            "--solve context --equal-state mla",
            2,
            "--equal-state: mla has a state that grows too; name one of fixed size, such as power:p=2",
        ),
    ],
)
def test_no_equal_state(
    capsys: pytest.CaptureFixture[str], model: str, arguments: str, code: int, message: str
) -> None:
    assert main(["recommend", model, *arguments.split()]) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_no_degree_holds_more_where_heads_are_of_one_feature() -> None:
    mixer = Attention(heads=4, head_dim=1)
    spec = ModelSpec(name="one", vocab_size=9, hidden_size=4, layers=(LayerGroup(mixer=mixer),))
    message = "no degree up to 16 holds more than window:8, which holds 64 elements: p = 16 holds 4"
    with pytest.raises(InfeasibleError, match=message):
        powerplan.solve(spec, "p", equal_state="window:8")


def test_heads_that_are_named_are_those_that_count() -> None:
    """Without them power attention has 96 heads of 128, 8 of them key/value heads, in place of deepseek-v3's MLA."""
    answer = powerplan.solve("deepseek-v3", "window", "64k", equal_state="power:p=2,heads=64").to_dict()
    assert answer["equal_state"] == "power:p=2,heads=64"
    assert answer["other"]["held_elements"] == 61 * 64 * (193 * 192 // 2) * 128  # Heads of 192 and 128, as MLA has.


def test_equal_states_from_python_name_their_parameters() -> None:
    with pytest.raises(InputError, match=r"^equal_state: 'powr' is not a mixer; did you mean power"):
        powerplan.solve("gpt2-small", "window", equal_state="powr")
    with pytest.raises(InputError, match=r"^equal_state: asks for a state, and target for a ratio; leave one out"):
        powerplan.solve("gpt2-small", "window", equal_state="power:p=2", target=2)
    with pytest.raises(InputError, match=r"^unknown: 'heads' is not known; allowed are context, window, p"):
        powerplan.solve("gpt2-small", "heads")  # type: ignore[arg-type]


def test_one_degree_has_one_ratio_in_every_command() -> None:
    model, context = "llama-3.1-8b", "128k"
    (degree,) = powerplan.degrees(model, context, p=[3]).to_dict()["totals"]
    expected = (degree["wsfr"], degree["state_bytes"])
    beyond = powerplan.solve(model, "p", context).to_dict()["beyond"]
    others = powerplan.budget(model, context, flops=10**23).to_dict()["alternatives"]
    budget = next(row for row in others if row["mixer"].startswith("power:p=3"))
    swap = powerplan.wsfr(model, context, mixer=budget["mixer"]).to_dict()["rows"][0]
    assert [(row["wsfr"], row["state_bytes"]) for row in (beyond, budget, swap)] == [expected] * 3
