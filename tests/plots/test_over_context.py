"""The figures of wsfr, compare and recommend: what they show equals the answers, and no row is missing."""

from __future__ import annotations

from fractions import Fraction

import msgspec
import pytest
from drawn import below, legend, lines, marks, names, title

import powerplan
from powerplan.accounting import Accounting
from powerplan.load import catalogue_spec
from powerplan.spec import ModelSpec
from powerplan.units import format_ratio


def test_wsfr() -> None:
    answer = powerplan.wsfr("llama-3-8b", "1k,64k")
    figure = answer.figure()
    upper, lower = figure.axes
    accounting = Accounting(catalogue_spec("llama-3-8b"))
    (ratio,) = lines(upper)
    for context, value in ratio:
        assert value == pytest.approx(float(accounting.wsfr(int(context)) or 0))
    assert ratio[0][0] == 128
    assert ratio[-1][0] == 2**20
    assert [x for x, _ in marks(upper, 0)] == [1024, 65_536]
    weights, state = lines(lower)
    assert {y for _, y in weights} == {accounting.weight_flops_per_token}
    assert dict(state)[65_536] == float(answer.rows[1].state_flops_per_token)
    # The crossing of both is where the ratio is 1.
    assert dict(ratio)[57_255] == pytest.approx(1, rel=1e-4)
    assert names(upper) == ["55.9:1", "1:1.14", "1:1, as many weight as state FLOPs", "balanced at 57,255"]
    assert title(figure) == "llama-3-8b: weight-state FLOP ratio over the context"
    assert below(figure) == ("8.03B parameters; forward FLOPs per token: recurrent form, causal exact, LM head counted")
    assert legend(figure) == ["weight FLOPs", "state FLOPs"]
    assert upper.get_xscale() == upper.get_yscale() == "log"
    assert lower.get_xlabel() == "context, tokens"
    assert upper.get_ylabel() == "weight FLOPs : state FLOPs"


def test_the_convention_is_named() -> None:
    convention = powerplan.Convention(form="chunked", causal="full", lm_head=False)
    figure = powerplan.wsfr("gpt2-small", "64k", convention=convention).figure()
    assert below(figure).endswith("chunked form, causal full, LM head not counted")
    assert "learned positions end at 1,024" in names(figure.axes[1])


def test_a_balance_beyond_the_figure_is_named_in_words() -> None:
    figure = powerplan.wsfr("llama-3-8b", "1").figure()
    assert "balanced at 57,255" not in names(figure.axes[0])
    assert below(figure).endswith("; balanced at 57,255")


def test_a_model_without_state() -> None:
    spec = catalogue_spec("gpt2-small")
    layer = msgspec.structs.replace(spec.layers[0], mixer=None)
    bare = ModelSpec(name="bare", vocab_size=100, hidden_size=64, layers=(layer,))
    figure = powerplan.wsfr(bare, "1k").figure()
    assert lines(figure.axes[0]) == [[]]
    (text,) = figure.axes[0].texts
    assert text.get_text() == "no state: every FLOP is between activations and weights"
    assert len(powerplan.compare([bare, "gpt2-small"], "1k").figure().axes[0].lines) > 1


@pytest.mark.parametrize("by", ["component", "layer"])
@pytest.mark.parametrize("model", ["deepseek-v3", "kimi-linear-48b-a3b", "mamba2-130m"])
def test_shares(model: str, by: str) -> None:
    answer = powerplan.wsfr(model, "8k,64k,1M", by=by)  # type: ignore[arg-type]
    figure = answer.figure()
    (axes,) = figure.axes
    document = answer.to_dict()
    for place, row in enumerate(answer.rows):
        bars = [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == place]  # type: ignore[attr-defined]
        widths = {"weight": 0.0, "state": 0.0}
        for bar in bars:
            widths["state" if bar.get_hatch() else "weight"] += bar.get_width()  # type: ignore[attr-defined]
        assert sum(widths.values()) == pytest.approx(1)
        assert row.wsfr is not None
        assert widths["weight"] / widths["state"] == pytest.approx(float(row.wsfr))
    parts = document["rows"][0][f"by_{by}"]
    *rows, last = legend(figure)
    assert len(rows) == len(parts)
    assert all(row.startswith(part["name"]) for row, part in zip(rows, parts, strict=True))
    assert last == "hatched: state FLOPs; the rest: weight FLOPs"
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    assert ticks[0] == f"8,192 tokens\n{format_ratio(Fraction(answer.rows[0].wsfr or 0))}"
    assert "1:1" in names(axes)
    assert title(figure) == f"{model}: FLOPs per token by {by}"


