"""The figure of decode: steps over the batch, the memory there is, and twins."""

from __future__ import annotations

import pytest
from drawn import below, legend, lines, names, title

import powerplan


def test_without_a_device() -> None:
    answer = powerplan.decode(["llama-3-8b", "mamba2-2.7b"], "8k,128k", batch="1,8,64")
    figure = answer.figure()
    moved, memory = figure.axes
    assert [moved.get_ylabel(), memory.get_ylabel()] == ["bytes moved per token", "memory, weights and state"]
    servings = [serving for model in answer.models for serving in model.servings]
    for serving, own, held in zip(servings, lines(moved), lines(memory), strict=True):
        for batch in (1, 2, 8, 64):
            step = serving.step(batch)
            assert dict(own)[batch] == float(step.moved_bytes / batch)
            assert dict(held)[batch] == float(step.memory_bytes)
    assert legend(figure) == [
        "llama-3-8b at 8,192: state 1 GiB per sequence",
        "llama-3-8b at 131,072: state 16 GiB per sequence",
        "mamba2-2.7b at 8,192: state 162 MiB per sequence",
        "mamba2-2.7b at 131,072: state 162 MiB per sequence, on both lines of mamba2-2.7b at 8,192",
    ]
    assert title(figure) == "Decoding at 8,192 and 131,072 tokens, over the batch"
    assert memory.get_xlabel() == "batch, sequences decoded together"


def test_on_a_device() -> None:
    answer = powerplan.decode("llama-3-8b", "128k", gpu="h100-sxm")
    figure = answer.figure()
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "step time",
        "tokens per second",
        "memory, weights and state",
    ]
    (serving,) = answer.models[0].servings
    assert serving.largest_batch == 4
    for axes, value in zip(figure.axes[:2], ("seconds", "tokens_per_s"), strict=True):
        fits, rest, most = lines(axes)
        assert [batch for batch, _ in fits] == [1, 2, 4]
        assert [batch for batch, _ in rest] == [4, 8, 16, 32, 64]
        assert most == [fits[-1]]
        for batch, y in (*fits, *rest):
            assert y == float(getattr(serving.step(int(batch)), value))
    memory = figure.axes[2]
    assert names(memory) == ["memory of h100-sxm: 79.18 GiB"]
    low, high = memory.get_ylim()
    assert low < 81_080 * 2**20 < high
    assert legend(figure) == ["llama-3-8b at 131,072: state 16 GiB per sequence, largest batch 4"]
    assert title(figure) == "llama-3-8b at 131,072 tokens on h100-sxm, over the batch"
    assert below(figure).startswith("rooflines of one step, at the end of the context; dotted: batches that do not fit")


def test_twins_are_dashed_in_the_colour_of_their_model() -> None:
    figure = powerplan.decode(["kimi-linear-48b-a3b"], "128k,1M", twin="mla", gpu="h100-sxm", devices=8).figure()
    own, longer, twin, longer_twin = figure.axes[0].lines[:4]
    assert own.get_color() == twin.get_color() != longer.get_color() == longer_twin.get_color()
    assert own.get_linestyle() == longer.get_linestyle() == "-"
    assert twin.get_linestyle() == longer_twin.get_linestyle() == "--"
    shown = legend(figure)
    assert shown[0] == "kimi-linear-48b-a3b at 131,072: state 1.025 GiB per sequence, largest batch 528"
    assert shown[2].startswith("mla twin of kimi-linear-48b-a3b at 131,072: ")
    assert names(figure.axes[2]) == ["memory of 8 h100-sxm: 633.4 GiB"]


@pytest.mark.parametrize(
    ("model", "context", "ending"),
    [
        ("deepseek-v3", "8k", "the weights do not fit"),
        ("llama-3-8b", "1M", "not one sequence fits"),
        ("mamba2-130m", "1M", "largest batch 4,430"),
    ],
)
def test_what_fits_is_in_the_legend(model: str, context: str, ending: str) -> None:
    (row,) = legend(powerplan.decode(model, context, gpu="h100-sxm").figure())
    assert row.endswith(ending)
