"""Models over ranks that share sequences, beside ranks that share rows, with weights in shards: one model's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_on_ranks import ATTENTION, COUNT, KINDS, LAYOUTS, STEPS, all_work, curve_alone
from ranks import run_in
from two_processes import OVER_RANKS, small_model

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the processes found: one start of them serves all tests."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_in(COUNT, all_work, folder)
    return [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(COUNT)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_one_process(found: list[Found], kind: str, layout: str) -> None:
    assert all(own["differences"][f"{kind} {layout}"] < 1e-12 for own in found)


@pytest.mark.parametrize("ranks", [2, 3])
def test_they_are_on_fewer_ranks(found: list[Found], ranks: int) -> None:
    kinds = [f"{kind} on {ranks}" for kind in ATTENTION]
    assert all(own["differences"][kind] < 1e-12 for own in found[:ranks] for kind in kinds)


def test_windows_take_the_way_of_fewer_bytes(found: list[Found]) -> None:
    """A window of 8 by the keys and values before a rank; one of 30 in zigzag, for which those are most, by heads."""
    expected = {"window": True, "long window": False, "window of odd heads": True}
    for own in found:
        assert own["by halo"] == {f"{kind} zigzag": way for kind, way in expected.items()} | {"long window": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_half_precision(found: list[Found], kind: str, dtype: str) -> None:
    """Each error is at most twice that of one process in the same dtype, or a rounding."""
    for own in found:
        shared, alone, rounding = own["errors"][f"{kind} {dtype}"]
        assert shared <= 2 * alone + rounding


def test_a_rank_without_tokens_has_a_part_in_experts(found: list[Found]) -> None:
    assert all(own["differences"]["experts"] < 1e-12 for own in found)


def test_learned_positions_are_those_within_a_sequence(found: list[Found]) -> None:
    assert all(own["differences"]["learned positions"] < 1e-12 for own in found)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_scaled_positions_know_the_length_of_the_whole_sequence(found: list[Found], layout: str) -> None:
    assert all(own["differences"][f"scaled RoPE {layout}"] < 1e-12 for own in found)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_do_not_see_each_other(found: list[Found], kind: str) -> None:
    assert all(own["packed"][kind] < 1e-12 for own in found)


PROMPTS = [*(f"{kind} zigzag" for kind in KINDS), *(f"hybrid {name}" for name in LAYOUTS), "learned positions"]


@pytest.mark.parametrize("case", PROMPTS)
def test_after_a_prompt_over_ranks_every_rank_continues_as_one_process_does(found: list[Found], case: str) -> None:
    for own in found:
        row = own["continued"][case]
        assert row["tokens"] == row["alone"]
        assert row["cache"] < 1e-12
        assert row["bytes"] == row["bytes alone"]


def test_all_ranks_draw_the_tokens_of_the_first_one(found: list[Found]) -> None:
    assert [own["drawn"] for own in found] == [found[0]["drawn_alone"]] * COUNT


def test_gradients_of_a_cache_are_those_of_one_process(found: list[Found]) -> None:
    assert all(own["through a cache"] < 1e-12 for own in found)


def test_recomputation_makes_exchanges_again(found: list[Found]) -> None:
    assert all(own["checkpointed"] < 1e-12 for own in found)


def test_bytes_of_the_exchanges_of_attention(found: list[Found]) -> None:
    for own in found:
        for what, row in own["traffic"].items():
            assert row["sent"] == row["planned"], what
        for way in ("forward", "backward"):
            short, long = (own["traffic"][f"window {tokens} {way}"]["sent"] for tokens in (32, 320))
            assert short == long


def test_losses_of_a_hybrid_model_in_shards_are_those_of_one_process(found: list[Found]) -> None:
    """Attention, a window, power and linear attention: rows over two ranks, tokens over two, weights over all four."""
    losses = curve_alone(small_model(*OVER_RANKS, dtype=torch.float64), STEPS)
    for own in found:
        assert own["curve"] == pytest.approx(losses, rel=1e-9)


REFUSED = {
    "kind": "cp: SequenceMixer does not run over several ranks: it does not say what they exchange (run_shared)",
    "cache": "cp: the cache must be empty, and has 8 tokens: what follows them runs without cp",
    "packed cache": "cp: a cache takes no packed sequences: plan with tokens",
    "prompt": "prompt: 8 tokens a row, and the plan has 32",
    "tokens": "tokens: 7 a row, and rank {} of the plan has 8",
    "no plan": "cp must be a ContextParallel or None, and is int",
    "no plan of a prompt": "cp must be a ContextParallel or None, and is Started",
    **{
        f"rows of {kind}": "context parallelism: the calls of the 4 ranks differ in rows: 1 on rank 0, and 2 on rank 1"
        for kind in ("mla", "mla of large latents", "softmax", "window")
    },
    "dtypes": "context parallelism: the calls of the 4 ranks differ in dtype: torch.float64 on rank 0, and",
    "mixers": "context parallelism: the calls of the 4 ranks differ in mixers: attention on rank 0, and power",
    "calls": "context parallelism: the 4 ranks make different calls: they compare the halos on rank 0, and the",
    "packed rows": "the plan packs sequences in one batch row, and q has 2 rows",
    "positions": "32 tokens do not fit the 30 learned positions of small",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(found: list[Found], name: str) -> None:
    for rank, own in enumerate(found):
        assert own["refusals"][name].startswith(REFUSED[name].format(rank))