MODELS = [
    "llama-3-8b",
    "gpt2-small",
    "deepseek-v3",
    "mamba2-2.7b",
    "mistral-7b-v0.1",
    "kimi-k2",
    "qwen3-8b",
    "xlstm-7b",
]


def test_compare() -> None:
    answer = powerplan.compare(MODELS, "8k,128k", dtype="fp8")
    figure = answer.figure()
    upper, lower = figure.axes
    ratios, states = lines(upper), lines(lower)
    for accounting, rows, ratio, state in zip(answer.accountings, answer.rows, ratios, states, strict=True):
        for row in rows:
            assert dict(ratio)[row.context] == float(row.wsfr or 0)
            assert dict(state)[row.context] == float(row.state_bytes)
        assert dict(ratio)[16_384] == float(accounting.wsfr(16_384) or 0)
    assert [x for x, _ in marks(upper, 0)] == [8192, 131_072]
    shown = legend(figure)
    assert len(shown) == len(MODELS)
    assert all(row.startswith(f"{model}: ") for row, model in zip(shown, MODELS, strict=True))
    assert shown[0] == "llama-3-8b: 8.03B parameters, balanced at 57,255"
    assert shown[3] == "mamba2-2.7b: 2.703B parameters, balanced at no context"
    assert shown[5].endswith("balanced at 50,725, on the line of deepseek-v3 below")
    assert names(upper) == ["1:1, as many weight as state FLOPs", "8,192", "131,072"]
    assert lower.get_ylabel() == "state per sequence"
    assert below(figure).endswith("weights and cache in fp8")
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in upper.lines[: len(MODELS)]}
    assert len(looks) == len(MODELS)


@pytest.mark.parametrize(
    ("model", "context", "target"), [("gpt2-small", "64k,1M", "1:1"), ("deepseek-v3", "64k", "3:1")]
)
def test_recommend(model: str, context: str, target: str) -> None:
    answer = powerplan.recommend(model, context, target=target, top=10)
    figure = answer.figure()
    upper, lower = figure.axes
    ratios, states = lines(upper), lines(lower)
    assert len(answer.candidates) > 6
    assert len(ratios) == len(states) == len(answer.candidates) == len(legend(figure))
    shown = zip(answer.candidates, ratios, states, legend(figure), strict=True)
    for number, (candidate, ratio, state, row) in enumerate(shown, 1):
        assert dict(ratio)[candidate.row.context] == float(candidate.row.wsfr or 0)
        assert dict(state)[candidate.row.context] == float(candidate.row.state_bytes)
        assert row.startswith(f"{number}  {candidate.label}: {format_ratio(candidate.row.wsfr or Fraction(0))}")
    assert ", recommended" in legend(figure)[0]
    (unchanged,) = (place for place, candidate in enumerate(answer.candidates) if candidate.plan.unchanged)
    assert [line.get_color() == "#000000" for line in upper.lines[: len(ratios)]].index(True) == unchanged
    first = "1:1, as many weight as state FLOPs" if target == "1:1" else "target 3:1"
    assert names(upper) == [first, *(f"{tokens:,}" for tokens in answer.recommendation.contexts)]
    contexts = " and ".join(f"{tokens:,}" for tokens in answer.recommendation.contexts)
    assert title(figure) == f"{model} at {contexts} tokens: candidates over the context"


def test_a_name_may_hold_anything() -> None:
    spec = catalogue_spec("gpt2-small")
    for name in ("_$x^{2}$ & <b>", "模型", "x" * 200):
        odd = ModelSpec(name=name, vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, layers=spec.layers)
        figure = powerplan.compare([odd, "llama-3-8b"], "8k").figure()
        assert legend(figure)[0].startswith(name[:30])
        assert len(legend(figure)[0]) < 110


def test_one_token_and_the_longest_context() -> None:
    for context in ("1", str(2**50)):
        figure = powerplan.compare(["gpt2-small", "mamba2-130m"], context).figure()
        assert dict(lines(figure.axes[0])[0])[int(context)] > 0
