"""Models over ranks that share sequences, beside ranks that share rows, with weights in shards: one model's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_on_ranks import COUNT, KINDS, LAYOUTS, STEPS, all_work, curve_alone
from ranks import run_in
from two_processes import small_model


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes found: one start of them serves all tests."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_in(COUNT, all_work, folder)
    return [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(COUNT)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_one_process(found: list[dict[str, Any]], kind: str, layout: str) -> None:
    assert all(own["differences"][f"{kind} {layout}"] < 1e-12 for own in found)


def test_learned_positions_are_those_within_a_sequence(found: list[dict[str, Any]]) -> None:
    assert all(own["differences"]["learned positions"] < 1e-12 for own in found)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_scaled_positions_know_the_length_of_the_whole_sequence(found: list[dict[str, Any]], layout: str) -> None:
    assert all(own["differences"][f"scaled RoPE {layout}"] < 1e-12 for own in found)


def test_packed_sequences_do_not_see_each_other(found: list[dict[str, Any]]) -> None:
    assert all(own["packed"] < 1e-12 for own in found)


def test_losses_of_a_hybrid_model_in_shards_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    """Attention, a window, power and linear attention: rows over two ranks, tokens over two, weights over all four."""
    losses = curve_alone(small_model(dtype=torch.float64), STEPS)
    for own in found:
        assert own["curve"] == pytest.approx(losses, rel=1e-9)


REFUSED = {
    "kind": "cp: SequenceMixer does not run over several ranks yet (attention, power, linear, retnet, lightning,",
    "cache": "a cache and cp exclude each other: a cache has all tokens of its sequences",
    "tokens": "tokens: 7 a row, and rank {} of the plan has 8",
    "packed": "cp: softmax attention over several ranks takes no packed sequences: plan with tokens",
    "heads": "cp: 6 query heads and 2 key/value heads cannot be shared by 4 ranks",
    "positions": "32 tokens do not fit the 30 learned positions of small",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(found: list[dict[str, Any]], name: str) -> None:
    for rank, own in enumerate(found):
        assert own["refusals"][name].startswith(REFUSED[name].format(rank))
