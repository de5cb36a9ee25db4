"""The figures of budget: what they show equals the answers, for one model, several, and none."""

from __future__ import annotations

from itertools import pairwise

import pytest
from drawn import below, legend, lines, marks, names, title
from fuzzing import PROFILE

import powerplan
from powerplan.plots.budget import budgets_figure
from powerplan.plots.sizes import sizes_figure
from powerplan.search.sizing import Sizing
from powerplan.training import TOKENS_PER_PARAMETER, Bought


def test_one_model() -> None:
    answer = powerplan.budget("llama-3-8b", "128k", flops=1e22)
    figure = answer.figure()
    upper, lower = figure.axes
    alternatives = answer.alternatives
    assert [bar.get_width() for bar in upper.patches] == [other.budget.tokens for other in alternatives]  # type: ignore[attr-defined]
    labels = ["as it is", "window 32,709", "power p=2", "power p=3", "linear"]
    assert [text.get_text() for text in upper.get_yticklabels()] == legend(figure) == labels
    assert names(upper) == [
        *("67.52B", "111B, 1.64x", "187.9B, 2.78x", "25.21B, 0.37x", "221.5B, 3.28x"),
        "20 tokens per active parameter",
    ]
    for other, points in zip(alternatives, lines(lower), strict=True):
        assert dict(points)[131_072] == pytest.approx(other.budget.tokens, rel=1e-9)
    at_8k = powerplan.budget("llama-3-8b", "8k", flops=1e22).budget.tokens
    assert dict(lines(lower)[0])[8192] == pytest.approx(at_8k, rel=1e-9)
    assert [x for x, _ in marks(lower, 0)] == [131_072]
    assert title(figure) == "llama-3-8b at 131,072 tokens: what 1e+22 FLOPs buy"
    assert below(figure).startswith("8.03B parameters; training FLOPs, 3x forward: recurrent form")


def test_a_model_whose_layers_take_no_other_mixer() -> None:
    figure = powerplan.budget("mamba2-130m", "8k", flops=1e20).figure()
    assert legend(figure)[0] == "as it is"


def test_several_models_and_contexts() -> None:
    answer = powerplan.budget(["llama-3-8b", "gpt2-small"], "8k,64k", flops=1e21)
    figure = answer.figure()
    upper, lower = figure.axes
    for place, name in enumerate(("llama-3-8b", "gpt2-small")):
        for row in answer.rows:
            if row.budget.accounting.spec.name == name:
                at = row.budget.row.context
                assert dict(lines(upper)[place])[at] == row.budget.tokens
                assert dict(lines(lower)[place])[at] == pytest.approx(float(row.budget.tokens_per_parameter))
        assert [x for x, _ in marks(upper, place)] == [8192, 65_536]
    assert [axes.get_ylabel() for axes in figure.axes] == ["tokens", "tokens per active parameter"]
    assert names(lower) == ["20 per parameter, compute-optimal"]
    assert legend(figure) == ["llama-3-8b: 8.03B parameters", "gpt2-small: 124.4M parameters"]
    assert title(figure) == "What 1e+21 FLOPs buy"
    assert below(figure).endswith(
        "about 20 tokens per parameter are compute-optimal (Hoffmann et al. 2022, arXiv 2203.15556)"
    )


def test_tokens_that_are_the_budget_take_flops_and_hours() -> None:
    answer = powerplan.budget(["llama-3-8b", "gpt2-small"], "8k,64k", tokens="1T", gpu="h100-sxm")
    figure = answer.figure()
    flops, hours = figure.axes
    assert [flops.get_ylabel(), hours.get_ylabel()] == ["training FLOPs in all", "device hours"]
    for row in answer.rows:
        place = ["llama-3-8b", "gpt2-small"].index(row.budget.accounting.spec.name)
        assert dict(lines(flops)[place])[row.budget.row.context] == float(row.budget.total_flops)
        assert dict(lines(hours)[place])[row.budget.row.context] == pytest.approx(row.gpu_hours)
    assert title(figure) == "What 1T tokens take"
    rule = powerplan.budget(["llama-3-8b", "gpt2-small"], "8k").figure()
    assert title(rule) == "What 20 tokens per active parameter take"


def test_hours_that_are_the_budget_buy_tokens() -> None:
    answer = powerplan.budget(["llama-3-8b", "gpt2-small"], "8k", gpu_hours=100, gpu="h100-sxm")
    assert [axes.get_ylabel() for axes in answer.figure().axes] == ["tokens", "tokens per active parameter"]


def test_measured_times_have_points_at_their_contexts_alone() -> None:
    rows = powerplan.budget("gpt2-small", "1k,4k", gpu_hours=100, measured=PROFILE).rows
    assert any(row.time is not None and row.time.measured for row in rows)
    figure = budgets_figure(rows)
    assert lines(figure.axes[0]) == [[(row.budget.row.context, row.budget.tokens) for row in rows]]


def test_a_budget_that_buys_nothing() -> None:
    rows = powerplan.budget(["gpt2-small", "llama-3-8b"], "8k", flops=1).rows
    assert [row.budget.tokens for row in rows] == [0, 0]
    assert len(legend(budgets_figure(rows))) == 2
    assert isinstance(rows[0], Bought)


def test_sizes() -> None:
    answer = powerplan.budget(None, "8k,128k", flops=1e21)
    figure = answer.figure()
    (axes,) = figure.axes
    rows = [*answer.balanced, *answer.rows]
    widths = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]
    assert widths == [row.budget.parameters for row in rows]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(labels) == len(rows)
    for row, label in zip(rows, labels, strict=True):
        assert label.startswith(f"{row.shape}, {row.spec.layer_count} x {row.spec.hidden_size:,}: ")
    assert labels[0].endswith(f"{answer.balanced[0].context:,} tokens")
    assert labels[-1].endswith(answer.rows[-1].label)
    heads = [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"]
    assert heads == ["Balanced as it is", "At 8,192 tokens", "At 131,072 tokens"]
    hatched = [bool(bar.get_hatch()) for bar in axes.patches]  # type: ignore[attr-defined]
    assert hatched == [not row.recommended for row in rows]
    assert all(a.get_y() < b.get_y() for a, b in pairwise(axes.patches))  # type: ignore[attr-defined]
    assert legend(figure) == ["as it is", "as it is, more state than weight FLOPs", "with mixers that balance it"]
    assert title(figure) == "Which model 1e+21 FLOPs support"
    assert f"{TOKENS_PER_PARAMETER} tokens per active parameter" in below(figure)
    alone = sizes_figure(Sizing(answer.sizing.total_flops, answer.rows[:1], ()))
    assert len(alone.axes[0].patches) == 1
