"""Mixers with a recurrent state over several processes, their convolutions and token shifts: those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models_on_ranks import curve_alone, model_of
from ranks import run_in
from shared_calls import COUNT, GROUPS
from states_on_ranks import HYBRID, JOBS, KINDS, ROUNDED, STEPS, all_work

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the processes found: one start of them serves all tests."""
    folder: Path = tmp_path_factory.mktemp("states")
    run_in(COUNT, all_work, folder)
    return [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(COUNT)]


@pytest.mark.parametrize("number", range(len(JOBS)), ids=lambda number: JOBS[number].name)
def test_outputs_and_gradients_are_those_of_one_process(found: list[Found], number: int) -> None:
    assert found[GROUPS[JOBS[number].ranks][0]][str(number)] == {}


@pytest.mark.parametrize("kind", ROUNDED)
def test_an_exchange_in_bfloat16_rounds_states_and_matrices(found: list[Found], kind: str) -> None:
    """bfloat16 rounds to 2^-9 of a number."""
    for name, error in found[0]["rounding"][kind].items():
        if "bfloat16" in name:
            assert 2.0**-14 < error < 2 * 2.0**-9, name
        else:
            assert error < 2.0**-18, name


def test_bytes_on_the_wire_are_those_planned_whatever_the_length(found: list[Found]) -> None:
    for own in found:
        for row in own["traffic"]:
            for name in ("forward", "backward"):
                assert row[name] == sum(row["planned"][name].values()), row
        for kind in KINDS.keys() - {"log_linear"}:
            short, long, *_ = [row for row in own["traffic"] if row["kind"] == kind]
            assert short["planned"] == long["planned"]


def test_a_state_and_its_transition_are_as_many_numbers_as_documented(found: list[Found]) -> None:
    """Two rows; heads x (K V + K K) for delta rules, K V + K for gla, K V + 1 for fixed decays; K = 6 and V = 5.

    Of 40 tokens, log_linear passes on the states of 6 bits.
    """
    numbers = {"deltanet": 2 * (30 + 36), "gated_deltanet": 4 * (30 + 36), "kda": 2 * (30 + 36), "gla": 2 * (30 + 6)}
    numbers |= {"retnet": 2 * (30 + 1), "mamba1": 12 * 2 * 4, "mamba2": 6 * (5 * 2 + 1)}
    numbers |= {"rwkv7": 2 * (8 * 5 + 8 * 8), "gsa": 2 * 7 * (6 + 5 + 1)}
    numbers |= {"sse": 5 * 2 * (30 + 6), "log_linear": 4 * (6 * 15 + 6 * 6)}
    channels = {"deltanet": 0, "gated_deltanet": 3 * (24 + 20), "kda": 3 * (24 + 10), "gla": 0, "retnet": 2 * (24 + 10)}
    channels |= {"mamba1": 3 * 12, "mamba2": 12 + 30, "rwkv7": 16}
    channels |= {"gsa": 2 * (24 + 10), "sse": 2 * (24 + 10), "log_linear": 3 * (12 + 20)}
    for row in found[0]["traffic"]:
        if row["what"] == "contiguous gather None" and row["tokens"] == 40:
            assert row["planned"]["forward"] == {
                "states": 2 * 4 * numbers[row["kind"]],
                "inputs": 2 * 4 * channels[row["kind"]],
            }


def test_rates_have_their_gradient_without_any_other(found: list[Found]) -> None:
    assert all(own["rates alone"] < 1e-12 for own in found)


def test_values_of_the_first_layer_are_those_of_one_process(found: list[Found]) -> None:
    """Two layers of rwkv7, the second with a token shift before its FFN; ranks with one token, and without any."""
    assert all(max(own["values"]) < 1e-12 for own in found)


@pytest.mark.parametrize("kind", [*KINDS, "hybrid", "values"])
def test_after_a_prompt_over_ranks_every_rank_continues_as_one_process_does(found: list[Found], kind: str) -> None:
    for own in found:
        row = own["continued"][kind]
        assert row["tokens"] == row["alone"]
        assert row["cache"] < 1e-12
        assert row["bytes"] == row["bytes alone"]


def test_gradients_of_a_cache_are_those_of_one_process(found: list[Found]) -> None:
    assert all(own["through a cache"] < 1e-12 for own in found)


def test_losses_of_a_hybrid_model_in_shards_are_those_of_one_process(found: list[Found]) -> None:
    """Convolutions, token shifts, values of another layer: rows over two ranks, tokens over two, weights over four."""
    losses = curve_alone(model_of(*HYBRID), STEPS)
    for own in found:
        assert own["curve"] == pytest.approx(losses, rel=1e-9)


def test_compiled_mixers_break_their_graphs_at_the_exchange(found: list[Found]) -> None:
    assert [found[rank]["compiled"] for rank in GROUPS[2]] == [{"gated_deltanet": True, "window": True}] * 2


REFUSED = {
    "kinds": "ValueError: context parallelism: the calls of the 4 ranks differ in mixers: DeltaNetMixer on rank 0, and",
    "rows": "ValueError: context parallelism: the calls of the 4 ranks differ in rows: 1 on rank 0, and 2 on rank 1",
    "packed": "ValueError: the plan packs sequences in one batch row, and q has 2 rows",
    "levels": "InputError: 40 tokens do not fit max_levels 4, which reach 8",
    "forward mode": "ValueError: context parallelism has gradients by torch.autograd alone",
    "transition": "ValueError: transition must be head, feature, matrix, and is 'vector'",
}

REFUSED_BY_ONE = {
    "tokens": "q must be [batch, time, ...] with the 10 tokens of rank 1 of 4 by the plan, and has shape [2, 9, 2, 6]",
    "convolved": "tensors[0] must be [batch, time, ...] with the 10 tokens of rank 1 of 4 by the plan, and has shape",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_the_same_on_all_ranks(found: list[Found], name: str) -> None:
    for own in found:
        assert own["refusals"][name].startswith(REFUSED[name])


@pytest.mark.parametrize("name", REFUSED_BY_ONE)
def test_what_one_rank_refuses_all_ranks_hear_of(found: list[Found], name: str) -> None:
    for rank, own in enumerate(found):
        start = "" if rank == 1 else "context parallelism: rank 1 of 4 failed: "
        assert own["refusals"][name].startswith(f"ValueError: {start}{REFUSED_BY_ONE[name]}")


def test_every_refusal_is_expected(found: list[Found]) -> None:
    assert found[0]["refusals"].keys() == REFUSED.keys() | REFUSED_BY_ONE.keys()
